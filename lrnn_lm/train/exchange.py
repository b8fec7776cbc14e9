"""What ranks exchange in each step, beside gradients: one all-reduce, and one transfer to the host."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch import distributed as dist

from ..model.loss import IGNORE
from ..runs.checkpoint import Position
from .watch import straggler


@dataclass(frozen=True)
class StepResult:
    """What came of a step, the same on every rank."""

    loss: float  # mean over the valid targets of the global step, nats; without the z-loss
    grad_norm: float  # before clipping
    applied: bool  # whether the update was done: loss and gradient norm were finite, and no outliers
    outlier: bool = False  # whether they were finite and `train.guard` had the step skipped
    stop: bool = False  # whether any rank was asked to stop
    written: int = 0  # ranks that have written their part of the checkpoint in progress
    unwritten: bool = False  # whether any rank could not write its metrics
    # Whether the minutes between savings, validations, scorings have passed on the main rank.
    timers: tuple[bool, bool, bool] = (False, False, False)
    seconds: tuple[float, ...] = ()  # each rank's first forward pass, to find slow ranks
    z_loss: float = 0.0  # its part of what was minimised
    waited: float = 0.0  # seconds that the host waited for the device

    def count(self, position: Position, rows: int, window: int) -> None:
        """Move the position over this step of `rows` rows. window: of `train.guard`, 0 without it."""
        position.samples += rows
        position.step += 1
        position.outliers += self.outlier
        position.skipped += not self.applied
        position.bad_in_a_row = 0 if self.applied else position.bad_in_a_row + 1
        if self.applied and window:
            position.recent = [*position.recent, [self.loss, self.grad_norm]][-window:]

    def line(self, position: Position, tokens: int, lr: float, measured: dict[str, Any]) -> dict[str, Any]:
        """The line of metrics.jsonl. `position` and `tokens` count this step; `measured` is throughput's."""
        return {
            "step": position.step,
            "tokens": tokens,
            "loss": self.loss,
            **({"z_loss": self.z_loss} if self.z_loss else {}),
            "lr": lr,
            "grad_norm": self.grad_norm,
            **measured,
            "skipped": position.skipped,
            **straggler(self.seconds),
        }


def targets_per_rank(micro_batches: list[dict[str, Tensor]], accelerator: Accelerator) -> Tensor:
    """() on the device: valid targets of the global step, divided by the number of ranks; at least 1.

    Gradients are averaged over ranks, so a rank divides its summed loss by this to get the mean over all
    targets of the step.
    """
    count = sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches)
    total = torch.tensor(float(count), dtype=torch.float64).to(accelerator.device, non_blocking=True)
    if accelerator.num_processes > 1:
        dist.all_reduce(total)
    return (total / accelerator.num_processes).clamp_min(1).float()


def exchange(
    losses: Tensor, grad_norm: Tensor, flags: list[bool], seconds: float | None, accelerator: Accelerator
) -> StepResult:
    """Sum over ranks what the update and the next steps depend on.

    losses: (2,) this rank's part of the loss, and of the z-loss in it. grad_norm: () of all
    ranks. flags: this rank's stop, written, unwritten and three timers, as in StepResult. seconds: of this
    rank's forward pass; None on all or on none.
    """
    ranks = accelerator.num_processes
    slots = [0.0] * ranks if seconds is not None else []  # their sum over ranks holds every rank's seconds
    if seconds is not None:
        slots[accelerator.process_index] = seconds
    # One tensor for all: each transfer to the host waits for the device.
    own = torch.tensor([*flags, *slots], dtype=torch.float64).to(accelerator.device, non_blocking=True)
    # The main rank's norm on all: a last bit that differed could have one rank skip what another applies.
    # A step of which all is frozen has its norm on the CPU.
    norm = grad_norm.to(losses.device).double().view(1) * accelerator.is_main_process
    sums = torch.cat([losses.double() / ranks, own, norm])
    if ranks > 1:
        dist.all_reduce(sums)
    began = time.perf_counter()
    mean_loss, z_loss, stop, written, unwritten, save, evaluate, score, *slots, norm = sums.tolist()
    return StepResult(
        mean_loss - z_loss,
        norm,
        z_loss=z_loss,
        applied=math.isfinite(mean_loss) and math.isfinite(norm),
        stop=stop > 0,
        written=int(written),
        unwritten=unwritten > 0,
        timers=(save > 0, evaluate > 0, score > 0),
        seconds=tuple(slots),
        waited=time.perf_counter() - began,
    )


def on_any_rank(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Whether each flag is set on any rank; every rank must call it."""
    if accelerator.num_processes == 1:
        return list(flags)
    total = torch.tensor(flags, dtype=torch.int32, device=accelerator.device)
    dist.all_reduce(total)
    return (total > 0).tolist()
