"""Which derivatives the scans have, and where the loops of `reference.py` take the place of the fast ones.

The fast scans are operators with a backward pass of their own, so torch knows their first derivatives in
reverse mode and no others: forward mode would take them for constants, and torch.func cannot look inside. The
loops are made of torch's own operators, which have every derivative.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

_written_out = [False]


@contextmanager
def written_out() -> Iterator[None]:
    """Inside, backend `auto` is the reference, and the loss is computed from all logits: slow, but made of
    torch's own operators. For derivatives of derivatives, and for graphs that run elsewhere."""
    before, _written_out[0] = _written_out[0], True
    try:
        yield
    finally:
        _written_out[0] = before


def is_written_out() -> bool:
    """Inside `written_out`, or where a transform needs it."""
    return _written_out[0] or is_transformed()


def is_transformed() -> bool:
    """Inside a transform of torch.func (grad, vmap, jvp, ..) or a level of torch.autograd.forward_ad."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def check_transforms(backend: str) -> None:
    """Raise ValueError for a backend, asked for by name, whose derivative a transform would not see."""
    if is_transformed():
        raise ValueError(
            f"backend {backend!r} cannot run inside torch.func's transforms or forward-mode derivatives: "
            "take 'auto' or 'reference'"
        )


def no_second_derivatives(what: str) -> NoReturn:
    """Raise RuntimeError: `what` was differentiated, and then its derivative."""
    raise RuntimeError(
        f"{what} no second derivatives: run the forward pass within `with lrnn_lm.kernels.written_out():`, "
        "slow loops and a loss of all logits that have them (or a scan with backend='reference')"
    )


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The `setup_context` of an operator whose backward pass needs its input tensors and nothing else."""
    ctx.save_for_backward(*(x for x in inputs if x is None or isinstance(x, torch.Tensor)))


def differentiable_once(backward: Any) -> None:
    """Make the operator that is a scan's backward pass say so when it is differentiated itself."""

    def refuse(ctx: Any, *_: Any) -> NoReturn:
        no_second_derivatives("the fast scans have")

    backward.register_autograd(refuse)
