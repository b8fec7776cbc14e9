"""Cross-entropy straight from hidden states: the logits of a few tokens at a time, never of all of them.

The gradient of a chunk is computed while its logits are at hand (softmax minus one-hot), so the backward pass
is a multiplication. Peak memory is chunk x V instead of B T x V, at the same three matrix products.

Legend: B batch, T time, D model width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import is_written_out, no_second_derivatives
from ..kernels.dispatch import has_triton, own_dtypes
from ..mixers.base import compute_dtype, is_traced, plain_weight

IGNORE = -100  # label of a position without a target


CACHED_LOGITS = 1 << 20  # of a chunk on a CPU: what stays in its caches


def _by_operators(logits: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (t, V) with a target: summed nats (), the sum () of log^2 Z, and the gradient of
    nats + z_loss squares (without z_loss: softmax minus one-hot).

    Few operators of torch: one exponential a logit, softmax's, a row at a time in cache.
    """
    x = logits.float() if logits.dtype != torch.float64 else logits
    valid = labels != IGNORE
    target = labels.where(valid, 0).unsqueeze(1)
    p = x.softmax(dim=1)
    log_z = x.amax(dim=1) - p.amax(dim=1).log()  # the largest is at least 1 / V: its logarithm is exact
    nats = ((log_z - x.gather(1, target).squeeze(1)) * valid).sum()
    squares = (log_z.square() * valid).sum()
    if z_loss:
        p *= (1 + 2 * z_loss * log_z).unsqueeze(1)  # d log Z / d logit is softmax
    p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
    if logits.device.type == "cpu" and type(logits) is Tensor and not torch.compiler.is_compiling():
        # Few rows; on a GPU nonzero() would wait for the device. A fake tensor has no numbers to look for.
        p.index_fill_(0, (~valid).nonzero().squeeze(1), 0)
    else:
        p.masked_fill_(~valid.unsqueeze(1), 0)
    return nats, squares, p.to(logits.dtype)


