"""What documents and padding mean for the layers: who may see whom, and where a sequence begins.

Legend: B batch, T new tokens, S tokens so far: those in the cache and the new ones.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from ..mixers.base import is_exported, is_traced
from ..mixers.spans import blocks_of_spans, mask_of_spans
from .cache import note_of
from .config import LRNNConfig
from .documents import before, document_starts

HIDDEN = -1e4  # a mask that is added hides what it lowers by at least so much


class Layout(NamedTuple):
    """Padding and documents of a batch; each None where there is nothing to tell.

    attention_mask: (B, S) bool, false on padding; (B, 1, T, S) as given, for attention alone.
    token_mask: (B, T) bool, false where a new token is padding.
    first: (B, T) bool, true on a sequence's first token where padding precedes it.
    starts: (B, T) bool, true where a document starts.
    """

    attention_mask: Tensor | None = None
    token_mask: Tensor | None = None
    first: Tensor | None = None
    starts: Tensor | None = None


def layout(
    tokens: Tensor,
    past: int | Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    reset: Tensor | None,
    packing: dict[str, Any],
    any_mask: bool,
) -> Layout:
    """What the model's arguments say of the batch `tokens` (B, T, ..) after `past` tokens in the cache.

    any_mask: whether all layers take any 4-d mask.

    Raises:
        ValueError: a mask that is none of 0 and 1, or of another shape; documents that contradict each other.
    """
    B, T = tokens.shape[:2]
    blocks = token_mask = first = None
    if attention_mask is not None and attention_mask.ndim == 4:
        fresh = isinstance(past, int) and past == 0 and not is_traced()
        read = _blocks(attention_mask, B, T) if fresh else None
        if read is None:
            _check_unread(reset, packing, any_mask)
            return Layout(attention_mask)
        attention_mask, blocks = read
    if attention_mask is not None:
        attention_mask, token_mask, first = padding(attention_mask, B, T, past)
    starts = document_starts(tokens, token_mask, past, position_ids, reset, packing, first, blocks)
    return Layout(attention_mask, token_mask, first, starts)


def padding(
    attention_mask: Tensor, B: int, T: int, past: int | Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`attention_mask`, `token_mask` and `first` of a Layout, from a mask (B, S), 0 on padding, else 1.

    A mask of the T new tokens alone will do if the cache holds what came before.
    """
    traced = is_traced()  # a graph has the masks always: it cannot depend on values
    fits = attention_mask.ndim == 2 and attention_mask.shape[0] == B
    if fits and not traced and not isinstance(past, Tensor):
        fits = attention_mask.shape[1] in (T, past + T)
    if not fits:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit {B} rows of {T} new tokens "
            f"after {past}: pass (rows, tokens so far), 0 on padding"
        )
    if not traced and bool((attention_mask == 1).all()):
        return None, None, None
    mask = attention_mask.bool()
    if not traced and not torch.equal(mask.to(attention_mask.dtype), attention_mask):
        raise ValueError(
            "attention_mask holds other numbers than 0 and 1; pass documents as seq_idx or reset"
        )
    new, earlier = mask[:, -T:], mask[:, :-T]
    token_mask = None if not traced and bool(new.all()) else new
    if not earlier.shape[1] and not isinstance(past, Tensor) and past:
        return mask, token_mask, None
    first = new & (new.cumsum(dim=1) == 1) & ~earlier.any(dim=1, keepdim=True)
    return mask, token_mask, first if traced or bool(first.any()) else None


def tokens_last(token_mask: Tensor, keep_state: bool) -> Tensor | None:
    """(B, T) where each token lies once the padding of its row is moved to the front, for recurrent layers.

    None where that is not needed: with padding in front already, or at the end of a state that nobody keeps.
    """
    if token_mask.shape[1] == 1:
        return None
    if not is_traced():
        ends = token_mask[:, :-1] & ~token_mask[:, 1:]
        if not keep_state:  # only what comes after the padding
            ends = ends.cumsum(dim=1).bool() & token_mask[:, 1:]
        if not bool(ends.any()):
            return None
    return token_mask.long().argsort(dim=1, stable=True)


