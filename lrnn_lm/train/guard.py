"""Steps without an update: those that `train.guard` finds far above the last ones, and too many in a row."""

import math
from collections.abc import Sequence
from dataclasses import replace

from ..recipe.train import GuardSection
from ..runs.checkpoint import Position
from .exchange import StepResult


def guarded(result: StepResult, recent: list[list[float]], guard: GuardSection | None) -> StepResult:
    """The result of a step, not applied if it is an outlier."""
    if guard and result.applied and is_outlier((result.loss, result.grad_norm), recent, guard):
        return replace(result, applied=False, outlier=True)
    return result


def is_outlier(now: Sequence[float], recent: Sequence[Sequence[float]], guard: GuardSection) -> bool:
    """Whether a value of `now` (loss, gradient norm) is above its mean in `recent` by more than
    `guard.deviations` standard deviations. Never before the window is full."""
    window = recent[-guard.window :]
    if len(window) < guard.window:
        return False
    return any(_above(value, values) > guard.deviations for value, *values in zip(now, *window, strict=True))


def _above(value: float, values: Sequence[float]) -> float:
    """In standard deviations of `values`; infinite if they are all the same and `value` is larger."""
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in values) / len(values))
    if deviation == 0:
        return math.inf if value > mean else 0.0
    return (value - mean) / deviation


def after_bad_steps(position: Position, guarded: bool, last: str) -> str:
    """Why a run ends after too many steps without an update; `last`: the checkpoint that it resumes from."""
    beyond = ", or beyond train.guard," if guarded else ""
    advice = " or raise train.guard.deviations" if guarded else ""
    return (
        f"the loss or its gradient was not finite{beyond} for {position.bad_in_a_row} steps in a "
        f"row, up to step {position.step}; lower optim.lr{advice}, then run again to resume from {last}"
    )
