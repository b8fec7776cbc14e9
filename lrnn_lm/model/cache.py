"""Recurrent states in transformers' own cache, and the one thing it lacks: how many tokens they have seen.

A cache layer of type `linear_attention` holds a state of constant size and counts nothing, while `generate`
asks a cache for its length (to continue from it, or to cut the inputs to the new tokens). So the count is
kept on the first layer, where every view of the cache finds it, and `RecurrentCache` answers with it.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from .config import LRNNConfig


class RecurrentCache(DynamicCache):
    """A DynamicCache that can tell its length though none of its layers keeps keys and values."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        if any(not is_recurrent(layer) for layer in self.layers):
            return super().get_seq_length(layer_idx)
        return tokens_seen(self)


def make_cache(config: LRNNConfig, cache: Cache | None = None) -> RecurrentCache:
    """A cache for a model: a new one, or a view of a given one that shares its layers."""
    view = RecurrentCache(config=config)
    if cache is not None:
        view.layers = cache.layers
    return view


def check_cache(config: LRNNConfig, cache: Cache) -> None:
    """Raise ValueError if a cache has not one layer of the right kind for each of the model's."""
    kinds = ["linear_attention" if is_recurrent(layer) else "full_attention" for layer in cache.layers]
    if kinds != config.layer_types:
        raise ValueError(
            f"past_key_values does not fit this model's {config.num_hidden_layers} layers; "
            "use DynamicCache(config=model.config)"
        )


def tokens_seen(cache: Cache | None) -> int:
    """Tokens that a cache has seen, whatever its layers are."""
    if cache is None:
        return 0
    layer = cache.layers[0]
    if not is_recurrent(layer):
        return layer.get_seq_length()
    return layer.seen_tokens if layer.has_previous_state[0] else 0


def document_start(layer: Any) -> Any:
    """(B,) where the last document begins among an attention layer's keys; None if there is only one."""
    return layer.document_start if hasattr(layer, "document_start") else None


def load_state(cache: Cache | None, layer_idx: int) -> Any:
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


def store_state(cache: Cache | None, layer_idx: int, state: Any, new_tokens: int) -> None:
    """Put a recurrent state back and count its tokens; attention has already written to its layer."""
    if cache is None or not is_recurrent(cache.layers[layer_idx]):
        return
    layer = cache.layers[layer_idx]
    layer.seen_tokens = new_tokens + (layer.seen_tokens if layer.has_previous_state[0] else 0)
    cache.update_recurrent_state(state, layer_idx)
    layer.has_previous_state[0] = True


def is_recurrent(layer: Any) -> bool:
    """Whether a cache layer holds a recurrent state rather than keys and values."""
    return hasattr(layer, "recurrent_states")
