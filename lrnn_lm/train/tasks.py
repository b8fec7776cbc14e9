"""`eval.during`: lm-eval tasks scored on the live model between two steps, by all ranks together.

The scorer comes from the caller, as `train` does not import `evaluate`. Here is what keeps the run as it was,
and the ranks in step: each scores a share of the requests, in batches of its own number.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..files import random_state_kept
from .exchange import on_any_rank
from .parallel import is_sharded, reshard
from .stop import AskedToStopError, OtherRankError

_SHOWN = 8  # numbers in the progress line

Scorer = Callable[..., dict[str, float]]
"""scorer(model, tokenizer, rank, size, wait) -> {"task/metric": value} on the main rank, {} on the others.

Raises ValueError, on every rank, for tasks that cannot be scored. wait() returns once all ranks have called
it; the scorer calls it before ranks exchange answers.
"""


def score_live(
    scorer: Scorer,
    model: nn.Module,
    tokenizer: Any,
    accelerator: Accelerator,
    meet: Callable[..., bool],
    save: Callable[[], None],
) -> dict[str, float]:
    """The scores of the model as it is; every rank calls it.

    meet(working, failed) says whether any rank works; all call it before each forward pass of any. It may
    raise; OtherRankError on all if any has failed. save() is called before an error ends the run, wherever
    all ranks can join it: not where one fails within a pass that others wait in (FSDP2). Of ranks with the
    same ValueError the main one tells it, the others raise it without words.
    """
    steps = _InStep(model, meet)
    try:
        return _scores(scorer, model, tokenizer, accelerator, steps)
    except AskedToStopError:
        raise
    except OtherRankError:
        on_any_rank(accelerator, False)
        save()
        raise ValueError("") from None
    except Exception as error:  # such as no memory, or on one machine no data set
        told = accelerator.num_processes == 1 or steps.tell_failure()
        is_mistake = isinstance(error, ValueError)
        # One that was not told is seen where all look at the task's requests, so all ranks have it.
        (main_has_it,) = on_any_rank(accelerator, accelerator.is_main_process) if told else [is_mistake]
        if told or is_mistake:
            save()
        if is_mistake and main_has_it and not accelerator.is_main_process:
            raise ValueError("") from None
        raise


def _scores(
    scorer: Scorer, model: nn.Module, tokenizer: Any, accelerator: Accelerator, steps: "_InStep"
) -> dict[str, float]:
    frozen = gc.get_freeze_count() > 0
    try:
        # Eagerly: a compiled block would be compiled for every length of a batch, up to torch's limit, after
        # which a shape of training that was not met yet would not be compiled any more.
        with (
            random_state_kept(accelerator.device),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            steps.hooked(),
        ):
            return scorer(model, tokenizer, accelerator.process_index, accelerator.num_processes, steps.wait)
    finally:
        reshard(model)
        if frozen:  # lm-eval's modules and task lists stay: see Trainer._train
            gc.collect()
            gc.freeze()


class _InStep:
    """All ranks meet before each forward pass of any, until each has called `wait`.

    A rank that waits meets the others until none is working. Under FSDP2 it runs a pass of one token each
    time: a pass gathers parameters from all ranks.
    """

    def __init__(self, model: nn.Module, meet: Callable[..., bool]):
        self._model, self._meet = model, meet
        self._waiting = False
        self._expected = True  # whether the others go on to a meeting, and not to exchange answers
        self._inside = False  # of a pass

    @contextmanager
    def hooked(self) -> Iterator[None]:
        # First of all hooks, before FSDP2's. Beside a hook, decoding calls no kernels of its own.
        before = self._model.register_forward_pre_hook(self._before, prepend=True)
        after = self._model.register_forward_hook(self._after)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _before(self, *_: Any) -> None:
        if not self._waiting:
            self._expected = False  # if this raises, they do not come to another one
            self._meet(True)
            self._expected = self._inside = True

    def _after(self, *_: Any) -> None:
        self._inside = False

    def wait(self) -> None:
        """Return once all ranks have called it."""
        self._waiting, self._expected = True, False
        while self._meet(False):
            if is_sharded(self._model):
                self._model(torch.zeros(1, 1, dtype=torch.long, device=self._model.device))
        self._waiting = False

    def tell_failure(self) -> bool:
        """Have the other ranks' next meeting raise OtherRankError; whether there is one."""
        if self._expected and not (self._inside and is_sharded(self._model)):
            with suppress(OtherRankError):
                self._meet(False, failed=True)
            return True
        return False


def in_words(found: dict[str, float]) -> str:
    """The first scores, for the progress line."""
    shown = [f"{name} {value:.4g}" for name, value in list(found.items())[:_SHOWN]]
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "  ".join(["tasks", *shown, *more])
