"""Recurrent states in transformers' own cache: their length, and what can be done with them as a whole.

A cache layer of type `linear_attention` holds a state of constant size and counts nothing, while `generate`
asks a cache for its length (to continue from it, or to cut the inputs to the new tokens). So the count is
kept on the first layer, where every view of the cache finds it, and `RecurrentCache` answers with it. Beside
attention, whose keys are counted anyway, it is not kept.

What is done with states as values, saving and copying, is in states.py.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..mixers.base import is_exported, is_traced
from .config import LRNNConfig

# What transformers calls a cache in arguments and outputs; the latter before 5.24. Our models take both.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
# The arguments of a pass that `generate` makes up itself; with others it is not its usual pass.
GENERATED = {CACHE, "use_cache", "attention_mask", "position_ids", "cache_position", "logits_to_keep"}
_REMEDY = "use DynamicCache(config=model.config), or no cache to start from the beginning"
# What an attention layer keeps of each row beside keys and values, (B,): where its last document began, and
# how far its positions are ahead of the count of its tokens.
NOTES = ("document_start", "position_shift")


class _Rows:
    """What a cache does with its rows, of which states, keys, values and `NOTES` must move together."""

    layers: list[Any]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        if any(not is_recurrent(layer) for layer in self.layers):
            return super().get_seq_length(layer_idx)
        return tokens_seen(self)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make of each row `repeats` rows, next to each other."""
        self._move("batch_repeat_interleave", repeats, lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self._move("batch_select_indices", indices, lambda x: x[indices.to(x.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same for beam search."""
        self._move_notes(lambda note: note[beam_idx.to(note.device)])
        super().reorder_cache(beam_idx)

    def _move(self, method: str, rows: Any, move: Any) -> None:
        """Move rows of states and notes with `move`, of keys and values by their layer's method."""
        for layer in self.layers:
            if is_recurrent(layer):
                states = layer.recurrent_states.items()
                layer.recurrent_states = {i: None if s is None else move(s) for i, s in states}
            else:
                getattr(layer, method)(rows)
        self._move_notes(move)

    def _move_notes(self, move: Any) -> None:
        for layer in self.layers:
            for name, note in notes_of(layer).items():
                setattr(layer, name, move(note))

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers' for attention to all tokens; else a ValueError: a state cannot be cut back, nor
        packed rows to a document before their last."""
        if {*map(_kind, self.layers)} <= {"full_attention"}:
            left = tokens_to_remove + (int(tokens_seen(self)) if tokens_to_remove <= 0 else 0)
            starts = [layer.document_start for layer in self.layers if "document_start" in notes_of(layer)]
            padded = any(hasattr(layer, "padded") and layer.padded for layer in self.layers)
            if starts and (padded or any(bool((start > left).any()) for start in starts)):
                raise ValueError(
                    "packed rows cannot be cut back to before the last document; "
                    "keep a copy with lrnn_lm.model.copy_states"
                )
            return super().crop(tokens_to_remove)
        raise ValueError(
            "a recurrent state or a window cannot be cut back to an earlier token; "
            "keep a copy with lrnn_lm.model.copy_states"
        )


class RecurrentCache(_Rows, DynamicCache):
    """A DynamicCache that can tell its length though none of its layers keeps keys and values.

    private: whether `generate` made it for itself, so that nobody looks at it after.
    """

    private = False

    @property
    def is_linear(self) -> list[bool]:
        """Whether each layer is recurrent; of nothing but recurrent layers, all false.

        From transformers 5.24 on `generate` would not ask such a cache how much it has read, to drop that.
        """
        kinds = super().is_linear
        return [False] * len(kinds) if all(kinds) else kinds


class _StaticRows(_Rows, StaticCache):
    """A StaticCache whose notes move with its rows."""


_ADOPTED = {DynamicCache: RecurrentCache, StaticCache: _StaticRows}


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache that a model was given, by either of its names.

    Raises ValueError for two caches, as of PEFT's prefix beside a cache of the caller's.
    """
    if past_key_values is None or cache is None or past_key_values is cache:
        return cache if past_key_values is None else past_key_values
    raise ValueError(
        "past_key_values and cache are two names of the same argument, and these are two caches; pass one "
        "of them (a PEFT adapter with a prefix makes its own: pass none beside it)"
    )


def adopt(cache: Cache, noted: bool = True) -> None:
    """Make a caller's cache move notes with rows, which transformers' classes know nothing of.

    noted: whether the pass may write notes. Only then is a graph broken for it.
    """
    if type(cache) in _ADOPTED and not is_exported() and (noted or not is_traced()):
        _adopt(cache)


@torch.compiler.disable
def _adopt(cache: Cache) -> None:
    cache.__class__ = _ADOPTED[type(cache)]


def make_cache(config: LRNNConfig, cache: Cache | None = None) -> RecurrentCache:
    """A cache for a model: a new one, or a view of a given one that shares its layers."""
    view = RecurrentCache(config=config)
    if cache is not None:
        view.layers = cache.layers
    return view


def check_cache(config: LRNNConfig, cache: Any) -> None:
    """Raise ValueError if a cache has not one layer of the right kind for each of the model's.

    States of two mixers may be alike in size (H-LRU of order 4, BD-LRU of blocks of 4), so a layer that has
    one also keeps whose it is.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise ValueError(f"past_key_values is a {type(cache).__name__}, not a cache; {_REMEDY}")
    kinds = [_kind(layer) for layer in cache.layers]
    if kinds != config.layer_types:
        keys = "linear_attention" in config.layer_types and "linear_attention" not in kinds
        hint = " (recurrent layers take no keys and values, as prefix tuning makes them)" if keys else ""
        raise ValueError(
            f"past_key_values does not fit this model's {len(config.layer_types)} layers{hint}; {_REMEDY}"
        )
    for layer, spec in zip(cache.layers, config.layer_mixers, strict=True):
        if (found := window_of(layer)) is not None and found != spec["window"]:
            raise ValueError(
                f"past_key_values is of another model: a layer keeps a window of {found} tokens where this "
                f"model has {spec['window']}; {_REMEDY}"
            )
        if (found := state_mixer(layer)) is not None and found != spec["type"]:
            raise ValueError(
                f"past_key_values is of another model: a layer's state is of {found} where this model has "
                f"{spec['type']}; {_REMEDY}"
            )


def check_state(state: Any, batch_size: int, elements: int) -> None:
    """Raise ValueError if a layer's state is not one of this many sequences and this size.

    Args:
        state: as `layer_state` returns it.
        batch_size: sequences of the input.
        elements: numbers a sequence: of the whole state, or of one token's key and value.
    """
    if state is None:
        return
    if isinstance(state, Tensor):
        rows, size = state.shape[0], state.shape[1:].numel()
    elif state.is_initialized and isinstance(state.keys, Tensor) and state.keys.ndim == 4:
        rows, size = state.keys.shape[0], 2 * state.keys.shape[1] * state.keys.shape[3]
    else:
        return
    if size != elements:
        raise ValueError(
            f"past_key_values is of another model: a layer's state has {size} numbers where this model has "
            f"{elements}; {_REMEDY}"
        )
    if rows != batch_size:
        raise ValueError(
            f"past_key_values holds the states of {rows} sequences, the input has {batch_size}; "
            "lrnn_lm.model.copy_states(cache, repeats) makes several of each"
        )


def check_room(cache: Cache | None, past: int | Tensor, new_tokens: int) -> None:
    """Raise ValueError if a static cache has no place for the keys of the new tokens."""
    if cache is None or isinstance(past, Tensor) or is_traced():
        return
    for layer in cache.layers:
        if (
            isinstance(layer, StaticLayer)
            and not layer.is_sliding
            and past + new_tokens > layer.max_cache_len
        ):
            raise ValueError(
                f"the static cache has places for {layer.max_cache_len} tokens, not for the {past} in it and "
                f"{new_tokens} new ones: make it with a larger max_cache_len"
            )


def tokens_seen(cache: Cache | None) -> int | Tensor:
    """Tokens that a cache has seen, whatever its layers are; of a static cache a tensor within a graph."""
    if cache is None:
        return 0
    attention = next((layer for layer in cache.layers if not is_recurrent(layer)), None)
    if attention is not None:
        length = attention.get_seq_length()
        return length if is_traced() else int(length)
    layer = cache.layers[0]
    return layer.seen_tokens if layer.has_previous_state[0] else 0


def notes_of(layer: Any) -> dict[str, Tensor]:
    """The `NOTES` that a cache layer has."""
    return {name: getattr(layer, name) for name in NOTES if hasattr(layer, name)}


def note_of(layer: Any, name: str, past: int | Tensor) -> Tensor | None:
    """One of the `NOTES` of a layer that has seen `past` tokens; None where there is nothing to tell.

    document_start: (B,) at which of its row's tokens, padding aside, the last document begins. The notes of a
    cache that was emptied since are forgotten.
    """
    if not hasattr(layer, name):
        return None
    if isinstance(past, Tensor):  # of a static cache, on whose value a graph must not depend
        setattr(layer, name, getattr(layer, name) * (past > 0))
    elif not past:
        delattr(layer, name)
        return None
    return getattr(layer, name)


def state_mixer(layer: Any) -> str | None:
    """The type of the mixer that a cache layer's state is of; None if it has no state, or none of ours."""
    if is_recurrent(layer) and layer.has_previous_state[0] and hasattr(layer, "mixer_type"):
        return layer.mixer_type
    return None


def layer_state(cache: Cache | None, layer_idx: int) -> Any:
    """A layer's state: the recurrent state, None at the beginning; for attention, the cache layer itself."""
    if cache is None:
        return None
    layer = cache.layers[layer_idx]
    if not is_recurrent(layer):
        return layer
    if not layer.has_previous_state[0]:
        return None
    state = layer.recurrent_states[0]
    return state.clone() if torch.is_grad_enabled() else state  # the cache will write over its own


def keep_layer_state(
    cache: Cache | None, layer_idx: int, state: Any, new_tokens: int, mixer_type: str
) -> None:
    """Put a recurrent state back and count its tokens; attention has already written to its layer."""
    if cache is None or not is_recurrent(cache.layers[layer_idx]):
        return
    layer = cache.layers[layer_idx]
    if all(map(is_recurrent, cache.layers)):  # else attention counts, and a count here would change a graph
        layer.seen_tokens = new_tokens + (layer.seen_tokens if layer.has_previous_state[0] else 0)
    layer.mixer_type = mixer_type
    old = layer.recurrent_states[0] if layer.has_previous_state[0] else None
    if old is not None and not is_traced() and old.is_inference() and not torch.is_inference_mode_enabled():
        layer.recurrent_states[0] = old.clone()  # torch lets nobody write to the other outside of that mode
    kept = layer.recurrent_states[0] if layer.is_recurrent_states_initialized[0] else None
    if old is None and kept is not None and kept.shape != state.shape:  # of a cache that was reset
        layer.is_recurrent_states_initialized[0] = False
    cache.update_recurrent_state(state, layer_idx)
    layer.has_previous_state[0] = True


def is_recurrent(layer: Any) -> bool:
    """Whether a cache layer holds a recurrent state rather than keys and values."""
    return hasattr(layer, "recurrent_states")


def window_of(layer: Any) -> int | None:
    """Tokens of a cache layer's window; None where there is none, and of a static layer never used."""
    return layer.sliding_window if hasattr(layer, "sliding_window") else None


def _kind(layer: Any) -> str:
    """A cache layer's kind, as in `config.layer_types`."""
    if is_recurrent(layer):
        return "linear_attention"
    return "sliding_attention" if layer.is_sliding else "full_attention"
