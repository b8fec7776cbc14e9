"""The fused decoding step: which models it takes, and the same numbers as the forward pass."""

import os

import pytest
import torch
from small_models import MIXER_ROWS, VOCAB, close, plain, prefilled, small_model, states, tokens
from tolerances import TOLERANCE

from lrnn_lm.model.decoding import decode
from lrnn_lm.model.decoding.decode import decode_step, fused_obstacle

SUMS = TOLERANCE["other order of sums"]
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="these models are on the CPU, and there is a GPU"
)


FUSED = {
    "h_lru": {"num_hidden_layers": 2, "repeat": 2},
    "several": {"layer_pattern": [MIXER_ROWS[name] for name in ("h_lru", "bd_lru-tanh", "bd_lru")]},
}


def fused_model(name):
    """No two norms alike, no bias zero: what is taken for another's shows."""
    model = small_model(name if name in MIXER_ROWS else "bd_lru", **FUSED[name])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


@INTERPRETED
@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_fused_steps_are_the_forward_pass(name):
    """Four kernels a layer, here in Triton's interpreter; the state is written in place."""
    pytest.importorskip("triton")
    model, ids = fused_model(name), tokens(length=12)
    ours, theirs = prefilled(model, ids[:, :8]), prefilled(model, ids[:, :8])
    step = decode_step(model, ours, fused=True)
    for t in range(8, 10):
        want = plain(model, ids[:, t : t + 1], theirs)
        close(step(model, ids[:, t : t + 1], ours), want, SUMS)
        for a, b in zip(states(ours), states(theirs), strict=True):
            close(a, b, SUMS)
    assert not step.tiled


@INTERPRETED
@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_fused_steps_of_many_sequences_are_those_of_few(name, monkeypatch):
    """Tiles are in bf16, whose forward pass rounds elsewhere; the kernels for few round where they do."""
    pytest.importorskip("triton")
    ids = tokens(length=10).repeat(2, 1)
    ids = ids * (1 + torch.arange(len(ids))[:, None]) % VOCAB  # a row is no other's
    got = []
    for few in (decode.FEW, len(ids)):
        monkeypatch.setattr(decode, "FEW", few)
        model = fused_model(name).bfloat16()
        cache = prefilled(model, ids[:, :8])
        step = decode_step(model, cache, fused=True)
        assert step.tiled == (few < len(ids))
        logits = [step(model, ids[:, t : t + 1], cache).clone() for t in range(8, 10)]
        got.append([torch.cat(logits, dim=1).float(), *states(cache)])
    for many, few in zip(*got, strict=True):
        assert (many - few).norm() < 5e-2 * few.norm()  # the interpreter cuts bf16 off; few rounds elsewhere


@INTERPRETED
def test_what_has_no_fused_step_says_so():
    pytest.importorskip("triton")
    model, ids = small_model("lstm"), tokens(length=4)
    with pytest.raises(ValueError, match="bd_lru and h_lru only"):
        decode_step(model, prefilled(model, ids), fused=True)


@INTERPRETED
def test_blocks_that_two_programs_would_share_have_no_fused_step():
    """One would write a state that the other still reads."""
    pytest.importorskip("triton")
    for mixer in (
        {"type": "bd_lru", "num_blocks": 2, "block_size": 17},
        {"type": "h_lru", "num_blocks": 2, "order": 17},
    ):
        model, ids = small_model(mixer["type"], mixer=mixer), tokens(length=4)
        with pytest.raises(ValueError, match="blocks and orders up to 16, not 17"):
            decode_step(model, prefilled(model, ids), fused=True)


@INTERPRETED
@torch.no_grad()
def test_weights_that_the_fused_step_would_misread():
    """It reads rows of weights as they lie, and multiplies in fp32."""
    pytest.importorskip("triton")
    model, ids = small_model("bd_lru"), tokens(length=4)
    assert fused_obstacle(model, 1) is None
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data = weight.data.t().contiguous().t()
    with pytest.raises(ValueError, match="some lie otherwise"):
        decode_step(model, prefilled(model, ids), fused=True)
    with pytest.raises(ValueError, match="too coarse for a model in fp64"):
        decode_step(model.double(), prefilled(model, ids), fused=True)


@INTERPRETED
def test_how_many_sequences_a_fused_step_takes():
    """As tiles in bf16, and one after the other else."""
    pytest.importorskip("triton")
    model = small_model("bd_lru")
    assert fused_obstacle(model, decode.FEW_WITHOUT_TILES) is None
    assert "up to 6 sequences in float32, not 7" in fused_obstacle(model, decode.FEW_WITHOUT_TILES + 1)
    model.bfloat16()
    assert fused_obstacle(model, decode.MOST_FUSED) is None
    assert "up to" in fused_obstacle(model, decode.MOST_FUSED + 1)
    model.model.norm.float()  # no tiles then
    assert fused_obstacle(model, decode.FEW_WITHOUT_TILES) is None
    assert "up to 6" in fused_obstacle(model, decode.FEW_WITHOUT_TILES + 1)


@INTERPRETED
@pytest.mark.parametrize("what", ["lm_head", "model.layers.1.mixer.out_proj", "model.layers.0.mlp.up_proj"])
def test_biases_that_the_fused_step_would_leave_out(what):
    pytest.importorskip("triton")
    model = small_model("h_lru")
    projection = model.get_submodule(what)
    projection.bias = torch.nn.Parameter(torch.ones(projection.out_features))
    assert "no bias" in fused_obstacle(model, 1)


@INTERPRETED
def test_norms_that_the_fused_step_would_take_for_another():
    pytest.importorskip("triton")
    model = small_model("bd_lru")
    model.model.layers[1].mlp_norm = torch.nn.LayerNorm(model.config.hidden_size)
    assert "RMSNorm" in fused_obstacle(model, 1)


@INTERPRETED
def test_a_replaced_head_has_no_fused_step():
    pytest.importorskip("triton")
    model = small_model("bd_lru")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert fused_obstacle(model, 1) is not None


@INTERPRETED
def test_a_probe_of_the_diagonal_has_no_fused_step():
    pytest.importorskip("triton")
    model = small_model("bd_lru")
    model.model.layers[1].mixer.diagonal_only = True
    assert "diagonal" in fused_obstacle(model, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bd_lru", "h_lru"])
@torch.no_grad()
def test_kernels_that_begin_before_the_ones_ahead_have_ended(name):
    """Programs enough to fill a device, layers enough to overtake: the right numbers, and the same twice."""
    mixer = {"type": name, "num_blocks": 300, ("block_size" if name == "bd_lru" else "order"): 4}
    sizes = {"vocab_size": 5000, "hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 2048}
    model = small_model(name, mixer=mixer, **sizes).to("cuda")
    ids = torch.randint(5000, (3, 40), generator=torch.Generator().manual_seed(0)).cuda()
    theirs = prefilled(model, ids[:, :4])
    caches = [prefilled(model, ids[:, :4]) for _ in range(2)]
    runs = []
    for cache in caches:
        step = decode_step(model, cache, fused=True)
        runs.append([step(model, ids[:, t : t + 1], cache).clone() for t in range(4, 40)])
    for t, (first, second) in enumerate(zip(*runs, strict=True), start=4):
        assert torch.equal(first, second)
        close(first, plain(model, ids[:, t : t + 1], theirs), 1e-4)
