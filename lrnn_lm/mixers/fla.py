"""The baselines through flash-linear-attention: DeltaNet, Gated DeltaNet, Gated DeltaProduct, GLA.

What they share, and where they run, is in `fla_layer.py`.

Legend: D model width, H heads, K key width of a head, V its value width, W kernel of a convolution, S state.
"""

import math
from typing import Any

from .base import MixerCost, check_sizes
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
    operations = 6  # recall (2), write (2), read (2)
    chunk_takes_fp32 = False

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


class GatedLinearAttention(FlaMixer):
    """GLA (Yang et al., arXiv 2312.06635): S_t = diag(a_t) S_{t-1} + k_t v_t^T, output gated.

    Args:
        hidden_size: D.
        num_heads: H.
        expand_k, expand_v: all heads' keys and values over D.
    """

    layer = "GatedLinearAttention"
    operations = 5  # decay, write (2), read (2)
    value_first = True

    def __init__(self, hidden_size: int, num_heads: int = 8, expand_k: float = 1.0, expand_v: float = 1.0):
        check_sizes(num_heads=num_heads)
        keys, values = _width(hidden_size, expand_k), _width(hidden_size, expand_v)
        super().__init__(
            hidden_size, keys, values, num_heads,
            expand_k=keys / hidden_size, expand_v=values / hidden_size,
        )  # fmt: skip


def _width(base: int, expand: float) -> int:
    """base times expand; ValueError if that is no whole number of at least 1."""
    width = round(base * expand)
    if width < 1 or not math.isclose(width, base * expand, rel_tol=1e-6):
        raise ValueError(f"{base} expanded by {expand} is {base * expand:g}, not a whole width")
    return width


def _check_key_width(width: int) -> None:
    if width > LARGEST_KEY:
        raise ValueError(f"the delta rule's kernels take keys of {LARGEST_KEY} a head at most, not {width}")
