"""`train.guard`: whether a step's loss or gradient norm is far above those of the last steps."""

import math
from collections.abc import Sequence

from ..recipe.train import GuardSection


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
