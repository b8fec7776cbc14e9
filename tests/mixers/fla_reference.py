"""What fla's layers compute, step by step in plain torch; and fla's own kernels made to run on a CPU.

Legend: B batch, T time, H heads, K key width of a head, V its value width.
"""

import builtins
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lrnn_lm.mixers.fla_layer import FlaMixer


def reference(mixer: FlaMixer, x: Tensor) -> Tensor:
    """The mixer's output on x (B, T, D) from no state, by loops over time."""
    inner, name = mixer.inner, mixer.layer
    H, K, V = mixer.head_shape
    n = mixer.updates
    q, k, v = (_stream(inner, stream, x) for stream in "qkv")
    B, T, _ = x.shape
    q, k, v = q.view(B, T, 1, H, K), k.view(B, T, n, H, K), v.view(B, T, n, H, V)
    if name == "GatedLinearAttention":
        decay = F.logsigmoid(inner.gk_proj(x)).view(B, T, H, K, 1).exp() ** (1 / 16)
        beta = None
    else:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta = inner.b_proj(x).sigmoid().view(B, T, n, H, 1) * (2 if inner.allow_neg_eigval else 1)
        decay = x.new_ones(B, T, H, 1, 1)
        if name != "DeltaNet":
            rate = -inner.A_log.exp() * F.softplus(inner.a_proj(x) + inner.dt_bias)
            decay = rate.exp().view(B, T, H, 1, 1)
    S = x.new_zeros(B, H, K, V)
    outputs = []
    for t in range(T):
        S = S * decay[:, t]
        for j in range(n):
            written = v[:, t, j]
            if beta is not None:
                written = beta[:, t, j] * (written - torch.einsum("bhkv,bhk->bhv", S, k[:, t, j]))
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, t, j], written)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t, 0]) * K**-0.5)
    o = torch.stack(outputs, dim=1)  # (B, T, H, V)
    norm = inner.g_norm_swish_gate if beta is None else inner.o_norm
    o = F.rms_norm(o, (V,), norm.weight, eps=1e-5)
    if name != "DeltaNet":
        o = o * F.silu(inner.g_proj(x).view(B, T, H, V))
    return inner.o_proj(o.reshape(B, T, H * V))


def _stream(inner: Any, stream: str, x: Tensor) -> Tensor:
    """A projection, and its causal convolution with silu where the layer has one."""
    y = getattr(inner, f"{stream}_proj")(x)
    if not inner.use_short_conv:
        return y
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
