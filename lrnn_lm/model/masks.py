"""What documents and padding mean for the layers: who may see whom, and where a sequence begins.

Legend: B batch, T time.
"""

from typing import Any

import torch
from torch import Tensor

from .cache import document_start


def same_document(reset: Tensor | None, layer: Any, past: int | Tensor, x: Tensor) -> Any:
    """A mask function, query and key lie in the same document; None if there is only one.

    The cache layer keeps where its last document began: keys before that are of no document that goes on.
    """
    # A static cache tells its length by a tensor, on whose value a graph must not depend.
    start = document_start(layer) if isinstance(past, Tensor) or past else None  # (B,)
    if reset is None and start is None:
        return None
    B, T, _ = x.shape
    keys = torch.arange(past + T, device=x.device)  # (past + T,)
    new = torch.zeros(B, past + T, dtype=torch.long, device=x.device)
    if reset is not None:
        new[:, past:] = reset.long().cumsum(dim=1)
    document = new if start is None else new - (keys < start.unsqueeze(1)).long()  # (B, past + T)
    if layer is not None and reset is not None:
        began = torch.where(new[:, past:].any(dim=1), (document != document[:, -1:]).sum(dim=1), 0)
        layer.document_start = began if start is None else torch.maximum(began, start)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document[batch, query] == document[batch, key]

    return visible


def padding(attention_mask: Tensor | None, T: int, past: int) -> tuple[Tensor | None, Tensor | None]:
    """What padding means for recurrent layers.

    Returns:
        token_mask (B, T, 1) bool over the new tokens, false on padding, and first (B, T) bool, true on a
        sequence's first token where padding precedes it; each None where there is nothing to tell.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None, None
    traced = torch.compiler.is_compiling()  # a graph has the masks always: it cannot depend on values
    if not traced and bool(attention_mask.all()):
        return None, None
    mask = attention_mask.bool()
    new, earlier = mask[:, -T:], mask[:, :-T]
    token_mask = None if not traced and bool(new.all()) else new.unsqueeze(-1)
    if not earlier.shape[1] and past:  # a mask of the new tokens alone: the cache holds what came before
        return token_mask, None
    first = new & (new.cumsum(dim=1) == 1) & ~earlier.any(dim=1, keepdim=True)
    return token_mask, first if traced or bool(first.any()) else None
