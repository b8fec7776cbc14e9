"""Where the documents of a packed batch begin, from any of the arguments that libraries use for it.

`reset` is ours; `position_ids` that start again are those of TRL and transformers'
DataCollatorWithFlattening, `seq_idx` that of mamba_ssm, `cu_seq_lens_q` and its companions those of flash
attention. All become one mask, `reset`, which every kind of layer reads.

Legend: B batch, T time.
"""

import difflib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..mixers.base import is_traced

PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Read by transformers' own decorators; `cache_position`, of older releases, is what the cache counts itself.
# Beam search with stop strings passes its `tokenizer` on.
_TRANSFORMERS = ("output_hidden_states", "output_attentions", "return_dict", "cache_position", "tokenizer")
_NAMED = ("attention_mask", "position_ids", "past_key_values", "cache", "inputs_embeds", "labels", "reset",
          "shift_labels")  # fmt: skip


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for an argument that no layer reads, which would otherwise be ignored silently."""
    for name, value in kwargs.items():
        if value is None or name in PACKING or name in _TRANSFORMERS:
            continue
        if name == "is_causal" and value is True:
            continue
        if name == "token_type_ids" and not is_traced() and not bool(value.any()):
            continue  # a tokenizer's default: all tokens have type 0
        near = difflib.get_close_matches(name, (*_NAMED, *PACKING), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        raise ValueError(f"the model does not read the argument {name!r}; {hint}")


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The one that is given; ValueError unless it is one, of rows of at least one token."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    name, tokens, form = "input_ids", input_ids, "(rows, tokens)"
    if input_ids is None:
        name, tokens, form = "inputs_embeds", inputs_embeds, "(rows, tokens, hidden_size)"
    if not is_traced() and (tokens.ndim != form.count(",") + 1 or not tokens.shape[1]):
        raise ValueError(
            f"{name} of shape {tuple(tokens.shape)} must be {form}, with at least one token (BOS, if nothing)"
        )
    return tokens


def check_cache_position(cache_position: Tensor | None, T: int, past: int | Tensor) -> None:
    """Raise ValueError unless cache_position (T,) counts on from the `past` tokens in the cache."""
    if cache_position is None or is_traced():
        return
    if cache_position.flatten().tolist() != list(range(int(past), int(past) + T)):
        raise ValueError(
            f"cache_position must be {int(past)} .. {int(past) + T - 1}, the places of the new tokens after "
            "those in the cache; leave it out, and give positions as position_ids"
        )


def before(values: Tensor, token_mask: Tensor | None, start: Tensor) -> Tensor:
    """(B, T): `values` of the token before, padding skipped; `start` (B, T) where there is no such token."""
    if token_mask is None:
        return torch.cat([start[:, :1], values[:, :-1]], dim=1)
    steps = torch.arange(values.shape[1], device=values.device)
    last = torch.where(token_mask, steps, -1).cummax(dim=1).values
    last = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)  # (B, T) index of the token before
    return torch.where(last >= 0, values.gather(1, last.clamp_min(0)), start)


def document_starts(
    tokens: Tensor,
    token_mask: Tensor | None,
    past: int | Tensor,
    position_ids: Tensor | None,
    reset: Tensor | None,
    packing: dict[str, Any],
    first: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Tensor | None:
    """(B, T) bool, true where a document starts after another; None if no argument says so.

    Positions that do not grow (0 1 2 0 1, or 2 3 2 3) start a document; positions that jump ahead do not. A
    start on padding counts for the next token.

    Args:
        tokens: (B, T, ..) any tensor of the batch's shape and device.
        token_mask: (B, T) bool, false on padding; None if there is none.
        past: tokens in the cache.
        position_ids, reset: as the model takes them.
        packing: the model's other arguments, those of PACKING among them.
        first: (B, T) bool, true where a sequence begins after padding.
        blocks: (B, T) bool, the document starts of a 4-d attention_mask.
    Raises:
        ValueError: a wrong shape or dtype, or two arguments that contradict each other.
    """
    B, T = tokens.shape[:2]
    found: dict[str, Tensor] = {}
    if reset is not None:
        _check_shape("reset", reset, B, T)
        if reset.dtype != torch.bool:
            raise ValueError(f"reset is a bool mask, not {reset.dtype}")
        alone = token_mask is None or T == 1
        found["reset"] = (
            reset if alone else _starts(reset.cumsum(1), torch.zeros_like(reset).long(), token_mask)
        )
    if position_ids is not None:
        _check_shape("position_ids", position_ids, B, T)
        positions = position_ids.expand(B, T)
        _check_continuation(positions, token_mask, past, reset, first)
        if T > 1:  # the position of a lone token says nothing
            found["position_ids"] = _starts(positions, positions - 1, token_mask, torch.le)
    if packing.get("seq_idx") is not None:
        ids = packing["seq_idx"]
        _check_shape("seq_idx", ids, B, T)
        found["seq_idx"] = _starts(ids, ids, token_mask)
    for name, longest in (("cu_seq_lens_q", "max_length_q"), ("cu_seq_lens_k", "max_length_k")):
        if packing.get(name) is not None:
            ids = _from_offsets(name, packing[name], packing.get(longest), tokens)
            found[name] = _starts(ids, ids, token_mask)
        elif packing.get(longest) is not None:
            raise ValueError(f"{longest} says nothing without {name}; give both or neither")
    if blocks is not None:
        found["attention_mask"] = blocks
    return _agreed(found, token_mask)


def _starts(
    values: Tensor, start: Tensor, token_mask: Tensor | None, begins: Callable[..., Tensor] = torch.ne
) -> Tensor:
    """(B, T): begins(value, value of the token before); false on padding."""
    starts = begins(values, before(values, token_mask, start))
    return starts if token_mask is None else starts & token_mask


def _agreed(found: dict[str, Tensor], token_mask: Tensor | None) -> Tensor | None:
    """The document starts that all of `found` agree on; None if there are none."""
    # A `reset` that comes alone is not looked at, as that would synchronise training with the GPU.
    if not found or list(found) == ["reset"]:
        return found.get("reset")
    name, starts = next(iter(found.items()))
    if is_traced():
        for its in found.values():
            starts = starts | its
        return starts
    # A row's first token starts a document whether an argument says so or not, so it is not compared.
    nothing = torch.zeros_like(starts)
    inner = before(~nothing if token_mask is None else token_mask, token_mask, nothing)
    for other, its in found.items():
        if other != name and not torch.equal(starts & inner, its & inner):
            raise ValueError(
                f"{name} and {other} let documents begin at different places; pass only one of them"
            )
    return starts if bool(starts.any()) else None


def _check_shape(name: str, given: Tensor, B: int, T: int) -> None:
    rows = (B, 1) if name == "position_ids" else (B,)
    if given.ndim != 2 or given.shape[0] not in rows or given.shape[1] != T:
        raise ValueError(f"{name} of shape {tuple(given.shape)} does not fit inputs of shape ({B}, {T})")


def _check_continuation(
    positions: Tensor,
    token_mask: Tensor | None,
    past: int | Tensor,
    reset: Tensor | None,
    first: Tensor | None,
) -> None:
    """Raise ValueError if a row's first new token has position 0 and no reset, though its row has a past."""
    if isinstance(past, Tensor) or not past or is_traced():
        return
    if token_mask is None:
        again = torch.zeros_like(positions, dtype=torch.bool)
        again[:, 0] = positions[:, 0] == 0
    else:
        again = (positions == 0) & token_mask & (token_mask.cumsum(1) == 1)
    for known in (reset, first):
        again = again if known is None else again & ~known
    if bool(again.any()):
        raise ValueError(
            "position_ids begin again at 0 while the cache holds the tokens before: count on from them, or "
            "pass reset=True at the first token of a new document"
        )


