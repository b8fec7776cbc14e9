"""flash-linear-attention's kernels on a GPU, against plain loops; `test_fla.py` has what needs none.

pytest -m gpu tests/mixers/test_fla_native.py
"""

import pytest
import torch
from fla_cases import HALF_CHUNKS, KEEP, SPECS, TYPES, D, installed, make, model_of, noise, off
from fla_reference import reference

from lrnn_lm.mixers import SequenceContext
from lrnn_lm.mixers.fla_layer import FlaMixer


@pytest.fixture(autouse=True)
def few_configurations(monkeypatch):
    """Two launch configurations a kernel: to compile and time all takes minutes, and the choice is fla's."""
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    prune = autotuner.prune_configs

    def prune_to_two(self, *args, **kwargs):  # of those that fit the shape: the first two may not
        fitting = prune(self, *args, **kwargs)
        return sorted(fitting, key=lambda c: (abs(c.num_warps - 4), abs(c.num_stages - 2)))[:2]

    monkeypatch.setattr(autotuner, "prune_configs", prune_to_two)


@installed
@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_native_output_and_state(name):
    """A whole row; the row in two parts and then token by token; two documents in a row."""
    mixer, x = make(name, torch.bfloat16, "cuda"), noise(2, 150, D, dtype=torch.bfloat16).cuda()
    full, last = mixer(x, None, KEEP)
    assert off(full, reference(make(name).cuda(), x.float())) < 0.03
    outputs, state = [], None
    for part in x.split([100, 40, *[1] * 10], dim=1):
        y, state = mixer(part, state, KEEP)
        outputs.append(y)
    assert off(torch.cat(outputs, dim=1), full) < 0.03
    assert off(outputs[-1], full[:, -1:]) < 0.05
    assert off(state, last) < 0.03
    reset = torch.zeros(2, 150, dtype=torch.bool, device="cuda")
    reset[:, 90] = True
    packed, after = mixer(x, None, SequenceContext(reset=reset))
    alone, ended = mixer(x[:, 90:], None, KEEP)
    assert off(packed[:, :90], full[:, :90]) < 0.03
    assert off(packed[:, 90:], alone) < 0.03
    assert off(after, ended) < 0.03


@installed
@pytest.mark.gpu
@pytest.mark.parametrize("mixed", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", SPECS)
def test_native_gradients(name, mixed):
    """Of two documents in a row, as in training: fp32 weights under bf16 autocast; or fp32 altogether."""
    if not mixed and SPECS[name]["type"] in HALF_CHUNKS:
        pytest.skip("its chunked kernels take half precision only")
    # At 0.3 RWKV-7's gradients are ill-conditioned: plain loops under bf16 autocast are off by 0.28, at
    # 0.1 by 0.05; Gated DeltaNet's by 0.02 at both.
    std = 0.1 if name == "rwkv7" else 0.3
    mixer, plain = make(name, device="cuda", std=std).train(), make(name, device="cuda", std=std)
    skip_untrainable(mixer)
    x = noise(2, 150, D).cuda()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    reset = torch.zeros(2, 150, dtype=torch.bool, device="cuda")
    reset[:, 90] = True
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        y, _ = mixer(ours, None, SequenceContext(reset=reset))
    want = torch.cat([reference(plain, part) for part in theirs.split([90, 60], dim=1)], dim=1)
    assert off(y, want) < (0.03 if mixed else 0.005)
    weights = noise(2, 150, D).flip(1).cuda()
    (y.float() * weights).sum().backward()
    (want * weights).sum().backward()
    pairs = zip(mixer.named_parameters(), plain.parameters(), strict=True)
    apart = {"x": off(ours.grad, theirs.grad)} | {key: off(p.grad, q.grad) for (key, p), q in pairs}
    limit = 0.1 if mixed else 0.02  # products of fp32 kernels are TF32's
    wrong = {key: value for key, value in apart.items() if value > limit}
    assert not wrong, wrong


def skip_untrainable(mixer: FlaMixer) -> None:
    """Skip where this GPU's compiler gets the layer's gradients wrong."""
    try:
        mixer.check_device(torch.device("cuda"))
    except ValueError as obstacle:
        pytest.skip(str(obstacle))


@installed
@pytest.mark.gpu
@pytest.mark.parametrize("kind", TYPES)
def test_native_training_lowers_the_loss(kind):
    model = model_of(kind).cuda().train()
    skip_untrainable(next(m for m in model.modules() if isinstance(m, FlaMixer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = (torch.arange(128) + 7 * torch.arange(4).unsqueeze(1)).cuda() % 41
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
