"""What a step came to, and the line of metrics.jsonl that says so."""

from dataclasses import dataclass
from typing import Any

from ..runs.checkpoint import Position
from .watch import straggler


@dataclass(frozen=True)
class StepResult:
    """What a step came to, the same on every rank."""

    loss: float  # mean over the valid targets of the global step, nats
    grad_norm: float  # before clipping
    applied: bool  # whether the update was done: loss and gradient norm were finite
    stop: bool = False  # whether any rank was asked to stop
    written: int = 0  # ranks that have written their part of the checkpoint in progress
    unwritten: bool = False  # whether any rank could not write its metrics
    clocks: tuple[bool, bool] = (False, False)  # due by the main rank's clock: saving, validation
    seconds: tuple[float, ...] = ()  # of each rank's device, for the search for slow ranks
    waited: float = 0.0  # seconds that the host waited for the device


def step_line(
    result: StepResult, position: Position, tokens_per_step: int, lr: float, measured: dict[str, Any]
) -> dict[str, Any]:
    """The line of the step that `position` has just done; `measured` is the throughput's part of it."""
    return {
        "step": position.step,
        "tokens": position.step * tokens_per_step,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        **measured,
        "skipped": position.skipped,
        **straggler(result.seconds),
    }
