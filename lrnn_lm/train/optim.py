"""The optimizers by name, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..recipe.schema import OptimSection
from .muon import Muon


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups: `weight_decay` on matrices, none on vectors (norms, biases); each in exactly one.

    Embeddings count as matrices. A tied weight is listed once.
    """
    trained = [p for p in parameters if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, optim: OptimSection, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` names, fused on a GPU.

    Raises ValueError where Muon would see parts of matrices.
    """
    settings = {
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": optim.eps,
        "fused": True if device.type == "cuda" else None,
    }
    if optim.name == "adamw":
        return torch.optim.AdamW(decay_groups(model.parameters(), optim.weight_decay), **settings)
    matrices = layer_matrices(model)
    if any(isinstance(p, DTensor) for p, _ in matrices):
        raise ValueError(
            "optim.name=muon needs whole matrices on each rank and FSDP2 shards them: "
            "set train.parallel=ddp, or optim.name=adamw"
        )
    taken = {p for p, _ in matrices}
    others = decay_groups((p for p in model.parameters() if p not in taken), optim.weight_decay)
    return Muon(matrices, others, weight_decay=optim.weight_decay, **settings)


def layer_matrices(model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """The weights of the blocks' linear maps, each with the number of planes that it holds."""
    planes: dict[nn.Parameter, int] = {}
    for block in model.model.layers:
        named = block.mixer.planes().items()
        planes |= {block.mixer.get_parameter(name): number for name, number in named}
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    return [(w, planes.get(w, 1)) for w in weights if w.requires_grad]


def state_keys(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """Names of what the optimizer keeps of a parameter."""
    if isinstance(optimizer, Muon) and optimizer.is_matrix(parameter):
        return ("momentum",)
    return ("step", "exp_avg", "exp_avg_sq")


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
        decay = optim.decay.steps(total_steps, tokens_per_step)
        decay = max(1, min(decay, total_steps - warmup))  # both may have been rounded up
        share = min(1.0, max(0, total_steps - 1 - step) / decay)
    return optim.final_lr + (optim.lr - optim.final_lr) * share
