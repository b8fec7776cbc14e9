"""Continuous batching: requests join and leave one decoding batch between any two tokens.

`transformers serve --continuous-batching` and `generate_batch` ask a model for a manager of requests. That of
transformers puts the tokens of all requests into one row, and pages of keys and values tell them apart. A
recurrent state has no pages and needs none: it is of constant size, so a request joins when its states are
put beside the others as one more row (`batch.py`). `StateBatching` has those methods of transformers' manager
that the server, `generate_batch` and transformers' examples call.
"""

import asyncio
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from .batch import Batch, Choice, Request
from .decode import MOST_FUSED
from .sample import LOOK_AT_SCORES

MOST = MOST_FUSED  # requests at once; the others wait
_NOT_DONE = ("num_beams", "num_return_sequences", "min_length", "min_new_tokens", "max_time", "stop_strings",
             "bad_words_ids", "penalty_alpha", "prompt_lookup_num_tokens", "dola_layers")  # fmt: skip


class StateBatching:
    """A manager of requests to one model whose layers are all recurrent.

    Raises ValueError for a model with attention, and for choices of tokens that look at the text before.
    """

    warmed_up = True

    def __init__(self, model: PreTrainedModel, config: GenerationConfig):
        check_recurrent(model.config)
        self._model = model.eval()
        self.configure(config)
        self._batch = Batch(model)
        self._outputs = _Outputs()
        self._changed = threading.Condition()
        self._waiting: list[Request] = []
        self._live: dict[str, Request] = {}  # these too, until they are done
        self._numbers = itertools.count()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.background_thread_status = SimpleNamespace(fatal_error=None)

    def configure(self, config: GenerationConfig) -> None:
        """Set the settings of the requests that follow. Raises ValueError for those that it does not know."""
        self._choice = Choice(_processors(self._model, config), bool(config.do_sample))
        self._config = config

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
        try:
            most = check_prompt(input_ids, self._config, self._model.config.vocab_size, max_new_tokens)
        except ValueError:
            with self._changed:
                if request_id not in self._live:  # the server has registered a handler for its answer
                    self._outputs.forget(request_id)
            raise
        ends = self._config.eos_token_id if eos_token_id is None else eos_token_id
        request = Request(
            request_id or f"req_{next(self._numbers)}",
            list(input_ids),
            most,
            {*ends} if isinstance(ends, list) else {ends},
            streaming,
            self._choice,
        )
        with self._changed:
            if self._stopping or self.background_thread_status.fatal_error is not None:
                raise RuntimeError("the batch has stopped and takes no request")
            if request.id in self._live and not self._live[request.id].done:
                raise ValueError(f"a request {request.id!r} is not answered yet: give this one another id")
            self._waiting.append(request)
            self._live[request.id] = request
            self._changed.notify_all()
        return request.id

    def add_requests(self, inputs: Iterable[list[int]], **options: Any) -> list[str]:
        """Several requests of the same options."""
        return [self.add_request(ids, **options) for ids in inputs]

    def cancel_request(self, request_id: str) -> None:
        """Let a request leave without another output."""
        with self._changed:
            if request_id in self._live:
                self._live[request_id].cancelled = True
        self._outputs.forget(request_id)

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], None]) -> None:
        """Have a request's outputs passed to a function, on the event loop that this is called from."""
        self._outputs.handle(request_id, callback)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> Any:
        """The newest output of this request or any that has no handler; None after so many seconds."""
        return self._outputs.get(request_id, timeout)

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Outputs of all requests as they come, until the manager is stopped."""
        while self.is_running():
            if (output := self.get_result(timeout=0.1)) is not None:
                yield output

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """Outputs of one request as they come, to its last."""
        while self.is_running():
            if (output := self.get_result(request_id, timeout=0.1)) is not None:
                yield output
                if output.is_finished():
                    return

    @torch.no_grad()
    def _run(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)
        try:
            while (asked := self._next()) is not None:
                told = self._batch.go_on(asked)
                self._outputs.put(request.output() for request in told if not request.cancelled)
        finally:
            if (error := sys.exception()) is not None:  # tell those who wait; it is raised further
                with self._changed:
                    self.background_thread_status.fatal_error = error
                    left = [request for request in self._live.values() if not request.cancelled]
                self._outputs.put(request.output(error) for request in left)

    def _next(self) -> list[Request] | None:
        """Requests that join now; waits while there is nothing to do. None: stopped, and all is answered."""
        with self._changed:
            while True:
                self._live = {id: request for id, request in self._live.items() if not request.done}
                self._waiting = [request for request in self._waiting if not request.done]
                if self._live or self._stopping:
                    break
                self._changed.wait()
            if not self._live:
                return None
            free = MOST - (len(self._live) - len(self._waiting))
            joining, self._waiting = self._waiting[:free], self._waiting[free:]
            return joining


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
            if request_id in self._handlers:  # whose caller would wait for ever
                raise ValueError(f"a request {request_id!r} is not answered yet: give this one another id")
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


def check_prompt(
    ids: list[int], config: GenerationConfig, vocab_size: int, max_new_tokens: int | None = None
) -> int:
    """How many tokens follow a prompt at most. Raises ValueError for a prompt that cannot be answered."""
    kinds = set(map(type, ids)) if isinstance(ids, list | tuple) else {type(ids)}  # quick for long prompts
    if not all(issubclass(kind, Integral) and kind is not bool for kind in kinds):
        raise ValueError("the prompt must be a list of whole numbers, its tokens (of a tensor: tolist())")
    if not ids:
        raise ValueError("the prompt has no token: begin it with BOS")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(
            f"the prompt has tokens outside of the model's {vocab_size}: is it another's tokenizer?"
        )
    most = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    if most is not None and most < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {most}")
    if most is None and config.max_length is not None:  # of the prompt and the answer
        most = config.max_length - len(ids)
        if most < 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_length is {config.max_length}, "
                "which counts them too: give max_new_tokens instead"
            )
    return most or 20  # as `generate`


def check_recurrent(config: PreTrainedConfig) -> None:
    """Raise ValueError unless every layer of a model is recurrent."""
    if {*config.layer_types} != {"linear_attention"}:
        raise ValueError(
            "continuous batching joins recurrent states, and this model has attention layers too: call "
            "generate, or start the server without --continuous-batching"
        )


def _processors(model: PreTrainedModel, config: GenerationConfig) -> LogitsProcessorList:
    other = [name for name in _NOT_DONE if vars(config).get(name) not in (None, 0, 1)]
    processors = LogitsProcessorList() if other else model._get_logits_processor(config)
    other += [type(p).__name__ for p in processors if type(p) not in LOOK_AT_SCORES]
    if other:
        raise ValueError(
            f"continuous batching knows temperature, top_k, top_p and min_p, not {', '.join(other)}: leave "
            "them out, call generate, or start transformers serve without --continuous-batching"
        )
    return processors
