"""The baselines through flash-linear-attention: delta rules (DeltaNet to KDA), RWKV-7, GLA, HGRN2.

What they share, and where they run, is in `fla_layer.py`.

Legend: D model width, H heads, K key width of a head, V its value width, W kernel of a convolution, S state.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .base import MixerCost, check_sizes, plain_weight
from .fla_layer import FlaMixer

LARGEST_KEY = 256  # the delta rule's kernels hold one head's keys in one program


class DeltaNet(FlaMixer):
    """DeltaNet (Yang et al., arXiv 2406.06484): S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T.

    Args:
        hidden_size: D.
        num_heads: H.
        expand_k, expand_v: all heads' keys and values over D.
        conv_kernel: W of the convolutions before q, k and v.
        allow_neg_eigval: beta in 0 .. 2 instead of 0 .. 1.
    """

    layer = "DeltaNet"
    miscompiled = True
    operations = 6  # recall (2), write (2), read (2)
    chunk_takes_fp32 = False
    output_gate = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv_kernel: int = 4,
        allow_neg_eigval: bool | None = None,
    ):
        check_sizes(num_heads=num_heads, conv_kernel=conv_kernel)
        keys, values = _width(hidden_size, expand_k), _width(hidden_size, expand_v)
        _check_key_width(keys // num_heads)
        super().__init__(
            hidden_size, keys, values, num_heads,
            expand_k=keys / hidden_size, expand_v=values / hidden_size, conv_size=conv_kernel,
            allow_neg_eigval=bool(allow_neg_eigval),
        )  # fmt: skip


class GatedDeltaNet(FlaMixer):
    """Gated DeltaNet (Yang, Kautz, Hatamizadeh, arXiv 2412.06464): DeltaNet with decay and an output gate.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K.
        expand_v: V over K.
        conv_kernel, allow_neg_eigval: as in DeltaNet.
    """

    layer = "GatedDeltaNet"
    operations = 7  # decay, and the delta rule
    value_first = True
    gated_rule = True
    miscompiled = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        head_dim: int = 64,
        expand_v: float = 1.0,
        conv_kernel: int = 4,
        allow_neg_eigval: bool | None = None,
        **settings: Any,
    ):
        check_sizes(num_heads=num_heads, head_dim=head_dim, conv_kernel=conv_kernel)
        _check_key_width(head_dim)
        value_dim = _width(head_dim, expand_v)
        super().__init__(
            hidden_size, num_heads * head_dim, num_heads * value_dim, num_heads,
            head_dim=head_dim, expand_v=value_dim / head_dim, conv_size=conv_kernel,
            allow_neg_eigval=bool(allow_neg_eigval), **settings,
        )  # fmt: skip


class GatedDeltaProduct(GatedDeltaNet):
    """Gated DeltaProduct (Siems et al., arXiv 2502.10297): several delta-rule updates a token.

    Args:
        num_householder: updates a token, each with keys and values of its own.
        allow_neg_eigval: as in DeltaNet, but true if not given.
        The rest: as in GatedDeltaNet.
    """

    layer = "GatedDeltaProduct"
    value_first = False
    chunk_takes_fp32 = False

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        head_dim: int = 64,
        expand_v: float = 1.0,
        conv_kernel: int = 4,
        allow_neg_eigval: bool | None = None,
        num_householder: int = 2,
    ):
        check_sizes(num_householder=num_householder)
        negative = True if allow_neg_eigval is None else allow_neg_eigval
        super().__init__(
            hidden_size, num_heads, head_dim, expand_v, conv_kernel, negative, num_householder=num_householder
        )
        self.updates = num_householder

    def cost(self, context_length: int) -> MixerCost:
        """Decay (1) and read (2) once a token, recall (2) and write (2) in each update."""
        H, K, V = self.head_shape
        return MixerCost(super().cost(context_length).products, scan=(3 + 4 * self.updates) * H * K * V)


class KimiDeltaAttention(GatedDeltaNet):
    """Kimi Delta Attention (Kimi Team, arXiv 2510.26692): Gated DeltaNet with a decay for each key channel.

    Arguments as in GatedDeltaNet.
    """

    layer = "KimiDeltaAttention"
    gates = ("f_proj", "b_proj")
    slowest_rate = 1.0
    gated_rule = False
    miscompiled = False


class GatedDeltaNet2(KimiDeltaAttention):
    """Gated DeltaNet-2 (NVIDIA, github.com/NVlabs/GatedDeltaNet-2): KDA that erases and writes by channels,
    S_t = (I - k_t (b_t k_t)^T) diag(a_t) S_{t-1} + k_t (w_t v_t)^T.

    Arguments as in GatedDeltaNet.
    """

    layer = "GatedDeltaNet2"
    gates = ("f_proj", "b_proj", "w_proj")
    value_first = False


class GatedLinearAttention(FlaMixer):
    """GLA (Yang et al., arXiv 2312.06635): S_t = diag(a_t) S_{t-1} + k_t v_t^T, output gated.

    Args:
        hidden_size: D.
        num_heads: H.
        expand_k, expand_v: all heads' keys and values over D.
    """

    layer = "GatedLinearAttention"
    operations = 5  # decay, write (2), read (2)
    convolved = False
    gates = ("gk_proj",)
    value_first = True

    def __init__(self, hidden_size: int, num_heads: int = 8, expand_k: float = 1.0, expand_v: float = 1.0):
        check_sizes(num_heads=num_heads)
        keys, values = _width(hidden_size, expand_k), _width(hidden_size, expand_v)
        super().__init__(
            hidden_size, keys, values, num_heads,
            expand_k=keys / hidden_size, expand_v=values / hidden_size,
        )  # fmt: skip


class HGRN2(FlaMixer):
    """HGRN2 (Qin et al., arXiv 2404.07904): S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, f_t a sigmoid.

    Without the lower bounds of f_t, which fla's model learns for all layers together.

    Args:
        hidden_size: D.
        head_dim: K and V; H is D / K.
    """

    layer = "HGRN2Attention"
    operations = 5
    streams = ("q", "f", "i")
    convolved = False
    output_gate = None
    value_first = True

    def __init__(self, hidden_size: int, head_dim: int = 64):
        heads = _heads(hidden_size, head_dim)
        super().__init__(hidden_size, hidden_size, hidden_size, heads, expand_ratio=head_dim)

    def _choose_kernel(self, x: Tensor) -> None:
        super()._choose_kernel(x)
        if plain_weight(self.inner.o_proj) is None:  # fla reads its weight, in one kernel with the norm
            raise ValueError(
                "HGRN2's kernel does not call the output projection, which has an adapter, a hook or the "
                "like: leave mixer.inner.o_proj without"
            )


class RWKV7(FlaMixer):
    """RWKV-7 (Peng et al., arXiv 2503.14456): S_t = (diag(w_t) - u_t (a_t u_t)^T) S_{t-1} + k_t v_t^T.

    The time mixing of its first layer: later ones add a share of the first layer's values to their own,
    which no layer by itself can.

    Args:
        hidden_size: D.
        head_dim: K and V; H is D / K.
    """

    layer = "RWKV7Attention"
    operations = 7  # decay, recall (2), write (2), read (2)
    streams = ("r", "k", "v")
    convolved = False
    shifted = True
    gates = ("w_lora", "a_lora")
    output_gate = "g_lora"

    def __init__(self, hidden_size: int, head_dim: int = 64):
        heads = _heads(hidden_size, head_dim)
        # The number of layers only sets initial values, which are drawn below.
        super().__init__(hidden_size, hidden_size, hidden_size, heads, head_dim=head_dim, num_hidden_layers=2)

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """As fla's first layer starts, but for its matrices and a scale of the norm."""
        H, K, _ = self.head_shape
        n = torch.arange(H * K)
        share, centred = n / (H * K), n / max(H * K - 1, 1) - 0.5
        within = 2 * (n % K) / max(K - 1, 1) - 1  # a head, from -1 to 1
        within = within * within.abs()
        mixes = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        values = {f"x_{name}": (1 - share**power).view(1, 1, -1) for name, power in mixes.items()}
        values |= {
            "k_k": 0.71 - 0.1 * centred,
            "k_a": torch.full((H * K,), 1.02),
            "r_k": torch.full((H, K), -0.04),
            "w_lora.lora.2.bias": 6 * centred - 2.5 + 2.5 * within,
            "a_lora.lora.2.bias": -0.19 + 0.3 * within + 0.4 * centred,
        }
        return super().initial_values(std) | {f"inner.{name}": value for name, value in values.items()}


def _heads(hidden_size: int, head_dim: int) -> int:
    check_sizes(head_dim=head_dim)
    if hidden_size % head_dim:
        raise ValueError(f"hidden_size {hidden_size} does not split into heads of width {head_dim}")
    return hidden_size // head_dim


def _width(base: int, expand: float) -> int:
    """base times expand; ValueError if that is no whole number of at least 1."""
    width = round(base * expand)
    if width < 1 or not math.isclose(width, base * expand, rel_tol=1e-6):
        raise ValueError(f"{base} expanded by {expand} is {base * expand:g}, not a whole width")
    return width


def _check_key_width(width: int) -> None:
    if width > LARGEST_KEY:
        raise ValueError(f"the delta rule's kernels take keys of {LARGEST_KEY} a head at most, not {width}")
