"""What a decoding step writes, at fixed addresses: recurrent states, and keys with room for tokens to come.

A dynamic cache makes new tensors for every token, which no CUDA graph can follow. Here a token's key is
written to the next column of a buffer, attention reads all columns, and a mask hides those without a token.
The cache's layers hold the states, and views of the columns so far: whatever reads the cache finds it as it
would be after the model's forward pass.

Legend: B batch, G heads of keys and values, S columns of a buffer, d head width, n tokens so far.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ...mixers.base import Joint, SequenceContext
from ..cache import is_recurrent

LEAST = 256  # columns of the smallest buffer
# Bytes of keys and values that a captured step keeps between calls; a model has up to KEPT of these. Beyond,
# each call captures anew, which costs about three tokens. recipes/small.yaml: 10,000 tokens of one row.
KEPT_KEYS = 64 * 2**20


def columns(n: int) -> int:
    """S for one more token after n: in steps of about a quarter, so that attention reads little for nothing.

    It depends on n only, so a text is the same whatever memory a call of `generate` is lent.
    """
    S = LEAST
    while n >= S:
        S += max(LEAST, S // 4 // 64 * 64)  # a mask's rows begin at multiples of 64, as kernels ask for
    return S


def can_hold(cache: Cache) -> bool:
    """Whether attention's layers in a cache are such as a step can write: growing, and not offloaded."""
    # Not subclasses, which keep a window, or numbers in another form.
    others = [layer for layer in cache.layers if not is_recurrent(layer)]
    return all(type(layer) is DynamicLayer for layer in others) and not (others and cache.offloading)


def held_by(layer: Any) -> Tensor | None:
    """A recurrent state (B, ..) or keys (B, G, n, d) of a cache layer; None if it has seen nothing."""
    if is_recurrent(layer):
        return layer.recurrent_states[0] if layer.has_previous_state[0] else None
    return layer.keys if layer.get_seq_length() else None


def room_for(layer: Any) -> tuple[int, ...]:
    """The shape of what a step writes in place of a cache layer's tensors."""
    shape = tuple(held_by(layer).shape)
    return shape if is_recurrent(layer) else (*shape[:2], columns(shape[2]), shape[3])


class NextToken:
    """Where the next token's key is written, its positions, and what it sees; on the device, which goes from
    step to step without the host."""

    def __init__(self, keys: Tensor):
        B, _, n, _ = keys.shape
        self.place = keys.new_zeros(1, dtype=torch.long)
        self.positions = keys.new_zeros(B, 1, dtype=torch.long)
        self.mask = keys.new_zeros(B, 1, 1, columns(n))  # added to scores: 0 on what is seen, else -inf

    def begin(self, n: int, context: SequenceContext) -> None:
        """Be the token after n, of which the model itself has found this context."""
        self.place.fill_(n)
        self.positions.copy_(context.positions)
        seen = context.attention_mask  # (B or 1, 1, 1, n + 1) bool; None: all
        self.mask.fill_(-math.inf)
        new = self.mask.narrow(3, 0, n + 1)
        new.zero_() if seen is None else new.masked_fill_(seen, 0)

    def context(self, model: PreTrainedModel) -> SequenceContext:
        """What the layers need to know of it; from here on it is seen."""
        self.mask.index_fill_(3, self.place, 0)
        mixers = (block.mixer for block in model.model.layers)
        turned = (m for m in mixers if m.layer_type == "full_attention" and m.use_rope)
        rotary = next((mixer.rotary(self.positions) for mixer in turned), None)
        return SequenceContext(attention_mask=self.mask, positions=self.positions, rotary=rotary)

    def advance(self) -> None:
        """Be the token after."""
        self.place.add_(1)
        self.positions.add_(1)


