"""States of what was read before: a second question on the same text costs its own tokens only.

`generate` uses a PrefixCache where the config says how many bytes it may take (`prefix_cache_bytes`), for one
row without padding. It keeps a text's states at its end, where it parts from another text, and at 64, 128,
256, .. tokens before the end of a prompt: a state cannot be cut back, and the next prompt may part from this
one anywhere, most likely near its end, where a question began.

Texts are compared token by token, so a state is never that of another text. All states are dropped when a
weight has changed, which a checksum of all weights tells: it costs about the time of two tokens.

Legend: T time.
"""

import threading
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..cache import CACHE, GENERATED, tokens_seen
from ..states import cache_of, tensors_of
from .built import all_modules, as_written
from .long_input import DEFAULT_SEGMENT, prefill
from .step import what_modules_hold

_NEAREST = 64  # tokens between the end of a prompt and the state kept nearest before it
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_GOLDEN = 0x1E3779B97F4A7C15  # odd, with bits all over: a product's upper half depends on every bit
_lock = threading.Lock()  # guards `_caches`
_caches: "weakref.WeakKeyDictionary[nn.Module, PrefixCache]" = weakref.WeakKeyDictionary()

Keep = Callable[[Tensor, Cache], None]


@dataclass(eq=False)
class _Text:
    """A text read before: states after some of its tokens, and attention's keys and values of all."""

    ids: Tensor  # (T,) int32, on the CPU
    states: dict[int, dict[str, Tensor]]  # by the number of tokens read
    keys: dict[str, Tensor]  # (1, heads, T, head size)
    size: int = field(init=False)  # bytes

    def __post_init__(self) -> None:
        tables = [{"ids": self.ids}, self.keys, *self.states.values()]
        self.size = sum(t.nbytes for table in tables for t in table.values())

    def drop_earliest(self) -> None:
        """Drop the state after the fewest tokens."""
        self.size -= sum(t.nbytes for t in self.states.pop(min(self.states)).values())


