"""AdamW with weight decay on matrices only, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from ..recipe.schema import OptimSection


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: `weight_decay` on matrices, none on vectors (norms, biases); each in exactly one.

    Embeddings count as matrices. A tied weight is listed once.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, optim: OptimSection, device: torch.device) -> torch.optim.AdamW:
    """AdamW over `decay_groups`, fused on a GPU."""
    return torch.optim.AdamW(
        decay_groups(model, optim.weight_decay),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True if device.type == "cuda" else None,
    )


def learning_rate(step: int, total_steps: int, tokens_per_step: int, optim: OptimSection) -> float:
    """The learning rate of optimiser step `step`, counted from 0.

    Linear warm-up to `lr`; then a cosine down to `final_lr` at the last step (cosine), a plateau and a linear
    decay to `final_lr` over the last `decay` (wsd), or `lr` for ever (constant).
    """
    warmup = optim.warmup.steps(total_steps, tokens_per_step)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "cosine":
        progress = (step - warmup) / max(1, total_steps - 1 - warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        decay = max(1, optim.decay.steps(total_steps, tokens_per_step))
        share = min(1.0, max(0, total_steps - 1 - step) / decay)
    return optim.final_lr + (optim.lr - optim.final_lr) * share
