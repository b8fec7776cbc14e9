"""`eval.during`: lm-eval tasks scored on the live model between two steps, by all ranks together.

The scorer comes from the caller, as `train` does not import `evaluate`. Here is what keeps the run as it was,
and the ranks in step: each scores a share of the requests, in batches of its own number.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..files import random_state_kept
from .parallel import is_sharded, reshard

_SHOWN = 8  # numbers in the progress line

Scorer = Callable[..., dict[str, float]]
"""scorer(model, tokenizer, rank, size, wait) -> {"task/metric": value} on the main rank, {} on the others.

Raises ValueError, on every rank, for tasks that cannot be scored. wait() returns once all ranks have called
it; the scorer calls it before ranks exchange answers.
"""


def score_live(
    scorer: Scorer, model: nn.Module, tokenizer: Any, accelerator: Accelerator, meet: Callable[[bool], bool]
) -> dict[str, float]:
    """The scores of the model as it is; every rank calls it.

    meet(working) says whether any rank works; all call it before each forward pass of any. It may raise.
    """
    frozen = gc.get_freeze_count() > 0
    try:
        # Eagerly: a compiled block would be compiled for every length of a batch, up to torch's limit, after
        # which a shape of training that was not met yet would not be compiled any more.
        with (
            random_state_kept(accelerator.device),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            _in_step(model, meet) as wait,
        ):
            return scorer(model, tokenizer, accelerator.process_index, accelerator.num_processes, wait)
    finally:
        reshard(model)
        if frozen:  # lm-eval's modules and task lists stay: see Trainer._train
            gc.collect()
            gc.freeze()


@contextmanager
def _in_step(model: nn.Module, meet: Callable[[bool], bool]) -> Iterator[Callable[[], None]]:
    """Inside, all ranks meet before each forward pass of any; what it gives is the scorer's `wait`.

    A rank that waits meets the others until none is working. Under FSDP2 it runs a pass of one token each
    time: a pass gathers parameters from all ranks.
    """
    waiting = False

    def before(*_: Any) -> None:
        if not waiting:
            meet(True)

    def wait() -> None:
        nonlocal waiting
        waiting = True
        while meet(False):
            if is_sharded(model):
                model(torch.zeros(1, 1, dtype=torch.long, device=model.device))
        waiting = False

    # First of all hooks, before FSDP2's. Decoding calls no kernels of its own beside a hook, only the model.
    handle = model.register_forward_pre_hook(before, prepend=True)
    try:
        yield wait
    finally:
        handle.remove()


def in_words(found: dict[str, float]) -> str:
    """The first scores, for the progress line."""
    shown = [f"{name} {value:.4g}" for name, value in list(found.items())[:_SHOWN]]
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "  ".join(["tasks", *shown, *more])
