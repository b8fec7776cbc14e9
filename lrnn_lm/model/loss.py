"""Cross-entropy straight from hidden states: the logits of a few tokens at a time, never of all of them.

The gradient of a chunk is computed while its logits are at hand (softmax minus one-hot), so the backward pass
is a multiplication. Peak memory is chunk x V instead of B T x V, at the same three matrix products.

Legend: B batch, T time, D model width, V vocabulary.
"""

import torch
from torch import Tensor

IGNORE = -100  # label of a position without a target


class _LinearCrossEntropy(torch.autograd.Function):
    """sum over tokens of -log softmax(W h)[label]."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, training: bool) -> Tensor:
        # hidden (B T, D), weight (V, D), labels (B T,); training: whether a backward pass may follow
        wanted = [training and needed for needed in ctx.needs_input_grad]
        dtype = torch.promote_types(hidden.dtype, torch.float32)  # fp64 for fp64 inputs, as in the scans
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h, label = hidden[part], labels[part]
            logits = (h @ weight.t()).to(dtype)
            valid = label != IGNORE
            target = label.where(valid, 0).unsqueeze(1)
            log_z = logits.logsumexp(dim=1)
            total += ((log_z - logits.gather(1, target).squeeze(1)) * valid).sum()
            if d_hidden is None and d_weight is None:
                continue
            d_logits = logits.sub_(log_z.unsqueeze(1)).exp_()
            d_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=d_logits.dtype))
            d_logits = d_logits.mul_(valid.unsqueeze(1)).to(h.dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.t() @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: Tensor | float | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Mean cross-entropy in nats of `softmax(hidden @ weight.T)` against labels.

    Args:
        hidden: (B, T, D).
        weight: (V, D).
        labels: (B, T) int64, aligned with hidden (already shifted); IGNORE where there is no target.
        num_items: what to divide the sum by; None for the number of valid labels here.
        chunk: tokens whose logits exist at once.
    Returns:
        a scalar in fp32 (fp64 for fp64 inputs).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    labels = labels.reshape(-1)
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.reshape(-1, hidden.shape[-1])
        total = _LinearCrossEntropy.apply(hidden, weight, labels, chunk, torch.is_grad_enabled())
    if num_items is None:
        num_items = (labels != IGNORE).sum().clamp_min(1)
    return total / num_items


def cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | float | None = None) -> Tensor:
    """The same from logits (B, T, V), where the head is no plain matrix (adapted, quantised)."""
    labels = labels.reshape(-1)
    logits = logits.reshape(labels.shape[0], -1).float()
    total = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / ((labels != IGNORE).sum().clamp_min(1) if num_items is None else num_items)


def shift_labels(labels: Tensor) -> Tensor:
    """Labels as transformers passes them (the inputs themselves), moved to where they are predicted."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
