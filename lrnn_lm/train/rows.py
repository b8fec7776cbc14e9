"""The rows of the next steps, read one step ahead, and how long the device may have waited for them."""

import time
from collections.abc import Generator

import torch
from accelerate import Accelerator

from ..data import TrainLoader
from ..files import words_of
from ..recipe import Recipe
from ..runs.checkpoint import Position
from .exchange import on_any_rank
from .sequence import SequenceParallel
from .sources import Prepared, mixture, parts_of
from .stop import Stopped

Batch = dict[str, torch.Tensor]


class Rows:
    """Micro-batches of a rank, or its part of them, step by step, from a position on."""

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        accelerator: Accelerator,
        position: Position,
        sequence: SequenceParallel,
    ):
        self._step, self.sequence = position.step, sequence  # the step whose rows are read next
        self._recipe, self._accelerator = recipe, accelerator
        self._batches: Generator[list[Batch], None, None] | None = None
        self._ahead: list[Batch] | None = None
        self._waited = 0.0
        self._problem: Stopped | ValueError | None = None  # why text cannot be read
        self.loader = TrainLoader(
            [part.train for part in parts_of(prepared).values()],
            recipe.data.sequence_length,
            recipe.seed,
            recipe.rows_at(0),  # what all later steps are multiples of
            recipe.train.micro_batch,
            rank=sequence.group,
            world_size=sequence.groups,
            num_workers=recipe.data.num_workers,
            position=position.samples,
            pin_memory=accelerator.device.type == "cuda",
            curriculum=[(stage.length, stage.steps) for stage in recipe.data.curriculum],
            mixture=mixture(recipe),
            in_order=recipe.data.rows_in_order or 1,
        )

    def start(self) -> None:
        """Begin to read: workers start here. All ranks call it, and end if one cannot read its first rows."""
        self._batches = iter(self.loader)
        self.fetch()
        (unread,) = on_any_rank(self._accelerator, self.unread)
        self.check()
        if unread:
            raise ValueError("")  # told by that rank
        self._waited = 0.0  # before the first step

    def take(self) -> list[Batch]:
        """The next step's micro-batches, which were read ahead."""
        assert self._ahead is not None
        taken, self._ahead = self._ahead, None
        return taken

    def fetch(self) -> None:
        """Read the next step's rows ahead; called while the device is busy with the step before.

        If they cannot be read, see `lost`.

        The time counts as waiting only if the device ran out of work meanwhile; on a CPU it always counts.
        """
        began = time.perf_counter()
        event = None
        if self._accelerator.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        steps = self._recipe.rows_at(self._step) // self._recipe.rows_at(0)
        try:
            self._ahead = [self.sequence.own(batch) for _ in range(steps) for batch in next(self._batches)]
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            self.lost(f"the rows of step {self._step + 1}", error)
        self._step += 1
        if event is None or event.query():  # the device has done all that it was given before
            self._waited += time.perf_counter() - began

    def lost(self, what: str, error: Exception) -> None:
        """Note that text is gone, or its disk, or a worker. All ranks learn of it where they would of a
        signal: they save, and `check` ends the run."""
        *_, words = words_of(error).splitlines() or [repr(error)]  # a worker's error ends with the words
        saved = "The steps before are saved: run the same command again to resume"
        self._problem = ValueError(f"could not read {what}: {words}. {saved}")
        if isinstance(error, RuntimeError):  # a killed worker, which may well not happen again
            self._problem = Stopped(f"{self._problem}; with fewer data.num_workers if memory was short")

    @property
    def unread(self) -> bool:
        """Whether there is text that could not be read."""
        return self._problem is not None

    def check(self) -> None:
        """Raise ValueError if there is text that could not be read, Stopped if a worker was killed."""
        if self._problem is not None:
            raise self._problem

    def waited(self) -> float:
        """Seconds since this was last asked."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def empty(self) -> Batch:
        """This rank's part of a batch of token 0 without resets, in the shape of a step's first pass."""
        rows = min(self._recipe.train.micro_batch, self.loader.share)
        nothing = torch.zeros(rows, self.sequence.piece * self.sequence.size, dtype=torch.long)
        return self.sequence.own({"input_ids": nothing, "labels": nothing, "reset": nothing.bool()})

    def close(self) -> None:
        """End the loader's workers: they ignore signals, so the process would wait for them when it exits."""
        if self._batches is not None:
            self._batches.close()
