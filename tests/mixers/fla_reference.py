"""What fla's layers compute, step by step in plain torch; and fla's own kernels made to run on a CPU.

Legend: B batch, T time, H heads, K key width of a head, V its value width, n updates a token.
"""

import builtins
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lrnn_lm.mixers.fla_layer import FlaMixer


class Terms(NamedTuple):
    """S <- decay S + erase (recall^T S) + key value^T, n times a token; outputs S^T query."""

    query: Tensor  # (B, T, H, K)
    decay: Tensor  # (B, T, n, H, K)
    erase: Tensor  # (B, T, n, H, K)
    recall: Tensor  # (B, T, n, H, K)
    key: Tensor  # (B, T, n, H, K)
    value: Tensor  # (B, T, n, H, V)


def reference(mixer: FlaMixer, x: Tensor) -> Tensor:
    """The mixer's output on x (B, T, D) from no state, by loops over time."""
    inner, (H, K, V) = mixer.inner, mixer.head_shape
    terms, normed = {
        "GatedLinearAttention": (_gated, _swish_normed),
        "HGRN2Attention": (_gated, _all_normed),
        "RWKV7Attention": (_shifted, _with_bonus),
    }.get(mixer.layer, (_delta, _head_normed))
    t = terms(mixer, x)
    S = x.new_zeros(x.shape[0], H, K, V)
    outputs = []
    for step in range(x.shape[1]):
        for decay, erase, recall, key, value in zip(
            *(part[:, step].unbind(1) for part in t[1:]), strict=True
        ):
            recalled = torch.einsum("bhk,bhkv->bhv", recall, S)
            S = decay.unsqueeze(-1) * S + torch.einsum("bhk,bhv->bhkv", erase, recalled)
            S = S + torch.einsum("bhk,bhv->bhkv", key, value)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, t.query[:, step]))
    o = torch.stack(outputs, dim=1)  # (B, T, H, V)
    return inner.o_proj(normed(mixer, x, o, t).flatten(2))


def _delta(mixer: FlaMixer, x: Tensor) -> Terms:
    """The delta rules: what the decayed state holds at a key is erased by beta, and beta times a value
    written; Gated DeltaNet-2 has a beta for each channel of the key, and another for each of the value."""
    inner, name, n, (H, K, V) = mixer.inner, mixer.layer, mixer.updates, mixer.head_shape
    B, T, _ = x.shape
    q, k, v = (_stream(inner, stream, x) for stream in "qkv")
    q, k, v = q.view(B, T, H, K), k.view(B, T, n, H, K), v.view(B, T, n, H, V)
    q, k = F.normalize(q, dim=-1) * K**-0.5, F.normalize(k, dim=-1)
    beta = inner.b_proj(x).sigmoid().view(B, T, n, H, -1)
    written = inner.w_proj(x).sigmoid().view(B, T, n, H, V) if name == "GatedDeltaNet2" else beta
    if inner.allow_neg_eigval:
        beta, written = 2 * beta, written if name == "GatedDeltaNet2" else 2 * beta
    decay = torch.ones_like(k)  # of the first update of a token; the others have none
    if name in ("KimiDeltaAttention", "GatedDeltaNet2"):
        step = F.softplus(inner.f_proj(x) + inner.dt_bias).view(B, T, 1, H, K)
        decay = (-inner.A_log.exp().unsqueeze(-1) * step).exp()
    elif name != "DeltaNet":
        rate = -inner.A_log.exp() * F.softplus(inner.a_proj(x) + inner.dt_bias)
        decay = torch.cat([rate.exp().view(B, T, 1, H, 1).expand(B, T, 1, H, K), decay[:, :, 1:]], dim=2)
    return Terms(q, decay, -k, decay * beta * k, k, written * v)


def _gated(mixer: FlaMixer, x: Tensor) -> Terms:
    """GLA and HGRN2: keys decay the state by channels, and nothing is erased."""
    inner, (H, K, V) = mixer.inner, mixer.head_shape
    B, T, _ = x.shape
    if mixer.layer == "HGRN2Attention":
        decay = inner.f_proj(x).sigmoid()
        q, k, v = F.silu(inner.q_proj(x)), 1 - decay, inner.i_proj(x)
    else:
        decay = F.logsigmoid(inner.gk_proj(x)).exp() ** (1 / 16)
        q, k, v = inner.q_proj(x), inner.k_proj(x), inner.v_proj(x)
    k, v = k.view(B, T, 1, H, K), v.view(B, T, 1, H, V)
    zero = torch.zeros_like(k)
    return Terms(q.view(B, T, H, K) * K**-0.5, decay.view(B, T, 1, H, K), zero, zero, k, v)


