"""Continuous batching: requests join and leave one decoding batch between any two tokens.

`transformers serve --continuous-batching` and `generate_batch` ask a model for a manager of requests. That of
transformers puts the tokens of all requests into one row, and pages of keys and values tell them apart. A
recurrent state has no pages and needs none: it is of constant size, so a request joins when its states are
put beside the others as one more row. `StateBatching` has those methods of transformers' manager that the
server and `generate_batch` call.

Legend: B requests, S rows of the batch (on a GPU the next power of 2, as each size has a CUDA graph of its
own), T time, V vocabulary.
"""

import asyncio
import itertools
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from ..cache import make_cache, tokens_seen
from ..states import cache_of
from .decode import MOST_FUSED, Decoder, can_decode
from .long_input import DEFAULT_SEGMENT, prefill
from .prefix import Keep, prefix_cache
from .sample import LOOK_AT_SCORES, choose

MOST = MOST_FUSED  # requests at once; the others wait
_TOGETHER = 8 * DEFAULT_SEGMENT  # tokens and padding of prompts that are read at once
_LONG = 512  # shorter prompts are read in batches rather than through the prefix cache, which takes one


@dataclass(eq=False)
class _Request:
    """A prompt and what was written after it."""

    id: str
    prompt: list[int]
    most: int  # new tokens
    ends: set[int]
    streaming: bool
    written: list[int] = field(default_factory=list)
    cancelled: bool = False
    keep: Keep | None = None  # of the prefix cache

    @property
    def done(self) -> bool:
        ended = len(self.written) >= self.most or (self.written and self.written[-1] in self.ends)
        return bool(self.cancelled or ended)

    def output(self, error: BaseException | None = None) -> GenerationOutput:
        status = RequestStatus.FINISHED if self.done else RequestStatus.DECODING
        return GenerationOutput(
            self.id,
            self.prompt,
            self.written[:],
            error=None if error is None else str(error),
            status=status if error is None else RequestStatus.FAILED,
        )


class StateBatching:
    """A manager of requests to one model whose layers are all recurrent.

    Raises ValueError for a model with attention, and for choices of tokens that look at the text before.
    """

    warmed_up = True

    def __init__(self, model: PreTrainedModel, config: GenerationConfig):
        if {*model.config.layer_types} != {"linear_attention"}:
            raise ValueError(
                "continuous batching joins recurrent states, and this model has attention layers too: call "
                "generate, or start transformers serve without --continuous-batching"
            )
        self._model, self._config = model.eval(), config
        self._batch = _Batch(model, _processors(model, config), bool(config.do_sample))
        self._outputs = _Outputs()
        self._changed = threading.Condition()
        self._waiting: list[_Request] = []
        self._numbers = itertools.count()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.background_thread_status = SimpleNamespace(fatal_error=None)

    def start(self) -> None:
        """Begin to answer."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="state-batching", daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        """Whether requests are answered."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self, block: bool = True, timeout: float | None = None, **_: Any) -> None:
        """Answer what was asked, and end."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if block and self._thread is not None:
            self._thread.join(timeout)

    def destroy(self) -> None:
        """Nothing is left after `stop`."""

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        eos_token_id: int | list[int] | None = None,
        **_: Any,
    ) -> str:
        """Ask for what follows a prompt; the request's id. Streaming: an output for each token."""
        if not input_ids:
            raise ValueError("the prompt has no token: begin it with BOS")
        if not 0 <= min(input_ids) <= max(input_ids) < (size := self._model.config.vocab_size):
            raise ValueError(
                f"the prompt has tokens outside of the model's {size}: is it another's tokenizer?"
            )
        ends = self._config.eos_token_id if eos_token_id is None else eos_token_id
        request = _Request(
            request_id or f"req_{next(self._numbers)}",
            list(input_ids),
            max_new_tokens or self._config.max_new_tokens or 20,  # 20, as `generate`
            {*ends} if isinstance(ends, list) else {ends},
            streaming,
        )
        with self._changed:
            if self._stopping or self.background_thread_status.fatal_error is not None:
                raise RuntimeError("the batch has stopped and takes no request")
            self._waiting.append(request)
            self._changed.notify_all()
        return request.id

    def add_requests(self, inputs: Iterable[list[int]], **options: Any) -> list[str]:
        """Several requests of the same options."""
        return [self.add_request(ids, **options) for ids in inputs]

    def cancel_request(self, request_id: str) -> None:
        """Let a request leave without another output."""
        self._outputs.forget(request_id)
        with self._changed:
            for request in [*self._waiting, *self._batch.rows]:
                request.cancelled |= request.id == request_id

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], None]) -> None:
        """Have a request's outputs passed to a function, on the event loop that this is called from."""
        self._outputs.handle(request_id, callback)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> Any:
        """The newest output of this request or any that has no handler; None after so many seconds."""
        return self._outputs.get(request_id, timeout)

    @torch.no_grad()
    def _run(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)
        asked: list[_Request] = []
        try:
            while (asked := self._next()) is not None:
                self._outputs.put(request.output() for request in self._batch.go_on(asked))
        finally:
            if (error := sys.exception()) is not None:  # tell those who wait; it is raised further
                with self._changed:
                    self.background_thread_status.fatal_error = error
                    left = {*(asked or []), *self._batch.rows, *self._waiting}
                self._outputs.put(request.output(error) for request in left if not request.cancelled)

    def _next(self) -> list[_Request] | None:
        """Requests that join now; waits while there is nothing to do. None: stopped, and all is answered."""
        with self._changed:
            going = any(not request.done for request in self._batch.rows)
            while not (going or self._waiting or self._stopping):
                self._changed.wait()
            if not (going or self._waiting):
                return None
            free = MOST - sum(not request.done for request in self._batch.rows)
            joining, self._waiting = self._waiting[:free], self._waiting[free:]
            return [request for request in joining if not request.cancelled]


