"""How gates start: the spread of their logits, and biases that make a gated recurrence slow.

With equal logits a row keeps 1 / (M+1) of its state a step and forgets within a few tokens, which Adam needs
a good part of a short run to undo. Log-spaced half-lives are the start of LRU, S5 and Mamba (arXiv
2303.06349, 2208.04933, 2312.00752).
"""

import torch
from torch import Tensor, nn

from ..kernels import check_gate
from .base import check_positive

MIXED = 0.02  # share of what is written that goes to the other rows of a block at the start


def gate_matrix(gate_proj: nn.Linear, gate_std: float | None) -> dict[str, Tensor]:
    """Initial values of `gate_proj.weight` that give logits of standard deviation gate_std; none if None."""
    # The input is normalised, so its square sums to its width. Logits with a spread of about 1 let a softmax
    # select from the start: near zero it averages all that it reads (docs/results/synthetic.md).
    if gate_std is None:
        return {}
    return {"gate_proj.weight": gate_std * gate_proj.in_features**-0.5 * torch.randn(gate_proj.weight.shape)}


def check_gates(
    gate: str,
    gate_std: float | None,
    half_life: tuple[float, float] | list[float] | None = None,
    input_logit: bool = True,
) -> None:
    """Raise ValueError for an unknown gate function, or a start of the gates that it cannot have."""
    check_gate(gate)
    if not input_logit and gate != "softmax":
        raise ValueError(f"input_logit: false needs gate softmax, not {gate!r}: leave one of the two out")
    check_positive(gate_std=gate_std)
    if half_life is None:
        return
    form = f"half_life is [shortest, longest] in tokens, as in [2, 512], not {half_life!r}"
    if not isinstance(half_life, list | tuple) or len(half_life) != 2:
        raise ValueError(form)
    check_positive(**{"half_life[0]": half_life[0], "half_life[1]": half_life[1]})
    if half_life[0] > half_life[1]:
        raise ValueError(form)
    if gate not in ("softmax", "sigmoid"):
        raise ValueError(f"half_life needs a gate that is never negative (softmax or sigmoid), not {gate!r}")


def gate_bias_of_half_lives(num_rows: int, block_size: int, half_life: tuple[float, float]) -> Tensor:
    """Biases (num_rows, M+1) of gate logits; rows of a block follow each other, the input gate is last.

    A row keeps 2^(-1/L) of itself a step, with L log-spaced over blocks from the shortest to the longest. Of
    the rest, a share of MIXED is read from the other rows of the block, and what remains from the input.
    """
    # Softmax gives p = exp(z) / sum, so z = log p; a sigmoid of values this low is nearly that.
    M = block_size
    shortest, longest = half_life
    blocks = num_rows // M
    steps = torch.logspace(0, 1, blocks, base=longest / shortest) * shortest if blocks > 1 else None
    lives = torch.full((1,), float(shortest)) if steps is None else steps
    kept = torch.exp2(-1 / lives).repeat_interleave(M)  # (rows,)
    others = (1 - kept) * (MIXED if M > 1 else 0.0)
    p = (others / max(1, M - 1)).view(-1, 1).repeat(1, M + 1)
    index = torch.arange(num_rows)
    p[index, index % M] = kept
    p[:, M] = 1 - kept - others
    return p.log()
