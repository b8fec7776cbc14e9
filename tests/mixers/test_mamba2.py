"""Mamba-2 against transformers' layer, whose plain torch runs on anything: its weights under its names."""

import copy
from itertools import pairwise

import pytest
import torch
from transformers import Mamba2Config
from transformers.cache_utils import DynamicCache
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from lrnn_lm.mixers import build_mixer
from lrnn_lm.mixers.base import SequenceContext

D, T = 12, 11
SPEC = {"type": "mamba2", "head_dim": 4, "state_size": 3}


def pair(groups: int, dtype: torch.dtype = torch.float64, kernel: int = 4):
    """Ours with large random parameters, theirs with the same, and its config."""
    torch.manual_seed(0)
    ours = build_mixer(SPEC | {"n_groups": groups, "conv_kernel": kernel}, D).to(dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    config = Mamba2Config(
        hidden_size=D, num_hidden_layers=1, num_heads=6, head_dim=4, expand=2, state_size=3, n_groups=groups,
        conv_kernel=kernel, chunk_size=4,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0).to(dtype)
    theirs.load_state_dict(ours.inner.state_dict())
    return ours, theirs, config


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 2e-6), (torch.float32, 1e-5)], ids=str)
def test_outputs_and_gradients_are_transformers(groups, dtype, bound):
    """Theirs computes its scan in fp32 at most."""
    ours, theirs, _ = pair(groups, dtype)
    x = torch.randn(2, T, D, dtype=dtype, requires_grad=True)
    y, want = ours(x)[0], theirs(x)
    torch.testing.assert_close(y, want, rtol=bound, atol=bound)
    weight = torch.randn_like(y)
    names = [name for name, _ in ours.inner.named_parameters()]
    got = torch.autograd.grad((y * weight).sum(), [x, *ours.parameters()])
    wanted = torch.autograd.grad((want * weight).sum(), [x, *map(theirs.get_parameter, names)])
    for name, left, right in zip(["x", *names], got, wanted, strict=True):
        size = right.abs().max()
        assert (left - right).abs().max() <= 5 * bound * size, name
        assert size > 0


@pytest.mark.parametrize("kernel", [2, 4])
@torch.no_grad()
def test_states_and_decoding_are_transformers(kernel):
    """A prefill, more tokens at once, then one at a time, each from the state before."""
    ours, theirs, config = pair(2, kernel=kernel)
    x = torch.randn(2, T, D, dtype=torch.float64)
    cache, state = DynamicCache(config=config), None
    for part in x.split([5, 3, 1, 1, 1], dim=1):
        want = theirs(part, cache_params=cache)
        y, state = ours(part, state)
        torch.testing.assert_close(y, want, rtol=2e-6, atol=2e-6)
        S, past = ours.inner.conv1d.split(state, ours.head_shape)
        torch.testing.assert_close(S.mT, cache.layers[0].recurrent_states[0].double(), rtol=2e-6, atol=2e-6)
        kept = cache.layers[0].conv_states[0].mT[:, 1 - kernel :]  # theirs may keep the one before, too
        torch.testing.assert_close(past, kept, rtol=1e-6, atol=1e-6)


def test_documents_are_sequences_of_their_own():
    """Outputs, the state and gradients, where a row goes on and where documents start next to each other."""
    ours, *_ = pair(2)
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[0, [0, 4, 5]] = reset[1, [2, 9]] = True
    state = torch.randn(2, ours.state_elements(1), dtype=torch.float64, requires_grad=True)
    y, after = ours(x, state, SequenceContext(reset=reset))
    rows, states = [], []
    for row, starts in enumerate(([0, 4, 5, T], [0, 2, 9, T])):
        parts, last = [], state[row : row + 1]
        for begin, end in pairwise(starts):
            part, last = ours(x[row : row + 1, begin:end], None if reset[row, begin] else last)
            parts.append(part)
        rows.append(torch.cat(parts, dim=1))
        states.append(last)
    want, last = torch.cat(rows), torch.cat(states)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(after, last)
    weights = torch.randn_like(y), torch.randn_like(after)
    wanted = [x, state, *ours.parameters()]
    got = torch.autograd.grad((y * weights[0]).sum() + (after * weights[1]).sum(), wanted)
    others = torch.autograd.grad((want * weights[0]).sum() + (last * weights[1]).sum(), wanted)
    for left, right in zip(got, others, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_bf16_keeps_its_decays(autocast):
    """Steps of 1e-3 decay a state by 0.999, which bf16 would round to 1."""
    ours, *_ = pair(1, torch.float32)
    for parameter in ours.parameters():  # nothing is written
        parameter.zero_()
    ours.inner.dt_bias.fill_(-7.0)
    dtype = torch.float32 if autocast else torch.bfloat16
    state = torch.ones(1, ours.state_elements(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, after = ours.to(dtype)(torch.zeros(1, 100, D, dtype=dtype), state)
    S, _ = ours.inner.conv1d.split(after, ours.head_shape)
    kept = torch.exp(-100 * torch.nn.functional.softplus(torch.tensor(-7.0)))  # 0.913
    torch.testing.assert_close(S, kept.expand(S.shape))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
def test_published_sizes_on_a_gpu(dtype, bound):
    """Heads of 128 x 64, the largest that one program takes: outputs, the state and gradients beside fp64."""
    torch.manual_seed(0)
    exact = build_mixer({"type": "mamba2"}, 768).to(dtype).double()  # 24 heads
    x = torch.randn(2, 77, 768).to(dtype)
    reset = torch.rand(2, 77) < 0.05
    found = []
    for layer, device, kind in ((copy.deepcopy(exact), "cuda", dtype), (exact, "cpu", torch.float64)):
        layer.to(device, kind)
        given = x.detach().to(device, kind).requires_grad_()
        y, state = layer(given, None, SequenceContext(reset=reset.to(device)))
        (y.square().sum() + state.square().sum()).backward()
        named = {name: p.grad for name, p in layer.named_parameters()}
        found.append({"y": y, "state": state, "x": given.grad, **named})
    for name, want in found[1].items():
        error = (found[0][name].double().cpu() - want).norm() / want.norm()
        assert error <= bound, f"{name}: {error:.1e}"


def test_an_old_checkpoint_loads():
    """Names and shapes are those of transformers' layer under `inner`, as before this package's own."""
    ours, theirs, _ = pair(1)
    assert {name: p.shape for name, p in ours.state_dict().items()} == {
        f"inner.{name}": p.shape for name, p in theirs.state_dict().items()
    }
