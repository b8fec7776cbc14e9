"""Rows of the synthetic tasks on a device, for many steps at once.

Group elements are drawn and multiplied on the device, where a million rows take milliseconds. They equal
`SyntheticTask.rows` bit for bit (SplitMix64 in wrapping 64-bit arithmetic). Rows of other tasks come from
`SyntheticTask.rows` itself, a finite set once, and are read in the trainer's order.

Legend: S steps, B rows a step, T time.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lrnn_lm.data import SYNTHETIC_TASKS, SyntheticTask
from lrnn_lm.data.order import rows_of_samples
from lrnn_lm.data.pack import IGNORED
from lrnn_lm.data.synthetic.draws import Draws
from lrnn_lm.data.synthetic.state_tracking import GROUPS, composition_table

WEYL, MIX_1, MIX_2 = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits as of unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """`lrnn_lm.data.order.mix` of int64 numbers, which wrap around as unsigned ones do."""
    x = x + WEYL
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def group_rows(
    task: SyntheticTask, seed: int, split: str, first: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Inputs and labels, each (count, T) int64 on the device, of a group's rows from `first` on."""
    start = int(task.options["start"])
    table = torch.from_numpy(composition_table(task.name)).to(device)
    n, length = len(table), task.length - start
    base = torch.from_numpy(Draws(seed, f"{task.name}/{split}", np.arange(first, first + count)).base)
    counter = mix(torch.arange(length, device=device))
    drawn = mix(base.to(device) + counter)  # (count, length)
    inputs = torch.full((count, task.length), n, device=device)
    inputs[:, start:] = (_shift(drawn, 33) * n) >> 31
    labels = torch.full_like(inputs, IGNORED)
    state = torch.zeros(count, dtype=torch.long, device=device)
    for t in range(start, task.length):
        state = table[inputs[:, t], state]
        labels[:, t] = state
    return inputs, labels


def task_rows(
    task: SyntheticTask, seed: int, split: str, first: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Inputs and labels, each (count, T) int64 on the device, of any task's rows from `first` on."""
    if task.name in GROUPS:
        return group_rows(task, seed, split, first, count, device)
    made = _made(task.name, task.length, tuple(task.options.items()), seed, split, first, count)
    return made[0].to(device), made[1].to(device)


@lru_cache(maxsize=16)
def _made(
    name: str,
    length: int,
    options: tuple[tuple[str, float], ...],
    seed: int,
    split: str,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Rows on the CPU, kept: other runs of this process want the same, and fuzzy recall takes seconds."""
    task = SyntheticTask(name, length, dict(options))
    inputs, labels = task.rows(seed, split, np.arange(first, first + count))
    return torch.from_numpy(inputs), torch.from_numpy(labels)


class TrainingRows:
    """The training rows of a task and a seed: `fill` puts those of the next steps into fixed memory.

    inputs, labels: (S, B, T) on the device, at addresses that never change, as a CUDA graph needs.
    """

    def __init__(
        self,
        task: SyntheticTask,
        seed: int,
        rows: int,
        steps: int,
        device: torch.device,
        examples: int | None = None,
    ) -> None:
        self.task, self.seed, self.rows, self.device = task, seed, rows, device
        self.inputs = torch.zeros(steps, rows, task.length, dtype=torch.long, device=device)
        self.labels = torch.zeros_like(self.inputs)
        self.examples = examples or SYNTHETIC_TASKS[task.name].examples
        self._kept: tuple[Tensor, Tensor] | None = None

    def fill(self, first_step: int, steps: int) -> None:
        """Steps first_step .. first_step + steps - 1; those of a finite set in the trainer's order."""
        first, count = first_step * self.rows, steps * self.rows
        if self.examples is None:
            made = task_rows(self.task, self.seed, "train", first, count, self.device)
        else:
            if self._kept is None:
                self._kept = task_rows(self.task, self.seed, "train", 0, self.examples, self.device)
            order = torch.from_numpy(rows_of_samples(first, count, self.examples, self.seed)).to(self.device)
            made = self._kept[0][order], self._kept[1][order]
        for kept, new in zip((self.inputs, self.labels), made, strict=True):
            kept[:steps] = new.view(steps, self.rows, -1)
