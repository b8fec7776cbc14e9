"""Attention against its formula, query by query and head by head: outputs and all gradients."""

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lrnn_lm.mixers import build_mixer
from lrnn_lm.mixers.attention import Attention
from lrnn_lm.mixers.base import SequenceContext

T, D = 11, 24
OPTIONS = {
    "plain": {"num_heads": 3},
    "grouped": {"num_heads": 6, "num_kv_heads": 2},
    "one group": {"num_heads": 4, "num_kv_heads": 1, "qk_norm": True},
    "no positions": {"num_heads": 3, "use_rope": False},
    "window": {"num_heads": 6, "num_kv_heads": 3, "window": 4},
}


def rotated(x: Tensor, t: int, theta: float) -> Tensor:
    """x (d,) as d/2 complex numbers, each turned by t times its frequency."""
    half = x.shape[0] // 2
    turns = theta ** (-torch.arange(half, dtype=x.dtype) / half) * t
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(turns), turns)
    return torch.cat([z.real, z.imag])


def formula(layer: Attention, x: Tensor) -> Tensor:
    """One row x (T, D): softmax over the keys that a query sees, one query and head at a time."""
    d, rows = layer.head_dim, []
    shared = layer.num_heads // layer.num_kv_heads

    def part(proj: torch.nn.Linear, head: int, t: int, norm: torch.nn.RMSNorm | None = None) -> Tensor:
        u = proj.weight[head * d : (head + 1) * d] @ x[t]
        if norm is not None:
            u = u / (u.square().mean() + 1e-6).sqrt() * norm.weight
        return rotated(u, t, layer.rope_theta) if layer.use_rope and proj is not layer.v_proj else u

    for t in range(len(x)):
        heads = []
        for h in range(layer.num_heads):
            seen = range(max(0, t + 1 - (layer.window or T)), t + 1)
            keys = [part(layer.k_proj, h // shared, s, layer.k_norm) for s in seen]
            values = torch.stack([part(layer.v_proj, h // shared, s) for s in seen])
            query = part(layer.q_proj, h, t, layer.q_norm)
            heads.append(torch.softmax(torch.stack(keys) @ query / d**0.5, dim=0) @ values)
        rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_and_gradients(options):
    torch.manual_seed(3)
    layer = build_mixer({"type": "attention", **options}, D).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.3)
    x = torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    inputs, weights = [x, *layer.parameters()], torch.randn(T, D, dtype=torch.float64)
    want, (got, _) = formula(layer, x[0]), layer(x)
    close = {"rtol": 1e-5, "atol": 1e-5}  # angles and norms are in fp32
    torch.testing.assert_close(got[0], want, **close)
    expected = torch.autograd.grad((want * weights).sum(), inputs)
    for gradient, one in zip(torch.autograd.grad((got[0] * weights).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(gradient, one, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_are_heads_that_share_keys_and_values(dtype):
    """In half precision SDPA reads them in place, else they are repeated: as with their weights repeated."""
    torch.manual_seed(4)
    grouped = build_mixer({"type": "attention", "num_heads": 4, "num_kv_heads": 2}, D * 2)
    plain = build_mixer({"type": "attention", "num_heads": 4}, D * 2)
    weights = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = weights[name].view(2, 12, -1).repeat_interleave(2, dim=0).flatten(0, 1)
    plain.load_state_dict(weights)
    x = torch.randn(2, T, D * 2).to(dtype)
    got, want = grouped.to(dtype)(x)[0], plain.to(dtype)(x)[0]
    torch.testing.assert_close(got, want)
    for rows, heads in ((1, 1), (2, 1), (2, 4)):  # a lone token after others, beside masks of each shape
        seen = (torch.rand(rows, heads, 1, T) > 0.4) | (torch.arange(T) == T - 1)
        context = SequenceContext(attention_mask=seen, positions=torch.full((1, 1), T - 1))
        pair = []
        for layer in (grouped, plain):
            cache = DynamicLayer()
            layer(x[:, :-1], cache)
            pair.append(layer(x[:, -1:], cache, context)[0])
        torch.testing.assert_close(*pair)
    assert grouped.state_elements(10) * 2 == plain.state_elements(10) == 2 * 48 * 10
    assert grouped.cost(10) == plain.cost(10)
