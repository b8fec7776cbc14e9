"""Rows that are decoded together, of requests that come and go: what continuous batching computes.

Prompts are read segment by segment with a token for every row in between: a long prompt does not stop the
texts of others.

Legend: B requests, S rows of the batch (on a GPU the next power of 2, as each size has a CUDA graph of its
own), T time, V vocabulary.
"""

import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from ..cache import CACHE, make_cache, tokens_seen
from ..states import cache_of
from .decode import Decoder, can_decode
from .long_input import DEFAULT_SEGMENT, prefill
from .prefix import Keep, prefix_cache
from .sample import choose

_TOGETHER = 8 * DEFAULT_SEGMENT  # tokens and padding of prompts that are read at once
_GRAPHS = ("cuda",)  # devices where decoding captures a CUDA graph for each size of batch
_MESSAGE = 0.001  # seconds between any two messages of streams: each costs the server's thread 0.15 ms
_LONG = 512  # shorter prompts are read in batches rather than through the prefix cache, which takes one


class Choice:
    """How tokens are chosen. processors: see the scores only, not the text before. draw: or the likeliest."""

    def __init__(self, processors: LogitsProcessorList, draw: bool):
        self.processors, self.draw = processors, draw
        # As text, whose hash is kept: a row is looked up at every token.
        self.key = repr((draw, *((type(each), sorted(vars(each).items())) for each in processors)))


LIKELIEST = Choice(LogitsProcessorList(), False)


@dataclass(eq=False)
class Request:
    """A prompt and what was written after it."""

    id: str
    prompt: list[int]
    most: int  # new tokens
    ends: set[int]
    streaming: bool
    choice: Choice = LIKELIEST
    written: list[int] = field(default_factory=list)
    cancelled: bool = False
    told: float = 0.0  # when its stream was told last
    keep: Keep | None = None  # of the prefix cache

    @property
    def done(self) -> bool:
        """Whether nothing more is written."""
        ended = len(self.written) >= self.most or (self.written and self.written[-1] in self.ends)
        return bool(self.cancelled or ended)

    def output(self, error: BaseException | None = None) -> GenerationOutput:
        """The text so far, as transformers tells it."""
        status = RequestStatus.FINISHED if self.done else RequestStatus.DECODING
        return GenerationOutput(
            self.id,
            self.prompt,
            self.written[:],
            error=None if error is None else str(error),
            status=status if error is None else RequestStatus.FAILED,
        )


_Read = tuple[list[Request], Tensor, list[Tensor]]  # requests, logits (B, V), each layer's states (B, ..)


