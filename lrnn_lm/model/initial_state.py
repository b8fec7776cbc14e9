"""A learnt state that documents begin with, in place of zeros (`model.learn_initial_state`).

The scans begin a document inside a row with zeros. So rows are cut where any of them starts a document, and
the pieces are scanned one after another.

Legend: B batch, T time, D model width, E numbers of one sequence's state.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..mixers.base import Mixer, SequenceContext, by_documents


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
    whole = replace(context, reset=None, keep_state=True)
    begins = initial_states(state, initial)
    return by_documents(lambda *part: mixer(*part, whole), x, state, context.reset, begins)


def initial_states(like: Tensor, initial: Tensor) -> Tensor:
    """`initial` (E,) for each sequence of a state `like` (B, ..), in its shape and dtype."""
    return initial.to(like.dtype).view(1, *like.shape[1:]).expand_as(like).contiguous()
