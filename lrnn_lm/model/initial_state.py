"""A learnt state that documents begin with, in place of zeros (`model.learn_initial_state`).

The scans begin a document inside a row with zeros. So rows are cut where any of them starts a document, and
the pieces are scanned one after another: exact for every mixer, and as many scans as there are cuts.

Legend: B batch, T time, D model width, E numbers of one sequence's state.
"""

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from ..mixers.base import Mixer, SequenceContext, is_exported


def mix(
    mixer: Mixer, x: Tensor, state: Tensor | None, context: SequenceContext, initial: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`mixer(x, state, context)`, with `initial` (E,) where a document begins; None: zeros, as mixers do."""
    if initial is None:
        return mixer(x, state, context)
    if state is None:
        with torch.no_grad():  # only the mixer knows its state's shape and dtype
            _, empty = mixer(x[:, :1], None, SequenceContext())
        state = initial_states(empty, initial)
    if context.reset is None:
        return mixer(x, state, context)
    began = context.reset[:, 0].view(-1, *[1] * (state.ndim - 1))
    state = torch.where(began, initial_states(state, initial), state)
    if x.shape[1] == 1:
        return mixer(x, state, replace(context, reset=None))
    return _mix_pieces(mixer, x, state, context, initial)


def initial_states(like: Tensor, initial: Tensor) -> Tensor:
    """`initial` (E,) for each sequence of a state `like` (B, ..), in its shape and dtype."""
    return initial.to(like.dtype).view(1, *like.shape[1:]).expand_as(like).contiguous()


def _mix_pieces(
    mixer: Mixer, x: Tensor, state: Tensor, context: SequenceContext, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """The pieces between document starts after the first token, whose states `state` (B, ..) are right."""
    T = x.shape[1]
    starts = range(1, T) if is_exported() else _starts(context.reset)  # a graph cannot depend on where
    whole = replace(context, reset=None)
    y = []
    for begin, end in itertools.pairwise([0, *starts, T]):
        if begin:
            began = context.reset[:, begin].view(-1, *[1] * (state.ndim - 1))
            state = torch.where(began, initial_states(state, initial), state)
        last = end == T
        part, state = mixer(x[:, begin:end], state, whole if last else replace(whole, keep_state=True))
        y.append(part)
    return torch.cat(y, dim=1), state


@torch.compiler.disable
def _starts(reset: Tensor) -> list[int]:
    """At which tokens after the first any row (B, T) starts a document."""
    return (reset[:, 1:].any(dim=0).nonzero().squeeze(1) + 1).tolist()