def _shifted(mixer: FlaMixer, x: Tensor) -> Terms:
    """RWKV-7: everything is read off x_t + mix (x_{t-1} - x_t), with a mix for each."""
    inner, (H, K, V) = mixer.inner, mixer.head_shape
    B, T, _ = x.shape
    before = F.pad(x, (0, 0, 1, 0))[:, :-1]
    r, w, k, v, a = (x + (before - x) * getattr(inner, f"x_{name}") for name in "rwkva")
    r, k, v = inner.r_proj(r), inner.k_proj(k), inner.v_proj(v)
    decay = (-math.exp(-0.5) * inner.w_lora(w).sigmoid()).exp().view(B, T, 1, H, K)
    a = inner.a_lora(a).sigmoid()
    erased = F.normalize((k * inner.k_k).view(B, T, 1, H, K), dim=-1)
    k = k * (1 + (a - 1) * inner.k_a)
    k, v = k.view(B, T, 1, H, K), v.view(B, T, 1, H, V)
    return Terms(r.view(B, T, H, K), decay, erased * a.view(B, T, 1, H, K), -erased, k, v)


def _head_normed(mixer: FlaMixer, x: Tensor, o: Tensor, t: Terms) -> Tensor:
    inner = mixer.inner
    o = F.rms_norm(o, o.shape[-1:], inner.o_norm.weight, eps=1e-5)
    if mixer.output_gate is None:
        return o
    by_sigmoid = mixer.layer in ("KimiDeltaAttention", "GatedDeltaNet2")
    return o * (torch.sigmoid if by_sigmoid else F.silu)(inner.g_proj(x).view_as(o))


def _swish_normed(mixer: FlaMixer, x: Tensor, o: Tensor, t: Terms) -> Tensor:
    inner = mixer.inner
    o = F.rms_norm(o, o.shape[-1:], inner.g_norm_swish_gate.weight, eps=1e-5)
    return o * F.silu(inner.g_proj(x).view_as(o))


def _all_normed(mixer: FlaMixer, x: Tensor, o: Tensor, t: Terms) -> Tensor:
    return F.rms_norm(o.flatten(2), (x.shape[-1],), mixer.inner.g_norm.weight, eps=1e-5)


def _with_bonus(mixer: FlaMixer, x: Tensor, o: Tensor, t: Terms) -> Tensor:
    inner, (H, K, _) = mixer.inner, mixer.head_shape
    norm = inner.g_norm
    normed = F.group_norm(o.flatten(0, 1).flatten(1), H, norm.weight, norm.bias, eps=K * 1e-5).view_as(o)
    bonus = (t.query * t.key[:, :, 0] * inner.r_k).sum(-1, keepdim=True) * t.value[:, :, 0]
    mixed = x + (F.pad(x, (0, 0, 1, 0))[:, :-1] - x) * inner.x_g
    return (normed + bonus) * inner.g_lora(mixed).view_as(o)


def _stream(inner: Any, stream: str, x: Tensor) -> Tensor:
    """A projection, and its causal convolution with silu."""
    y = getattr(inner, f"{stream}_proj")(x)
    conv = getattr(inner, f"{stream}_conv1d")
    padded = F.pad(y.transpose(1, 2), (conv.kernel_size[0] - 1, 0))
    return F.silu(F.conv1d(padded, conv.weight, groups=conv.groups)).transpose(1, 2)


class _Index(int):
    """A loop counter as kernels see it compiled: it can be asked for another integer type."""

    def to(self, dtype: Any) -> "_Index":
        return self


def interpreted_kernels() -> Iterator[None]:
    """fla's own Triton kernels in Triton's interpreter: the first of the tuned configurations, no timing.

    Skips where there is no interpreter: without fla, with a GPU (whose tests run the kernels themselves), or
    where triton was imported before TRITON_INTERPRET was set.
    """
    pytest.importorskip("fla.layers", reason="flash-linear-attention is not installed")
    import triton
    from triton.runtime.autotuner import Autotuner

    if torch.cuda.is_available() or not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off: with a GPU, the tests marked gpu run the kernels")

    def loop(*bounds: Any) -> Iterator[_Index]:
        return (_Index(i) for i in builtins.range(*bounds))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autotuner, "do_bench", property(lambda self: lambda call, quantiles: (0.0,) * 3))
        for name, module in list(sys.modules.items()):
            if name.startswith("fla.ops."):
                patch.setattr(module, "range", loop, raising=False)
        patch.setattr(FlaMixer, "check_device", lambda self, device: None)
        yield