class PrefixCache:
    """The states of texts that one model read, at most so many bytes of them; for any number of threads.

    The text that was not used for the longest time is dropped first. A text that is too large by itself loses
    its earliest states.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._texts: list[_Text] = []  # the least recently used first
        self._weights: Any = None  # whose states these are

    def size(self) -> int:
        """Bytes kept."""
        with self._lock:
            return sum(text.size for text in self._texts)

    def read(self, model: PreTrainedModel, ids: Tensor, cache: Cache) -> Keep:
        """Bring an empty cache to the last but one of ids (1, T), through the model only where needed.

        Returns:
            what keeps the states at the end of the answer: takes all ids (1, ..) and the cache.
        """
        reading = self.reading(model, ids, cache)
        while True:
            try:
                next(reading)
            except StopIteration as end:
                return end.value

    def reading(self, model: PreTrainedModel, ids: Tensor, cache: Cache) -> Generator[None, None, Keep]:
        """The same, yielding after each segment."""
        weights = _weights(model)
        known = ids[0, :-1].to("cpu", torch.int32)
        read, parted, found = self._find(known, weights)
        if found:
            layers = [(spec["type"], spec.get("window")) for spec in model.config.layer_mixers]
            cache.layers[:] = cache_of(found, read, layers).layers
        states = {}
        for end in _places(read, parted, len(known)):
            for part in ids[:, read:end].split(DEFAULT_SEGMENT, dim=1):
                prefill(model, part, past_key_values=cache)
                yield
            states[end], read = _states(cache), end
        self._keep(known, states, cache, weights)

        def keep(ids: Tensor, cache: Cache) -> None:
            known = ids[0, : int(tokens_seen(cache))].to("cpu", torch.int32)
            self._keep(known, {len(known): _states(cache)}, cache, weights)

        return keep

    def _find(self, ids: Tensor, weights: Any) -> tuple[int, int, dict[str, Tensor]]:
        """(tokens read, tokens that some text shares with ids, the tensors of a cache) of the longest state
        that ids continue."""
        with self._lock:
            if weights != self._weights:
                self._texts, self._weights = [], weights
            best, parted, found = 0, 0, None
            for text in self._texts:
                shared = _shared(text.ids, ids)
                parted = max(parted, shared)
                read = max((n for n in text.states if n <= shared), default=0)
                if read > best:
                    best, found = read, text
            if found is None:
                return 0, parted, {}
            self._texts.remove(found)
            self._texts.append(found)
            state, keys = found.states[best], found.keys
        with torch.inference_mode(False), torch.no_grad():  # the model writes to what it is given
            tensors = {name: t.clone() for name, t in state.items()}
            return best, parted, tensors | {name: t[:, :, :best].clone() for name, t in keys.items()}

    def _keep(self, ids: Tensor, states: dict[int, dict[str, Tensor]], cache: Cache, weights: Any) -> None:
        if not states:
            return
        with torch.inference_mode(False), torch.no_grad():  # a decoding step may write where the cache's are
            keys = {name: t.clone() for name, t in _keys(cache).items()}
        text, beside = _Text(ids, states, keys), None
        with self._lock:
            if weights != self._weights:
                return
            for other in self._texts:
                if _shared(other.ids, ids) == min(len(other.ids), len(ids)):  # one is the other's beginning
                    longer = text if len(ids) >= len(other.ids) else other
                    text = _Text(longer.ids, {**other.states, **states}, longer.keys)
                    beside = other
                    break
            while text.size > self.most_bytes and len(text.states) > 1:
                text.drop_earliest()
            if text.size <= self.most_bytes:  # else it would drive out all others for nothing
                self._texts = [other for other in self._texts if other is not beside] + [text]
            while sum(text.size for text in self._texts) > self.most_bytes:
                del self._texts[0]


def prefix_cache(model: PreTrainedModel, input_ids: Tensor, arguments: dict[str, Any]) -> PrefixCache | None:
    """A model's cache, if it asks for one and this call of `generate` can use it.

    It cannot where the states depend on more than tokens and weights: adapters, hooks, patches, quantised
    weights, autocast, padding, positions of the caller's, a cache that has seen tokens or is static.
    """
    most = model.config.prefix_cache_bytes
    if not most or not _depends_on_tokens_only(input_ids, arguments) or not _is_plain(model):
        return None
    with _lock:
        cache = _caches.setdefault(model, PrefixCache(most))
    cache.most_bytes = most
    return cache


def _depends_on_tokens_only(ids: Tensor, arguments: dict[str, Any]) -> bool:
    cache, mask = arguments.get(CACHE), arguments.get("attention_mask")
    positions = arguments.get("position_ids")
    kinds = (LinearAttentionLayer, DynamicLayer, DynamicSlidingWindowLayer)
    return (
        ids.shape[0] == 1
        and ids.shape[1] > 1
        and arguments.get("use_cache") is True
        and {key for key, value in arguments.items() if value is not None} <= GENERATED
        and isinstance(cache, Cache)
        and all(type(layer) in kinds for layer in cache.layers)
        and tokens_seen(cache) == 0
        and (mask is None or (mask.shape == ids.shape and bool(mask.all())))
        and (positions is None or torch.equal(positions[0].cpu(), torch.arange(ids.shape[1])))
    )


def _is_plain(model: PreTrainedModel) -> bool:
    if torch.is_autocast_enabled(model.device.type) or torch.is_grad_enabled() or not as_written(model):
        return False
    return all(type(t) in (nn.Parameter, Tensor) and t.device == model.device for t in _tensors(model))


def _tensors(model: PreTrainedModel) -> list[Tensor]:
    """All parameters and buffers."""
    held = [{**module._parameters, **module._buffers} for module in all_modules(model)]
    return [t for tensors in held for t in tensors.values() if t is not None]


def _weights(model: PreTrainedModel) -> Any:
    """What is another for other weights, however they were written: places, versions and sums of all bits;
    and for other layers or windows, which the config can be told later."""
    tensors = [t.detach() for t in _tensors(model)]
    versions = [None if t.is_inference() else t._version for t in tensors]
    sums = torch.stack([_sum_of_bits(t) for t in tensors]).tolist()
    return what_modules_hold(model), str(model.config.layer_mixers), versions, sums


def _sum_of_bits(t: Tensor) -> Tensor:
    """A checksum of all bits. It also changes where numbers change places or signs: each is multiplied by odd
    numbers of its column, and each row's sum by one of its row."""
    if not t.numel():
        return torch.zeros((), dtype=torch.int64, device=t.device)
    rows = (t.flatten(1) if t.ndim > 1 else t.reshape(-1, 1)).contiguous()
    size = t.element_size()
    by_eight = (rows.shape[1] | rows.storage_offset()) * size % 8 == 0  # 28 times as fast in fp32 on a CPU
    bits = rows.view(_INTEGERS[8 if by_eight else size])
    columns = torch.arange(1, 2 * bits.shape[1], 2, device=t.device) * _GOLDEN
    # In parts of 8 MB, which stay in a CPU's cache. A sign is the highest bit of a product too, and two of
    # those cancel out: so the upper halves are multiplied again.
    parts = bits.split(max(1, 2**20 // bits.shape[1]))
    again = columns * columns
    sums = torch.cat([(part * columns).bitwise_right_shift_(32).mul_(again).sum(1) for part in parts])
    return (sums * torch.arange(1, 2 * len(sums), 2, device=t.device)).sum()


def _places(read: int, parted: int, end: int) -> list[int]:
    """After which tokens to keep a state, from `read` to `end`."""
    places, back = {end}, _NEAREST
    if parted - read >= _NEAREST:
        places.add(parted)
    while back < end - read:
        places.add(end - back)
        back *= 2
    return sorted(place for place in places if read < place <= end)


def _shared(one: Tensor, other: Tensor) -> int:
    """How many tokens two texts have in common at their beginning."""
    most = min(len(one), len(other))
    differ = one[:most] != other[:most]
    return int(differ.to(torch.uint8).argmax()) if bool(differ.any()) else most


def _keys(cache: Cache) -> dict[str, Tensor]:
    """Keys and values of the layers that attend to all tokens: an earlier state needs the first of them."""
    names = {f"{i}.{kind}" for i, layer in enumerate(cache.layers) for kind in ("keys", "values")
             if type(layer) is DynamicLayer}  # fmt: skip
    return {name: t for name, t in tensors_of(cache).items() if name in names}


def _states(cache: Cache) -> dict[str, Tensor]:
    """Copies of everything else."""
    keys = _keys(cache)
    with torch.inference_mode(False), torch.no_grad():
        return {name: t.clone() for name, t in tensors_of(cache).items() if name not in keys}
