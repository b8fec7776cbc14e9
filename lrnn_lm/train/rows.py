"""The rows of the steps to come, read one step ahead, and how long the device may have waited for them."""

import time
from collections.abc import Generator

import torch
from accelerate import Accelerator

from ..data import PreparedData, SyntheticData, TrainLoader
from ..recipe import Recipe
from ..runs.checkpoint import Position

Batch = dict[str, torch.Tensor]


class Rows:
    """Micro-batches of a rank, step by step, from a position on."""

    def __init__(
        self,
        recipe: Recipe,
        prepared: PreparedData | SyntheticData,
        accelerator: Accelerator,
        position: Position,
    ):
        """Raises ValueError if a step's rows do not split over the ranks."""
        self._recipe, self._accelerator = recipe, accelerator
        self._batches: Generator[list[Batch], None, None] | None = None
        self._ahead: list[Batch] | None = None
        self._waited = 0.0
        self.loader = TrainLoader(
            prepared.train,
            recipe.data.sequence_length,
            recipe.seed,
            recipe.rows_per_step,
            recipe.train.micro_batch,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=recipe.data.num_workers,
            position=position.samples,
            pin_memory=accelerator.device.type == "cuda",
            curriculum=[(stage.length, stage.steps) for stage in recipe.data.curriculum],
        )

    def start(self) -> None:
        """Begin to read: workers start here."""
        self._batches = iter(self.loader)

    def take(self) -> list[Batch]:
        """The next step's micro-batches."""
        if self._ahead is None:
            self.fetch()
        taken, self._ahead = self._ahead, None
        return taken

    def fetch(self) -> None:
        """Read them already; called while the device is busy with the step before.

        Time counts as waiting unless the device still had work when they were there: on a CPU, always.
        """
        began = time.perf_counter()
        given = None
        if self._accelerator.device.type == "cuda":
            given = torch.cuda.Event()
            given.record()
        self._ahead = next(self._batches)
        if given is None or given.query():
            self._waited += time.perf_counter() - began

    def waited(self) -> float:
        """Seconds since this was last asked."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def empty(self) -> Batch:
        """A micro-batch in which there is nothing, in the shape of the first."""
        shape = (min(self._recipe.train.micro_batch, self.loader.share), self._recipe.data.sequence_length)
        nothing = torch.zeros(shape, dtype=torch.long)
        return {"input_ids": nothing, "labels": nothing, "reset": nothing.bool()}

    def close(self) -> None:
        """Let the loader's workers go: they hear no signal, so the process would wait for them at its end."""
        if self._batches is not None:
            self._batches.close()