class Keys:
    """Keys and values of one attention layer, (B, G, S, d) each; what `Attention` takes for a cache layer."""

    def __init__(self, token: NextToken):
        self.keys: Tensor | None = None  # until a cache comes
        self.values: Tensor | None = None
        self._token = token
        self._shown: tuple[Tensor | None, Tensor | None] = (None, None)  # what the cache layer holds

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next token's k and v (B, G, 1, d); all columns."""
        self.keys.index_copy_(2, self._token.place, k)
        self.values.index_copy_(2, self._token.place, v)
        return self.keys, self.values

    def show(self, layer: Any, n: int) -> None:
        """Let a cache layer hold the first n columns."""
        layer.keys, layer.values = self._shown = self.keys.narrow(2, 0, n), self.values.narrow(2, 0, n)

    def is_in(self, layer: Any) -> bool:
        """Whether a cache layer still holds what it was shown last."""
        return layer.keys is self._shown[0] and layer.values is self._shown[1]

    def take(self, layer: Any) -> None:
        """Copy what a cache layer holds, and let it hold the copy."""
        B, G, n, d = layer.keys.shape
        if self.keys is None:  # one layer after the other, as each frees what it held before
            with torch.inference_mode(False):
                self.keys, self.values = (
                    layer.keys.new_empty(B, G, self._token.mask.shape[-1], d) for _ in range(2)
                )
        for ours, theirs in ((self.keys, layer.keys), (self.values, layer.values)):
            ours.narrow(2, 0, n).copy_(theirs)
            ours[:, :, n:].zero_()  # hidden is not enough: what an earlier call left may be infinite
        self.show(layer, n)

    def part(self, layer: Any) -> None:
        """Give a cache layer that holds columns, or a part of them as after `crop`, copies of its own."""
        held = layer.keys, layer.values
        if _share(held[0], self.keys) or _share(held[1], self.values):
            layer.keys, layer.values = held[0].clone(), held[1].clone()


def _share(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class Memory:
    """What one step writes to, the joint weights that it reads, and its captured graph."""

    def __init__(self, cache: Cache, joint: list[tuple[Joint | None, Joint | None]] | None, key: Any = None):
        self.key = key  # what a captured graph depends on; None: do not capture
        self.lent = True  # whether a step uses it
        self.joint = joint
        keys = next((layer.keys for layer in cache.layers if not is_recurrent(layer)), None)
        self.token = None if keys is None else NextToken(keys)  # where there is attention
        self.states: list[Tensor | Keys] = [
            torch.zeros_like(layer.recurrent_states[0]) if is_recurrent(layer) else Keys(self.token)
            for layer in cache.layers
        ]
        first = held_by(cache.layers[0])
        self.ids = first.new_zeros(first.shape[0], 1, dtype=torch.long)
        self.workspace: Any = None  # of a fused step of many sequences
        self.graph: torch.cuda.CUDAGraph | None = None
        self.uncapturable = False  # a capture was tried and failed
        self.logits: Tensor | None = None  # (B, 1, V), which the graph writes
        self.stream: torch.cuda.Stream | None = None  # where the step ran last

    @property
    def moving(self) -> list[Tensor]:
        """What a step changes, but for the keys and values, which it writes behind all others."""
        states, token = [state for state in self.states if isinstance(state, Tensor)], self.token
        return states if token is None else [*states, token.place, token.positions, token.mask]

    @property
    def keys(self) -> list[Tensor]:
        """All buffers of keys and values that there are."""
        pairs = [(state.keys, state.values) for state in self.states if isinstance(state, Keys)]
        return [t for pair in pairs for t in pair if t is not None]

    def is_in(self, cache: Cache) -> bool:
        """Whether a cache's layers hold the states."""
        return all(
            state.is_in(layer) if isinstance(state, Keys) else layer.recurrent_states[0] is state
            for state, layer in zip(self.states, cache.layers, strict=True)
        )

    def take(self, cache: Cache) -> None:
        """Copy a cache's states, and let its layers hold the copies."""
        for state, layer in zip(self.states, cache.layers, strict=True):
            if isinstance(state, Keys):
                state.take(layer)
            else:
                state.copy_(layer.recurrent_states[0])
                layer.recurrent_states[0] = state

    def count(self, cache: Cache) -> None:
        """Tell the cache that holds the states of one more token."""
        for state, layer in zip(self.states, cache.layers, strict=True):
            if isinstance(state, Keys):
                state.show(layer, layer.keys.shape[2] + 1)
            elif self.token is None:  # else attention counts
                layer.seen_tokens += 1

    def part(self, owners: list[Callable[[], Any]]) -> None:
        """Give cache layers that hold the states copies of their own."""
        with torch.inference_mode(False), torch.no_grad():
            for owner, state in zip(owners, self.states, strict=False):
                layer = owner()
                if layer is not None and isinstance(state, Keys):
                    state.part(layer)
                elif layer is not None and layer.recurrent_states[0] is state:
                    layer.recurrent_states[0] = state.clone()

    def drop(self) -> None:
        """Leave states and keys to the cache that holds them: there is no step for this memory any more."""
        self.states, self.token, self.graph, self.logits, self.key = [], None, None, None, None
