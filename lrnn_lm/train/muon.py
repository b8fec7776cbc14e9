"""Muon for the matrices of the layers, AdamW for everything else, as one optimizer.

A matrix moves by its momentum with all singular values brought near 1 (Jordan, "Muon", 2024), scaled by
0.2 sqrt(max(rows, columns)) so that an update has the size of AdamW's and one learning rate and weight decay
serve both (arXiv 2502.16982). torch.optim.Muon takes matrices one at a time; here all of one shape go through
the iteration as a batch (a step of 60 matrices is 15 launches for 900), and a projection to several planes is
one matrix a plane, as its planes are separate maps that only lie together in memory.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic iteration
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum over `matrices`, AdamW over `others`.

    Args:
        matrices: (parameter (rows, columns), planes) each; planes divides the rows.
        others: AdamW's parameter groups.
        lr, weight_decay: of the matrices; decoupled, as AdamW's.
        adamw: further settings of AdamW.
    """

    def __init__(
        self,
        matrices: list[tuple[nn.Parameter, int]],
        others: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        **adamw: Any,
    ):
        self._adamw = torch.optim.AdamW(others, lr=lr, **adamw)
        group = {"params": [p for p, _ in matrices], "weight_decay": weight_decay, "matrices": True}
        super().__init__([group], {**self._adamw.defaults, "matrices": False})
        self.param_groups += self._adamw.param_groups  # the same objects: a rate that is set reaches both
        self._adamw.state = self.state
        self._planes = dict(matrices)

    def is_matrix(self, parameter: nn.Parameter) -> bool:
        """Whether Muon moves it, not AdamW."""
        return parameter in self._planes

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        group = self.param_groups[0]
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum, planes = state["momentum"], self._planes[parameter]
            momentum.mul_(MOMENTUM).add_(parameter.grad)
            ahead = parameter.grad.add(momentum, alpha=MOMENTUM)
            rows = parameter.shape[0] // planes
            for i in range(planes):
                plane = slice(i * rows, (i + 1) * rows)
                by_shape[(rows, parameter.shape[1])].append((parameter[plane], ahead[plane]))
        if parameters:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for shape, pairs in by_shape.items():
            updates = orthogonalised(torch.stack([update for _, update in pairs]))
            scale = -group["lr"] * 0.2 * max(shape) ** 0.5
            torch._foreach_add_([target for target, _ in pairs], list(updates.unbind()), alpha=scale)
        self._adamw.step()


def orthogonalised(matrices: Tensor) -> Tensor:
    """(n, rows, columns) with singular values near 1 and the same singular vectors; in bf16 on a GPU, whose
    rounding is far below the iteration's own error (singular values end between 0.7 and 1.2)."""
    a, b, c = COEFFICIENTS
    dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