def positions_of(
    attention_mask: Tensor | None,
    x: Tensor,
    past: int | Tensor,
    layer: Any = None,
    given: Tensor | None = None,
) -> Tensor:
    """(B or 1, T) the position of each new token of x (B, T, D): as given, or counted on from the last.

    Padding is not counted. layer: a cache layer of attention, which keeps how far the given positions were
    ahead of the count, as keys before are turned by them.
    """
    B, T, _ = x.shape
    step = T == 1 and (isinstance(past, Tensor) or past > 0)  # which goes on as the tokens before it
    if given is not None and (layer is None or step or is_exported()):
        return given
    if attention_mask is None or attention_mask.ndim == 4:
        count = (torch.arange(T, device=x.device) + past).unsqueeze(0)
        last = None
    else:
        count = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -T:]
        token = attention_mask[:, -T:].bool()
        last = token.long().cumsum(dim=1).argmax(dim=1, keepdim=True)  # (B, 1) each row's last token
    shift = None if layer is None else note_of(layer, "position_shift", past)
    if given is None:
        return count if shift is None else count + shift.unsqueeze(1)
    ahead = (given - count).expand(B, T)
    if last is None:
        layer.position_shift = ahead[:, -1]
    else:  # a row of padding alone keeps what it had
        before = ahead.new_zeros(B) if shift is None else shift
        layer.position_shift = torch.where(token.any(dim=1), ahead.gather(1, last).squeeze(1), before)
    return given


def check_padding(layer: Any, attention_mask: Tensor | None, T: int, past: int | Tensor) -> None:
    """Raise ValueError where an attention layer's keys hold padding that the mask (B, S) does not tell.

    The cache layer keeps whether it has seen padding.
    """
    if layer is None or isinstance(past, Tensor) or is_traced():
        return
    told = attention_mask is not None and attention_mask.shape[-1] == past + T
    if past and not told and (attention_mask is not None or (hasattr(layer, "padded") and layer.padded)):
        raise ValueError(
            f"there is padding, so attention layers need an attention_mask over all {past + T} tokens: "
            f"{past} in the cache and {T} new ones"
        )
    layer.padded = told


def _blocks(mask: Tensor, B: int, T: int) -> tuple[Tensor, Tensor] | None:
    """(B, T) whether a token is none of padding, and whether it begins a block, of a mask causal in blocks.

    None for any other mask (B or 1, heads or 1, T, S), and for one of another shape.
    """
    if mask.shape[2:] != (T, T) or mask.shape[0] not in (1, B):
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not (mask.is_floating_point() and bool((seen | (mask <= HIDDEN)).all())):
        return None
    token = seen[:, 0].diagonal(dim1=1, dim2=2)  # (B or 1, T): a token sees itself
    steps = torch.arange(T, device=mask.device)
    begins = token & (seen[:, 0].long().argmax(dim=-1) == steps)
    block = begins.cumsum(dim=1)
    want = (block.unsqueeze(2) == block.unsqueeze(1)) & (steps.unsqueeze(1) >= steps)
    want = want & token.unsqueeze(1)
    if not bool(((seen == want.unsqueeze(1)) | ~token[:, None, :, None]).all()):
        return None
    inner = before(token, token, torch.zeros_like(token))
    return token.expand(B, T).long(), (begins & inner).expand(B, T)


def _check_unread(reset: Tensor | None, packing: dict[str, Any], any_mask: bool) -> None:
    """Raise ValueError for a 4-d mask that is only attention's to read, beside what it cannot take in."""
    if not any_mask:
        raise ValueError(
            "recurrent layers and windows take a 4-d attention_mask only if it is causal within blocks "
            "(T x T, not under torch.compile); pass documents as reset, seq_idx or position_ids, padding as "
            "a mask (B, S)"
        )
    if reset is not None or any(value is not None for value in packing.values()):
        raise ValueError("a 4-d attention_mask tells who sees whom; give no documents beside it")


def attention_masks(
    config: LRNNConfig,
    x: Tensor,
    attention_mask: Tensor | None,
    starts: Tensor | None,
    cache: Cache | None,
    blocks: bool = False,
) -> tuple[dict[str, Any], Tensor | None]:
    """What the attention layers see, by their kind, and the order of a window's keys (None: as they are).

    A mask is (B, 1, T, S) in the form that the implementation takes, None where it is plainly causal, or a
    BlockMask.

    Args:
        x: (B, T, D) new tokens.
        attention_mask, starts: as in Layout.
        cache: what the tokens go on from.
        blocks: whether layers attend by blocks where there is nothing before x; in training with a cache too.
    """
    masks, order = {}, None
    eager = config._attn_implementation == "eager"
    for kind in sorted({*config.layer_types} - {"linear_attention"}):
        layer = None if cache is None else cache.layers[config.layer_types.index(kind)]
        window = config.sliding_window if kind == "sliding_attention" else None
        if attention_mask is not None and attention_mask.ndim == 4:
            masks[kind] = attention_mask
            continue
        if layer is not None and window is not None and not is_traced():
            for each, its in zip(cache.layers, config.layer_types, strict=True):
                if its == kind:
                    each.sliding_window = window  # a static layer may be shorter, and does not know
        spans = _spans(x, attention_mask, starts, layer, window)
        order = spans.order if window is not None else order
        if blocks and (layer is None or _is_new(layer)):
            shown = _spans(x, attention_mask, starts, None, window)
            masks[kind] = None if shown.causal else blocks_of_spans(shown.keys, shown.starts, x.shape[0])
        else:
            masks[kind] = _mask(spans, x.dtype if eager else None)
    return masks, order


