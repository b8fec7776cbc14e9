"""The gate functions of `gates.py` in Triton, and what they pass back; tests compare the two for every gate.

Legend: z gate logits, f = f(z), S the row's normaliser, x what a gate multiplies, h the row's new state, s =
dL/dh.
"""

import triton
import triton.language as tl

from ..gates import EPS as _EPS
from ..triton_device import LOG2E, settle_cache_keys

EPS = tl.constexpr(_EPS)
INPUT_AT_ZERO = "softmax, input logit 0"  # GATE of gates without a plane for the input gate
FIXED = tl.constexpr(INPUT_AT_ZERO)


@triton.jit
def reciprocal(x):
    """1 / x for x > 0, to a relative 3e-7."""
    r = tl.rsqrt(x)  # two instructions; the division operator guards cases that cannot occur here
    return r * r


@triton.jit
def _sigmoid(z):
    return reciprocal(1.0 + tl.exp2(z * -LOG2E))


@triton.jit
def _tanh(z):
    e = tl.exp2(tl.abs(z) * (-2 * LOG2E))
    far = (1.0 - e) * reciprocal(1.0 + e)
    far = tl.where(z < 0, -far, far)
    # Near zero 1 - e cancels, so take the Taylor series there; its next term is 1e-9 z at |z| = 1/4.
    q = z * z
    near = z * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835)))))
    return tl.where(tl.abs(z) < 0.25, near, far)


@triton.jit
def gate_value(z, GATE: tl.constexpr):
    """f(z) of the L1 gates; softmax needs the whole row, see `coefficients`."""
    if GATE == "sigmoid":
        return _sigmoid(z)
    elif GATE == "relu":
        return tl.maximum(z, 0.0)
    elif GATE == "silu":
        return z * _sigmoid(z)
    elif GATE == "tanh":
        return _tanh(z)
    else:
        tl.static_assert(GATE == "identity" or GATE == "none")
        return z


@triton.jit
def logit_gradient(z, f, x, h, scaled, GATE: tl.constexpr):
    """dL/dz_k = s / S * f'(z_k) * (x_k - sign(f_k) h), with `scaled` = s / S; README.md derives it.

    softmax, also with a fixed input logit: f' = f and sign = 1. none: s x_k.
    """
    if GATE == "softmax" or GATE == FIXED:
        return scaled * f * (x - h)
    elif GATE == "none":
        return scaled * x
    elif GATE == "sigmoid":
        return scaled * f * (1.0 - f) * (x - h)
    elif GATE == "relu":
        return tl.where(z > 0, scaled * (x - h), 0.0)
    else:
        signed = tl.where(f > 0, h, tl.where(f < 0, -h, 0.0))
        if GATE == "silu":
            g = _sigmoid(z)
            return scaled * g * (1.0 + z * (1.0 - g)) * (x - signed)
        elif GATE == "tanh":
            return scaled * (1.0 - f * f) * (x - signed)
        else:
            return scaled * (x - signed)


settle_cache_keys(globals())