def _sums_and_gradient(logits: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same; on a GPU, where passes over the logits are the cost, by a kernel that overwrites them."""
    fused = logits.is_cuda and logits.dtype != torch.float64 and not torch.compiler.is_compiling()
    if not fused or not has_triton():
        return _by_operators(logits, labels, z_loss)
    from ..kernels.cross_entropy import nats_and_squares_in_place  # triton is imported only where it runs

    return *nats_and_squares_in_place(logits, labels, IGNORE, z_loss), logits


def _sums(logits: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Of logits (t, V): summed nats () and z_loss times the sum () of log^2 Z."""
    nats = functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    if not z_loss:
        return nats, torch.zeros_like(nats)
    return nats, z_loss * (logits.logsumexp(1).square() * (labels != IGNORE)).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log softmax(W h)[label] + z_loss log^2 Z; and of its second part alone, for
    logs. Z = sum of exp(W h)."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, training: bool, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        # hidden (B T, D), weight (V, D), labels (B T,); training: whether a backward pass may follow
        wanted = [training and needed for needed in ctx.needs_input_grad]
        dtype = torch.promote_types(hidden.dtype, torch.float32)  # fp64 for fp64 inputs, as in the scans
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        z_total = torch.zeros((), dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        fused = hidden.is_cuda and dtype == torch.float32 and not torch.compiler.is_compiling()
        w = weight.to(hidden.dtype)
        for start in range(0, hidden.shape[0], chunk):
            h, label = hidden[start : start + chunk], labels[start : start + chunk]
            logits = h @ w.t()
            if d_hidden is None and d_weight is None:
                nats, squares = _sums(logits.to(dtype), label, z_loss)
                total += nats
                z_total += squares
                continue
            nats, squares, d_logits = _sums_and_gradient(logits, label, z_loss)
            total += nats
            if z_loss:
                z_total += z_loss * squares
            if d_hidden is not None:
                d_hidden[start : start + chunk] = d_logits @ w
            if d_weight is None:
                continue
            if d_logits.dtype == dtype:
                d_weight.addmm_(d_logits.t(), h)
            elif fused:  # summed in fp32 inside the product; torch 2.11 cannot compile that
                torch.addmm(d_weight, d_logits.t(), h, out_dtype=dtype, out=d_weight)
            else:
                d_weight += d_logits.t() @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(z_total)
        return total + z_total, z_total

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # With create_graph=True: these are constants to autograd, so it would go wrong.
        if torch.is_grad_enabled():
            no_second_derivatives("the chunked loss has")
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


def loss_and_z(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: Tensor | float | None = None,
    chunk: int = 1024,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats of `softmax(hidden @ weight.T)` plus the z-loss; and the latter alone.

    The z-loss is `z_loss` times the mean of log^2 Z, with Z a token's softmax normaliser: it keeps log Z near
    0 (PaLM, arXiv 2204.02311). Alone it has no gradient.

    Args:
        hidden: (B, T, D).
        weight: (V, D).
        labels: (B, T) int64, aligned with hidden (already shifted); IGNORE where there is no target.
        num_items: what to divide the sum by (0: as 1); None for the number of valid labels here.
        chunk: tokens whose logits exist at once, at most.
    Returns:
        scalars in fp32 (fp64 for fp64 inputs).
    """
    hidden = hidden.to(compute_dtype(hidden))  # the weight keeps its dtype: so does its gradient
    if hidden.device.type == "cpu":
        chunk = min(chunk, max(128, CACHED_LOGITS // weight.shape[0]))
    check_labels(labels, hidden)
    labels = labels.reshape(-1).long()
    with own_dtypes(hidden):
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if is_written_out():
            logits = hidden @ weight.to(hidden.dtype).t()
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total, z_total = _sums(logits, labels, z_loss)
            total, z_total = total + z_total, z_total.detach()
        else:
            training = torch.is_grad_enabled()
            total, z_total = _LinearCrossEntropy.apply(hidden, weight, labels, chunk, training, z_loss)
    divisor = _divisor(labels, num_items)
    return total / divisor, z_total / divisor


def head_loss(
    model: nn.Module, hidden: Tensor, labels: Tensor, num_items: Tensor | float | None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """`loss_and_z` of a model's head; in chunks where it is a plain matrix, else of its logits, without z."""
    head, weight = model.lm_head, plain_weight(model.lm_head)
    if weight is not None and head.bias is None:
        return loss_and_z(hidden, weight, labels, num_items, model.config.loss_chunk, z_loss)
    if z_loss:
        raise ValueError("z_loss needs a head that is a plain matrix: leave it out for another head")
    return cross_entropy(head(hidden), labels, num_items), None


def cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | float | None = None) -> Tensor:
    """The same from logits (B, T, V), where the head is no plain matrix (adapted, quantised)."""
    check_labels(labels, logits)
    labels = labels.reshape(-1).long()
    logits = logits.reshape(labels.shape[0], -1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / _divisor(labels, num_items)


def _divisor(labels: Tensor, num_items: Tensor | float | None) -> Tensor | float:
    """What a summed loss is divided by; 1 for no targets, as 0 / 0 would make all weights NaN."""
    count = (labels != IGNORE).sum() if num_items is None else num_items
    return count + (count == 0)  # not `if`: a GPU would have to be waited for


def check_labels(labels: Tensor, tokens: Tensor) -> None:
    """Raise ValueError for labels that are not one whole number for each of `tokens` (B, T, ..)."""
    if labels.shape != tokens.shape[:2]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit inputs of shape {tuple(tokens.shape[:2])}: "
            f"pass one label a token, {IGNORE} where there is none"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are whole numbers, not {labels.dtype}")


def shift_labels(labels: Tensor, starts: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
    """Labels as transformers passes them (the inputs themselves), moved to where they are predicted.

    Args:
        labels: (B, T).
        starts: (B, T) bool, true where a document starts: nothing before it predicts that token.
        token_mask: (B, T) bool, false on padding: what comes after it is predicted by the token before it.
    """
    if token_mask is None:
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        return (
            targets if starts is None else targets.masked_fill(functional.pad(starts[:, 1:], (0, 1)), IGNORE)
        )
    T = labels.shape[1]
    steps = torch.arange(T, device=labels.device)
    # The next token of each: the last column stands for none.
    following = torch.where(token_mask, steps, T).flip(1).cummin(dim=1).values.flip(1)
    following = functional.pad(following[:, 1:], (0, 1), value=T)
    targets = functional.pad(labels, (0, 1), value=IGNORE).gather(1, following)
    nothing = ~token_mask
    if starts is not None:
        nothing = nothing | functional.pad(starts, (0, 1)).gather(1, following)
    return targets.masked_fill(nothing, IGNORE)


def counted_targets(
    labels: Tensor, targets: Tensor, num_items: Tensor | float | None
) -> Tensor | float | None:
    """What a sum over `targets` is divided by, given the Trainer's count of all labels but each row's first.

    It counts a row's first token where padding comes before it, which nothing predicts. In one batch that is
    told by comparing; over several batches it cannot be put right, for the others are not known here. A
    number below the batch's own count is no count of labels, and is taken as it is.

    Raises:
        ValueError: such tokens in one of several accumulated batches.
    """
    if num_items is None:
        return None
    claimed, true = (labels[:, 1:] != IGNORE).sum(), (targets != IGNORE).sum()
    if is_traced():
        return torch.where(torch.as_tensor(num_items, device=claimed.device) == claimed, true, num_items)
    if bool(claimed == true):
        return num_items
    given = torch.as_tensor(num_items, device=claimed.device)
    if bool((given == claimed).all()):
        return true.clamp_min(1)
    if bool((given < claimed).all()):
        return num_items
    raise ValueError(
        f"num_items_in_batch counts {int(claimed - true)} labels that nothing predicts (first tokens after "
        "padding or of a document): pad on the right (tokenizer.padding_side = 'right') or label them -100"
    )
