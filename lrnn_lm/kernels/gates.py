"""Gate functions: the one table that every scan, kernel and mixer reads.

A gate function turns a row of K logits into K coefficients whose absolute values sum to at most 1. That
bounds the state (Prop. 1 of arXiv 2602.12021).

    softmax     p = exp(z) / sum exp(z)
    f           p = f(z) / (sum |f(z)| + EPS),   f in {sigmoid, relu, silu, tanh, identity}
    none        p = z, unnormalised: for ablation only, the state is not bounded

silu, tanh and identity keep the sign of f, so the transition may have negative and complex eigenvalues.

Legend: z gate logits, f = f(z), S = sum |f| + EPS the row's normaliser, p the coefficients.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6  # keeps a row of zeros (relu of negative logits) at zero instead of 0 / 0


class GateFunction(NamedTuple):
    """An L1 gate's function and its derivative, both elementwise."""

    f: Callable[[Tensor], Tensor]
    df: Callable[[Tensor], Tensor]


def _d_sigmoid(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


def _d_silu(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


L1_GATES: dict[str, GateFunction] = {
    "sigmoid": GateFunction(torch.sigmoid, _d_sigmoid),
    "relu": GateFunction(torch.relu, lambda z: (z > 0).to(z.dtype)),
    "silu": GateFunction(torch.nn.functional.silu, _d_silu),
    "tanh": GateFunction(torch.tanh, lambda z: 1 - torch.tanh(z).square()),
    "identity": GateFunction(lambda z: z, torch.ones_like),
}

GATES: tuple[str, ...] = ("softmax", *L1_GATES, "none")


def check_gate(gate: str) -> None:
    """Raise ValueError, naming the known gates, if `gate` is not one of them."""
    if gate not in GATES:
        raise ValueError(f"unknown gate {gate!r}; known: {', '.join(GATES)}")


def normalise(z: Tensor, gate: str, dim: int = -1) -> Tensor:
    """Coefficients of a row of logits, differentiable by autograd.

    Args:
        z: (..., K, ...) logits, in the dtype to compute in (fp32 or fp64).
        gate: a name in GATES.
        dim: the axis that holds a row.
    Returns:
        Coefficients p, shaped as z; sum |p| <= 1 along `dim` unless gate is "none".
    """
    check_gate(gate)
    if gate == "softmax":
        return torch.softmax(z, dim=dim)
    if gate == "none":
        return z
    fz = L1_GATES[gate].f(z)
    return fz / (fz.abs().sum(dim=dim, keepdim=True) + EPS)