class _Batch:
    """The rows that are decoded together."""

    def __init__(self, model: PreTrainedModel, processors: LogitsProcessorList, draw: bool):
        self.model, self._processors, self._draw = model, processors, draw
        self.rows: list[_Request] = []
        self._states: list[Tensor] = []  # of each layer, (S, ..)
        self._newest = torch.zeros(0, 1, dtype=torch.long, device=model.device)  # (S, 1)
        self._cache: Any = None
        self._decode: Any = None
        self._layers = [(spec["type"], None) for spec in model.config.layer_mixers]

    def go_on(self, asked: list[_Request]) -> list[_Request]:
        """Let requests join, write a token for each row; the requests that are to be told."""
        told = [request for request in [*self.rows, *asked] if not request.done]
        self._change(asked)
        if self.rows:
            logits = self._decode(input_ids=self._newest, past_key_values=self._cache, use_cache=True).logits
            newest = self._choose(logits[: len(self.rows), -1])
            self._newest[: len(newest), 0] = newest
            for request, token in zip(self.rows, newest.tolist(), strict=True):
                request.written.append(token)
        for row, request in enumerate(self.rows):
            if request.keep is not None and request.done and not request.cancelled:
                self._keep(row, request)
        return [r for r in told if not r.cancelled and (r.done or r.streaming)]

    def _change(self, asked: list[_Request]) -> None:
        """Put the rows together again, without those that are done and with those that join."""
        stay = [row for row, request in enumerate(self.rows) if not request.done]
        if not asked and len(stay) == len(self.rows):
            return
        if self._cache is not None:  # the decoding step wrote to the tensors in the cache
            self._states = [layer.recurrent_states[0] for layer in self._cache.layers]
        rows, newest = [self.rows[row] for row in stay], [self._newest[stay]]
        states = [[state[stay]] for state in self._states] or [[] for _ in self._layers]
        for group in _alike(asked):
            logits, read = self._read(group)
            tokens = self._choose(logits)
            for request, token in zip(group, tokens.tolist(), strict=True):
                request.written.append(token)
            go = [row for row, request in enumerate(group) if not request.done]
            rows += [group[row] for row in go]
            newest.append(tokens[go].unsqueeze(1))
            for kept, state in zip(states, read, strict=True):
                kept.append(state[go])
        self.rows, self._cache, self._decode = rows, None, None  # a step gives its memory back first
        size = len(rows) if self.model.device.type != "cuda" else 1 << max(0, len(rows) - 1).bit_length()
        self._newest = _stacked(newest, size)
        self._states = [_stacked(kept, size) for kept in states]
        self._cache = cache_of({f"{i}.state": s for i, s in enumerate(self._states)}, 1, self._layers)
        self._decode = Decoder(self.model) if can_decode(self.model) else self.model

    def _read(self, group: list[_Request]) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, V) after prompts and the states of each layer, (B, ..)."""
        width = max(len(request.prompt) for request in group)
        device = self.model.device
        ids = torch.tensor([[0] * (width - len(r.prompt)) + r.prompt for r in group], device=device)
        mask = torch.tensor(
            [[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in group], device=device
        )
        cache = make_cache(self.model.config)
        if width > _LONG and len(group) == 1:
            kept = prefix_cache(self.model, ids, {"past_key_values": cache, "use_cache": True})
            if kept is not None:
                group[0].keep = kept.read(self.model, ids, cache)
        mask = None if bool(mask.all()) else mask
        out = prefill(
            self.model, ids[:, int(tokens_seen(cache)) :], past_key_values=cache, attention_mask=mask
        )
        return out.logits[:, -1], [layer.recurrent_states[0] for layer in cache.layers]

    def _keep(self, row: int, request: _Request) -> None:
        """Give the prefix cache the states at the end of an answer, whose last token was not fed."""
        ids = torch.tensor([[*request.prompt, *request.written]])
        states = [layer.recurrent_states[0][row : row + 1] for layer in self._cache.layers]
        tensors = {f"{i}.state": state for i, state in enumerate(states)}
        request.keep(ids, cache_of(tensors, ids.shape[1] - 1, self._layers))
        request.keep = None

    def _choose(self, logits: Tensor) -> Tensor:
        return choose(logits.float(), None, self._processors, self._draw)


class _Outputs:
    """Where requests' outputs go: to a function on an event loop, or to whoever asks."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._newest: dict[str, GenerationOutput] = {}  # of requests without a handler
        self._handlers: dict[str, tuple[Any, asyncio.AbstractEventLoop]] = {}

    def put(self, outputs: Iterable[GenerationOutput]) -> None:
        calls: dict[asyncio.AbstractEventLoop, list[tuple[Any, GenerationOutput]]] = {}
        with self._changed:
            for output in outputs:
                if output.request_id not in self._handlers:
                    self._newest[output.request_id] = output
                    continue
                handler, loop = self._handlers[output.request_id]
                calls.setdefault(loop, []).append((handler, output))
                if output.is_finished():
                    del self._handlers[output.request_id]
            for loop, of_loop in calls.items():
                if not loop.is_closed():
                    loop.call_soon_threadsafe(_call, of_loop)
            self._changed.notify_all()

    def handle(self, request_id: str, handler: Any) -> None:
        loop = asyncio.get_running_loop()
        with self._changed:  # a request may be answered before its handler is there
            early = self._newest.pop(request_id, None)
            if early is not None:
                loop.call_soon(handler, early)
            if early is None or not early.is_finished():
                self._handlers[request_id] = handler, loop

    def forget(self, request_id: str) -> None:
        with self._changed:
            self._handlers.pop(request_id, None)
            self._newest.pop(request_id, None)

    def get(self, request_id: str | None, timeout: float | None) -> GenerationOutput | None:
        with self._changed:
            there = lambda: self._newest if request_id is None else request_id in self._newest  # noqa: E731
            if not self._changed.wait_for(there, timeout):
                return None
            return self._newest.pop(next(iter(self._newest)) if request_id is None else request_id)


