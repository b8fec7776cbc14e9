"""Biases that make a gated recurrence slow at the start: half-lives spread evenly in the logarithm.

With equal logits a row keeps 1 / (M+1) of its state a step and forgets within a few tokens; Adam needs a
good part of a short run to undo that. Log-spaced half-lives are the start of LRU, S5 and Mamba
(arXiv 2303.06349, 2208.04933, 2312.00752).
"""

import torch
from torch import Tensor

MIXED = 0.02  # share of what is written that goes to the other rows of a block at the start


def check_half_life(half_life: tuple[float, float] | list[float] | None, gate: str) -> None:
    """Raise ValueError for a range of half-lives that is none, or a gate that has no such start."""
    if half_life is None:
        return
    if len(half_life) != 2 or not 0 < half_life[0] <= half_life[1]:
        raise ValueError(f"half_life is [shortest, longest] in tokens, as in [2, 512], not {list(half_life)}")
    if gate not in ("softmax", "sigmoid"):
        raise ValueError(f"half_life needs a gate that is never negative (softmax or sigmoid), not {gate!r}")


def gate_bias_of_half_lives(num_rows: int, block_size: int, half_life: tuple[float, float]) -> Tensor:
    """Biases (num_rows, M+1) of gate logits; rows of a block follow each other, the input gate is last.

    Row r keeps 2^(-1/L_r) of itself a step, with L_r log-spaced over blocks from the shortest to the
    longest: rows of a block share theirs. Of the rest, MIXED goes to the block's other rows and what remains
    is written. Softmax gives p = exp(z) / sum, so z = log p; a sigmoid of values this low is nearly that.
    """
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
