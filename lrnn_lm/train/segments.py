"""Exact gradients of rows that are longer than memory: backpropagation by segments (`train.segment`).

    forward, no graph    s_0 = () -> [segment 0] -> s_1 -> [segment 1] -> s_2 -> ..     keep all s_k
    backward, last to    recompute segment k from s_k with a graph; backward from its loss, and from s_{k+1}
    first segment        with dL/ds_{k+1}, which adds to the weights' gradients and gives dL/ds_k

The sum over segments is the gradient of the whole row; nothing is cut off. Memory: one segment's graph, the
states s_k and the token ids. Time: one more forward pass of all segments but the last.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..model import LRNNConfig
from ..model.carried import Boundary, CarriedStates, carries_gradients
from ..recipe import Recipe
from .sources import synthetic_task

Batch = dict[str, Tensor]


def check_segments(recipe: Recipe) -> None:
    """Raise ValueError, naming the mixer, for a model that cannot do what the recipe asks its states to."""
    data, train = recipe.data, recipe.train
    asked = {
        "train.segment": train.segment,
        "train.sequence_parallel": train.sequence_parallel if train.sequence_parallel > 1 else None,
        "data.rows_in_order": data.rows_in_order,
        "train.start_from_other": train.start_from_other or None,
    }
    key = next((key for key, value in asked.items() if value is not None), None)
    if key is None:
        return
    for spec in recipe.model.layer_pattern or [recipe.model.mixer]:
        if spec.type == "attention" and spec.window is None:
            raise ValueError(
                f"{key}: attention without a window keeps keys and values of all tokens before, so memory "
                f"grows with their number; give the attention layers a window, or leave {key} out"
            )
        if spec.type == "attention" and train.start_from_other:
            raise ValueError(
                "train.start_from_other: an attention layer would see another row's tokens in its window; "
                "take recurrent layers alone, or leave it out"
            )
        if key in ("train.segment", "train.sequence_parallel") and not carries_gradients(spec.type):
            raise ValueError(
                f"{key}: gradients through the state of {spec.type} are not supported; "
                f"take another mixer, or leave {key} out"
            )
    if train.sequence_parallel > 1 and (data.rows_in_order is not None or train.start_from_other):
        raise ValueError(
            "train.sequence_parallel: ranks that share a row carry no state to the next one; leave it out, "
            "or data.rows_in_order and train.start_from_other"
        )
    if train.ramp is not None and (data.rows_in_order is not None or train.start_from_other):
        key = "data.rows_in_order" if data.rows_in_order is not None else "train.start_from_other"
        raise ValueError(f"{key}: with train.ramp steps have other numbers of rows; leave one of them out")
    if data.source.type != "synthetic":
        return
    if data.rows_in_order is not None:
        raise ValueError(
            "data.rows_in_order: rows of a synthetic task do not follow one another; leave it out"
        )
    if synthetic_task(recipe).kind.head == "autoencoder":
        raise ValueError(
            f"{key}: task {data.source.task} reads a row into one vector, at its end; leave {key} out"
        )


def allow_graphs(config: LRNNConfig) -> None:
    """Let torch.compile make as many graphs of a block as segments need, beyond which it would not compile.

    For each kind of layer: with and without gradients, times with and without a state before; again where
    layers are recomputed, and for validation's last batch, of fewer rows.
    """
    kinds = {repr(sorted(spec.items())) for spec in config.layer_mixers}
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, 16 * len(kinds))


def split(batch: Batch, segment: int) -> list[Batch]:
    """A micro-batch's segments, in order."""
    parts = zip(*(tensor.split(segment, dim=1) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, tensors, strict=True)) for tensors in parts]


def backward_by_segments(
    forward: Callable[..., Any],
    loss_of: Callable[..., Tensor],
    config: LRNNConfig,
    parts: list[Batch],
    around: Callable[[bool], AbstractContextManager[None]],
    start: Boundary | None = None,
    keep_end: bool = False,
) -> tuple[Tensor, Boundary | None]:
    """Add a row's gradients to the parameters' and return its loss, without a graph.

    Args:
        forward: a pass without a loss, (part, CarriedStates) -> anything.
        loss_of: a pass with a loss, (part, CarriedStates) -> (); the row's loss is the sum over its parts.
        parts: the row's segments in order.
        around: entered around each pass with a backward; the argument says whether it is the row's last.
        start: what the row begins with, as a constant; None for nothing.
        keep_end: whether to return also what the row ends with; None otherwise.
    """
    boundaries = [boundary := start or Boundary(0, [()] * len(config.layer_mixers))]
    end = None
    with torch.no_grad():
        for part in parts[:-1]:
            states = CarriedStates(config, boundary)
            forward(part, states)
            boundaries.append(boundary := states.boundary())
    total: Tensor | float = 0.0
    passed: list[Tensor | None] = []  # dL/d(state after this segment), of each tensor of all layers in turn
    for part in reversed(parts):
        boundary = boundaries.pop()
        if boundaries:  # not for the row's start
            before = [tuple(state.requires_grad_() for state in layer) for layer in boundary.layers]
            boundary = replace(boundary, layers=before)
        states = CarriedStates(config, boundary)
        with around(not boundaries):
            loss = loss_of(part, states)
            ends = [(loss, None)]
            if passed:
                after = [state for layer in states.states for state in layer]
                ends += [pair for pair in zip(after, passed, strict=True) if pair[1] is not None]
            torch.autograd.backward(*map(list, zip(*ends, strict=True)))
        total = total + loss.detach()
        if keep_end and end is None:
            end = states.boundary()
        passed = [state.grad for layer in boundary.layers for state in layer]
    return total, end


@torch.no_grad()
def evaluate_by_segments(
    forward: Callable[..., Any],
    config: LRNNConfig,
    parts: list[Batch],
    return_logits: bool,
    states: Sequence[CarriedStates] | None = None,
) -> SimpleNamespace:
    """`loss`, the sum over a row's parts, and `logits` (B, T, V) or None, of passes without a graph.

    states: what each part begins with; None: what the one before carries.
    """
    states = states or [CarriedStates(config)] * len(parts)
    outputs = [forward(*each) for each in zip(parts, states, strict=True)]
    logits = torch.cat([each.logits for each in outputs], dim=1) if return_logits else None
    return SimpleNamespace(loss=torch.stack([each.loss for each in outputs]).sum(), logits=logits)