def _call(calls: list[tuple[Any, GenerationOutput]]) -> None:
    for handler, output in calls:
        handler(output)


def _processors(model: PreTrainedModel, config: GenerationConfig) -> LogitsProcessorList:
    processors = model._get_logits_processor(config)
    other = [type(p).__name__ for p in processors if type(p) not in LOOK_AT_SCORES]
    other += [
        name for name in ("stop_strings", "num_return_sequences") if vars(config)[name] not in (None, 1)
    ]
    if other:
        raise ValueError(
            f"continuous batching knows temperature, top_k, top_p and min_p, not {', '.join(other)}: leave "
            "them out, call generate, or start transformers serve without --continuous-batching"
        )
    return processors


def _alike(requests: list[_Request]) -> list[list[_Request]]:
    """Requests whose prompts are read together: of like length, as padding costs as much as tokens."""
    groups: list[list[_Request]] = []
    for request in sorted(requests, key=lambda r: len(r.prompt)):
        length, last = len(request.prompt), groups[-1] if groups else []
        near = last and length <= 2 * len(last[0].prompt) and length <= _LONG
        if near and length * (len(last) + 1) <= _TOGETHER:
            last.append(request)
        else:
            groups.append([request])
    return groups


def _stacked(parts: list[Tensor], size: int) -> Tensor:
    """Rows of all parts, and zeros up to `size` rows."""
    rows = torch.cat(parts)
    return torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])]) if size > len(rows) else rows