class Batch:
    """The rows of one model, whose layers are all recurrent; for one thread."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._rows: list[Request] = []
        self._unread: list[Request] = []
        self._reading: deque[tuple[list[Request], Generator[None, None, _Read]]] = deque()
        self._states: list[Tensor] = []  # of each layer, (S, ..)
        self._newest = torch.zeros(0, 1, dtype=torch.long, device=model.device)  # (S, 1)
        self._cache: Any = None
        self._decode: Any = None
        self._layers = [(spec["type"], None) for spec in model.config.layer_mixers]

    def go_on(self, asked: list[Request]) -> list[Request]:
        """Read a segment of some prompts, write a token for each row; the requests that are to be told."""
        self._unread = [request for request in [*self._unread, *asked] if not request.cancelled]
        read = self._read_on()
        told = [r for group in [self._rows, *(group for group, _, _ in read)] for r in group if not r.done]
        self._change(read)
        if self._rows:
            logits = self._decode(input_ids=self._newest, use_cache=True, **{CACHE: self._cache}).logits
            newest = _choose(logits[: len(self._rows), -1], self._rows)
            self._newest[: len(newest), 0] = newest
            for request, token in zip(self._rows, newest.tolist(), strict=True):
                request.written.append(token)
        for row, request in enumerate(self._rows):
            if request.keep is not None and request.done and not request.cancelled:
                self._keep(row, request)
        return self._to_tell([request for request in told if not request.cancelled])

    def _to_tell(self, written: list[Request]) -> list[Request]:
        """Of those that have a new token: whose text is whole, and the streams whose turn it is."""
        now, streams = time.monotonic(), sum(request.streaming for request in written)
        told = [r for r in written if r.done or (r.streaming and now >= r.told + _MESSAGE * streams)]
        for request in told:
            request.told = now
        return told

    def _read_on(self) -> list[_Read]:
        """A segment of the prompts whose turn it is, and of those that wait longest; what was read whole."""
        turns = [self._reading.popleft()] if self._reading else []
        if self._unread:
            group = next(group for group in _alike(self._unread) if self._unread[0] in group)
            self._unread = [request for request in self._unread if request not in group]
            turns.append((group, self._read(group)))
        done = []
        for group, reading in turns:
            if all(request.cancelled for request in group):
                continue
            try:
                next(reading)
                self._reading.append((group, reading))
            except StopIteration as end:
                done.append(end.value)
        return done

    def _change(self, read: list[_Read]) -> None:
        """Put the rows together again, without those that are done and with those whose prompts are read."""
        stay = [row for row, request in enumerate(self._rows) if not request.done]
        if not read and len(stay) == len(self._rows):
            return
        if self._cache is not None:  # the decoding step wrote to the tensors in the cache
            self._states = [layer.recurrent_states[0] for layer in self._cache.layers]
        rows, newest = [self._rows[row] for row in stay], [self._newest[stay]]
        states = [[state[stay]] for state in self._states] or [[] for _ in self._layers]
        for group, logits, of_layers in read:
            tokens = _choose(logits, group)
            for request, token in zip(group, tokens.tolist(), strict=True):
                request.written.append(token)
            go = [row for row, request in enumerate(group) if not request.done]
            rows += [group[row] for row in go]
            newest.append(tokens[go].unsqueeze(1))
            for kept, state in zip(states, of_layers, strict=True):
                kept.append(state[go])
        self._rows, self._cache, self._decode = rows, None, None  # a step gives its memory back first
        # The next power of 2: few sizes, as each is captured as a graph.
        graphs = self.model.device.type in _GRAPHS
        size = 1 << max(0, len(rows) - 1).bit_length() if graphs else len(rows)
        self._newest = _stacked(newest, size)
        self._states = [_stacked(kept, size) for kept in states]
        self._cache = cache_of({f"{i}.state": s for i, s in enumerate(self._states)}, 1, self._layers)
        self._decode = Decoder(self.model) if can_decode(self.model) else self.model

    def _read(self, group: list[Request]) -> Generator[None, None, _Read]:
        """Read prompts; yields between segments."""
        width, device = max(len(request.prompt) for request in group), self.model.device
        padding = [width - len(request.prompt) for request in group]
        rows = [[0] * pad + request.prompt for pad, request in zip(padding, group, strict=True)]
        ids = torch.tensor(rows, device=device)  # (B, T)
        mask = None
        if any(padding):
            mask = torch.arange(width, device=device) >= torch.tensor(padding, device=device)[:, None]
        cache = make_cache(self.model.config)
        if width > _LONG and len(group) == 1:
            kept = prefix_cache(self.model, ids, {CACHE: cache, "use_cache": True})
            if kept is not None:
                group[0].keep = yield from kept.reading(self.model, ids, cache)
        start = int(tokens_seen(cache))
        for begin in range(start, width, DEFAULT_SEGMENT):
            if begin > start:
                yield
            end = min(begin + DEFAULT_SEGMENT, width)
            seen = None if mask is None else mask[:, :end]
            out = prefill(self.model, ids[:, begin:end], past_key_values=cache, attention_mask=seen)
        return group, out.logits[:, -1], [layer.recurrent_states[0] for layer in cache.layers]

    def _keep(self, row: int, request: Request) -> None:
        """Give the prefix cache the states at the end of an answer, whose last token was not fed."""
        ids = torch.tensor([[*request.prompt, *request.written]])
        states = [layer.recurrent_states[0][row : row + 1] for layer in self._cache.layers]
        tensors = {f"{i}.state": state for i, state in enumerate(states)}
        request.keep(ids, cache_of(tensors, ids.shape[1] - 1, self._layers))
        request.keep = None


def _alike(requests: list[Request]) -> list[list[Request]]:
    """Requests whose prompts are read together: of like length, as padding costs as much as tokens."""
    groups: list[list[Request]] = []
    for request in sorted(requests, key=lambda r: len(r.prompt)):
        length, last = len(request.prompt), groups[-1] if groups else []
        near = last and length <= 2 * len(last[0].prompt) and length <= _LONG
        if near and length * (len(last) + 1) <= _TOGETHER:
            last.append(request)
        else:
            groups.append([request])
    return groups


def _choose(logits: Tensor, requests: list[Request]) -> Tensor:
    """(B,) next tokens of logits (B, V): those of requests with the same settings at once."""
    alike: dict[str, list[int]] = {}
    for row, request in enumerate(requests):
        alike.setdefault(request.choice.key, []).append(row)
    scores = logits.float()
    if len(alike) == 1:
        choice = requests[0].choice
        return choose(scores, None, choice.processors, choice.draw)
    newest = scores.new_zeros(len(scores), dtype=torch.long)
    for rows in alike.values():
        choice = requests[rows[0]].choice
        newest[rows] = choose(scores[rows], None, choice.processors, choice.draw)
    return newest


def _stacked(parts: list[Tensor], size: int) -> Tensor:
    """Rows of all parts, and zeros up to `size` rows."""
    rows = torch.cat(parts)
    return torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])]) if size > len(rows) else rows