def _is_new(layer: Any) -> bool:
    """Whether a cache layer is one that training makes: growing, and empty."""
    # Not without gradients: flex_attention would be compiled for the prompts of `generate`. Not in a graph
    # either: torch.compile makes none of flex_attention beside a new cache.
    if is_traced() or not torch.is_grad_enabled():
        return False
    return isinstance(layer, DynamicLayer) and not layer.get_seq_length()


class _Spans(NamedTuple):
    """Arguments of `mask_of_spans`, and whether the mask is plainly causal; order: see `attention_masks`."""

    keys: Tensor
    queries: Tensor
    starts: Tensor
    causal: bool
    order: Tensor | None


def _spans(
    x: Tensor, attention_mask: Tensor | None, starts: Tensor | None, layer: Any, window: int | None
) -> _Spans:
    """What each token of x sees, tokens counted within their row, padding aside.

    A cache layer keeps which of its row's tokens began the last document. One with a window keeps the last
    tokens of each row, padding before them.
    """
    T, past = x.shape[1], 0 if layer is None else layer.get_seq_length()
    counted = order = None
    if attention_mask is None:
        keys = queries = (torch.arange(T, device=x.device) + past).unsqueeze(0)
    else:
        counted = attention_mask.long().cumsum(dim=1)
        token = attention_mask[:, -T:].bool()
        queries = counted[:, -T:] - token.long()  # of padding: what the next token's will be
        keys = queries.masked_fill(~token, -1)
    if layer is not None:
        length, offset = layer.get_mask_sizes(T)  # of a static layer, all of its places
        if counted is None or window is not None:
            keys = torch.arange(offset, offset + length, device=x.device).unsqueeze(0)
        else:
            keys = (counted - 1).masked_fill(~attention_mask.bool(), -1)
            keys = torch.nn.functional.pad(keys, (0, length - keys.shape[1]), value=-1)
        if counted is not None and window is not None:
            keys = keys - (past + T - counted[:, -1:])
            order = _padding_first(token, queries[:, :1], length, layer)
    document = None if layer is None else note_of(layer, "document_start", past)
    document = None if document is None else document.unsqueeze(1)
    if starts is not None:
        begun = torch.where(starts, queries, 0).cummax(dim=1).values
        document = begun if document is None else torch.maximum(begun, document)
        if layer is not None:
            layer.document_start = document[:, -1]
    causal = attention_mask is None and document is None and not isinstance(layer, StaticLayer)
    if layer is not None or window is not None:
        causal = causal and not is_exported() and ((window or T) >= T if not past else T == 1)
    first = torch.zeros_like(queries) if window is None else (queries - window + 1).clamp_min(0)
    first = first if document is None else torch.maximum(first, document)
    return _Spans(keys, queries, first, causal, order)


def _mask(spans: _Spans, added: torch.dtype | None) -> Tensor | None:
    """(B, 1, T, S) bool, None if it is plainly causal; or to be added in this dtype."""
    if spans.causal and added is None:
        return None
    mask = mask_of_spans(spans.keys, spans.queries, spans.starts)
    if added is None:
        return mask
    return torch.zeros_like(mask, dtype=added).masked_fill(~mask, torch.finfo(added).min)


def _padding_first(token: Tensor, earlier: Tensor, length: int, layer: Any) -> Tensor | None:
    """(B, length) the order of a window's keys that puts padding first, so that the last tokens are kept.

    None where it is so already. token: (B, T) bool, false on new padding; earlier: (B, 1) tokens before.
    """
    begun = torch.cat([earlier > 0, token], dim=1)
    if not is_traced() and not bool((begun[:, :-1] & ~begun[:, 1:]).any()):
        return None
    if isinstance(layer, StaticLayer):
        if is_traced():
            return None
        raise ValueError("beside a window a static cache takes padding on the left only; use a dynamic cache")
    cached = length - token.shape[1]
    kept = torch.arange(cached, device=token.device) >= cached - earlier
    return torch.cat([kept, token], dim=1).long().argsort(dim=1, stable=True)
