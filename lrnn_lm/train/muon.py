"""Muon's momentum, and its orthogonalisation: bring a matrix's singular values near 1 (Jordan, "Muon", 2024).

The optimizer is in `optim.py`.
"""

from collections import Counter
from itertools import groupby

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic iteration
ITERATIONS = 5
MOMENTUM = 0.95


def orthogonalised(matrices: Tensor) -> Tensor:
    """(n, rows, columns) with the same singular vectors and singular values between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    # bf16's rounding is far below the iteration's own error.
    dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    # Row after row, as the parameters lie: to add tensors of other strides takes a launch each.
    return (x.mT if tall else x).to(matrices.dtype, memory_format=torch.contiguous_format)


def look_ahead(gradients: list[Tensor], momenta: list[Tensor]) -> list[Tensor]:
    """Take gradients into their momenta; returns the gradients with these momenta a step ahead (Nesterov)."""
    torch._foreach_mul_(momenta, MOMENTUM)
    torch._foreach_add_(momenta, gradients)
    return torch._foreach_add(gradients, momenta, alpha=MOMENTUM)


def runs_of(planes: list[int]) -> list[tuple[int, int, int]]:
    """Neighbouring planes of one shape: its rows, earlier runs of that shape, rows in all."""
    runs, seen = [], Counter()
    for rows, same in groupby(planes):
        runs.append((rows, seen[rows], rows * len([*same])))
        seen[rows] += 1
    return runs
