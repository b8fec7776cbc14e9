"""What a row carries from one segment to the next, as tensors that gradients flow through.

A cache of transformers is written in place, and a layer that is recomputed would read what it wrote. Here a
layer takes tensors and returns tensors, so autograd, checkpointing and FSDP2 see them as inputs and outputs.

Legend: B batch, T time, D model width, G heads of keys and values, d their width, W window.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..mixers import mixer_class
from ..mixers.base import Mixer, SequenceContext
from .cache import RecurrentCache, is_recurrent
from .config import LRNNConfig
from .initial_state import mix

# Of a layer: its state; or keys and values (B, G, up to W - 1, d) of a window; () at the beginning of a row.
Carried = tuple[Tensor, ...]


@dataclass(frozen=True)
class Boundary:
    """All that a row carries over the boundary between two segments.

    seen: tokens before it. layers: one entry a layer. document_start: (B,) at which of the row's tokens the
    last document began; None if it is the first, or no layer has a window.
    """

    seen: int
    layers: list[Carried]
    document_start: Tensor | None = None


class CarriedStates(RecurrentCache):
    """A boundary as the model takes it for `past_key_values`; a pass moves it to the end of the segment.

    The cache layers in it hold no states. They count tokens, which masks and positions are made of.
    """

    def __init__(self, config: LRNNConfig, boundary: Boundary | None = None):
        super().__init__(config=config)
        self.states = [()] * len(config.layer_mixers) if boundary is None else list(boundary.layers)
        if boundary is not None:
            self.move(boundary.seen)
        for layer in self.layers:
            if boundary is not None and boundary.document_start is not None and not is_recurrent(layer):
                layer.document_start = boundary.document_start

    def take(self, layer: int) -> Carried:
        """What a layer begins with."""
        return self.states[layer]

    def give(self, layer: int, carried: Carried, hidden_states: Tensor) -> Tensor:
        """Keep what a layer carries on. Returns its output, for the next layer."""
        self.states[layer] = carried
        return hidden_states

    def move(self, tokens: int) -> None:
        """Count the tokens of a pass."""
        for layer in self.layers:
            if is_recurrent(layer):
                layer.seen_tokens = tokens + (layer.seen_tokens if layer.has_previous_state[0] else 0)
                layer.has_previous_state[0] = True
            else:
                layer.cumulative_length += tokens

    def boundary(self) -> Boundary:
        """Copies of the states, without a graph.

        A view would keep alive all that it is a part of; other strides would need other compiled graphs.
        """
        plain = torch.contiguous_format
        starts = [layer.document_start for layer in self.layers if hasattr(layer, "document_start")]
        layers = [tuple(s.detach().clone(memory_format=plain) for s in states) for states in self.states]
        return Boundary(int(self.get_seq_length()), layers, starts[0] if starts else None)


class _Window:
    """Keys and values before a segment, as the cache layer that attention writes to. Nothing is in place."""

    def __init__(self, window: int, carried: Carried):
        self._window, self.carried = window, carried

    def update(self, keys: Tensor, values: Tensor) -> Carried:
        """Keys and values (B, G, S, d) of the window and the segment, of new ones (B, G, T, d)."""
        if self.carried:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.carried, (keys, values), strict=True))
        self.carried = keys[:, :, 1 - self._window :], values[:, :, 1 - self._window :]
        return keys, values


def carries_gradients(mixer_type: str) -> bool:
    """Whether gradients flow through the state of a type of mixer."""
    return mixer_class(mixer_type).differentiable_state


def mix_carried(
    mixer: Mixer, x: Tensor, carried: Carried, context: SequenceContext, initial: Tensor | None
) -> tuple[Tensor, Carried]:
    """y (B, T, D) of a segment x (B, T, D), and what the layer carries on; initial as in `mix`."""
    if mixer.layer_type == "linear_attention":
        y, state = mix(mixer, x, carried[0] if carried else None, context, initial)
        return y, (state,)
    window: Any = _Window(mixer.window, carried)
    y, _ = mixer(x, window, context)
    return y, window.carried