def _from_offsets(name: str, offsets: Tensor, longest: Any, tokens: Tensor) -> Tensor:
    """(B, T): each token's document number, from the offsets of documents in B T tokens, and the end."""
    B, T = tokens.shape[:2]
    if not isinstance(offsets, Tensor) or offsets.ndim != 1 or offsets.shape[0] < 2:
        raise ValueError(f"{name} must be one row of offsets, from 0 to the number of tokens")
    if not is_traced():
        places = offsets.tolist()
        lengths = [b - a for a, b in pairwise(places)]
        if places[0] != 0 or places[-1] != B * T or min(lengths) < 0:
            told = f"{places[0]} .. {places[-1]}" if len(places) > 8 else places
            raise ValueError(f"{name} must grow from 0 to the {B * T} tokens of the batch, not {told}")
        if set(range(0, B * T, T)) - set(places):
            raise ValueError(f"{name} lets a document continue from one row of the batch to the next")
        if longest is not None and int(longest) < max(lengths):
            raise ValueError(
                f"a document of {name} has {max(lengths)} tokens, more than its max_length of {longest}"
            )
    starts = torch.zeros(B * T + 1, dtype=torch.long, device=tokens.device)
    starts[offsets.to(tokens.device, torch.long)] = 1
    return starts[:-1].cumsum(0).view(B, T)
