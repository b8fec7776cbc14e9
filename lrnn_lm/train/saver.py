"""Saving while training goes on: tensors copied at a step boundary, written by a thread, published later.

begin    every rank copies its tensors to the CPU, and a thread writes, flushes and hashes its files aside
written  asked at each step, without a word between ranks: is this rank's part on disk?
finish   once all say so: the main rank completes the manifest and renames the folder
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException

from ..model.export import files_with_code, write_remote_code
from ..model.modeling import LRNNForCausalLM
from ..recipe.schema import CheckpointSection
from ..runs import checkpoint
from ..runs.checkpoint import CheckpointError, Position
from ..runs.layout import CheckpointFolder
from .parallel import is_sharded
from .runtime import random_state
from .tensors import (
    WEIGHTS,
    Group,
    fill_state,
    is_sharded_folder,
    training_tensors,
    write_config,
    write_random_state,
    write_shards,
    write_weights,
    write_whole,
)

_EXPECTED = (OSError, SafetensorError, CheckpointException)  # a disk that is full or away


class Saver:
    """The checkpoints of a run. All ranks call `begin` and `finish`, at the same step boundaries."""

    def __init__(
        self,
        checkpoints: Path,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        write_extras: Callable[[Path], None],
        section: CheckpointSection,
        group: Group = None,
    ):
        """`model` is the bare one; `write_extras` writes what else belongs in the folder (the tokenizer);
        `group` is one of gloo's over all ranks, for the writing threads alone, where there are shards."""
        self.checkpoints, self._accelerator = checkpoints, accelerator
        self._model, self._optimizer, self._section = model, optimizer, section
        self._write_extras, self._group = write_extras, group
        self._has_code = isinstance(model, LRNNForCausalLM)  # an auto-encoder's does not travel
        # Not its public face DefaultStager, which in torch 2.11 can be used once only and keeps no buffers.
        self._stager = StateDictStager(pin_memory=accelerator.device.type == "cuda")
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._step = -1
        self.good: str | None = None  # the checkpoint last written or gone on from

    @property
    def written(self) -> bool:
        """Whether a checkpoint waits to be published, as far as this rank is concerned."""
        return self._writing is not None and self._writing.done()

    def warm_up(self) -> None:
        """Make the pinned buffers that copies go to: a second for gigabytes, better spent before training."""
        if self._accelerator.device.type == "cuda" and self._section.background:
            fill_state(self._model, self._optimizer)
            self._copied()

    def begin(self, position: Position, last: bool = False) -> None:
        """Save the run as it is now. `last`: with the model's code, so that it loads where this package is
        not, and of a sharded run with the weights as one file too.

        Returns once the tensors are copied, or all is written where `checkpoint.background` is false.
        Raises CheckpointError if this or the save before failed on any rank.
        """
        self.finish()
        self._step = position.step
        aside = checkpoint.aside_of(self.checkpoints, position.step)
        problem = None
        if self._accelerator.is_main_process:
            problem = _reason_of(lambda: _make_room(self.checkpoints, aside))
        self._agree(problem)
        tensors = self._copied()
        weights = self._whole_weights() if last and is_sharded(self._model) else None
        state = replace(position, skips=[list(skip) for skip in position.skips])
        self._writing = self._pool.submit(self._write, aside, state, tensors, weights, random_state(), last)
        if not self._section.background:
            self.finish()

    def finish(self) -> None:
        """Wait until the save under way, if there is one, is written by all, and publish it.

        Raises CheckpointError on every rank if one of them could not write.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        self._agree(_reason_of(writing.result))
        problem = None
        if self._accelerator.is_main_process:
            problem = _reason_of(
                lambda: checkpoint.publish(
                    self.checkpoints, self._step, self._section.keep_last, self._section.keep_best, self.good
                )
            )
        self._agree(problem)
        self.good = checkpoint.step_name(self._step)

    def complete(self, step: int) -> None:
        """Of a run that ends at a checkpoint that was only a stop: add what the last one has, see `begin`.

        Raises CheckpointError on every rank if it could not be written.
        """
        self._step = step
        folder, problem = self.checkpoints / checkpoint.step_name(step), None
        if self._accelerator.is_main_process:
            problem = _reason_of(lambda: self._complete(folder))
        self._agree(problem)

    def _complete(self, folder: Path) -> None:
        if is_sharded_folder(folder) and WEIGHTS not in checkpoint.named_files(folder):
            checkpoint.put_file(folder, WEIGHTS, lambda aside: write_weights(folder, aside))
        if self._has_code and "auto_map" not in json.loads(CheckpointFolder(folder).config.read_text()):
            for name, text in files_with_code(folder).items():
                checkpoint.put_file(folder, name, lambda aside, text=text: aside.write_text(text, "utf-8"))

    def close(self) -> None:
        """Of a run that ends with an error; what is half-written is cleared at the next start."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _agree(self, problem: str | None) -> None:
        """Raise on every rank what went wrong on any."""
        problems = [problem]
        if self._accelerator.num_processes > 1:
            problems = gather_object([problem])
        told = next(filter(None, problems), None)
        if told is None:
            return
        if not self._accelerator.is_main_process:
            raise CheckpointError("")  # the main rank tells
        shutil.rmtree(checkpoint.aside_of(self.checkpoints, self._step), ignore_errors=True)
        raise CheckpointError(
            f"could not save {self.checkpoints / checkpoint.step_name(self._step)}: {told}; "
            f"last good checkpoint: {checkpoint.latest_name(self.checkpoints)}. "
            "Free some space and run the same command again to go on from it."
        )

    def _copied(self) -> dict[str, Tensor]:
        """`_tensors` on the CPU, in buffers that the next copy will go to as well."""
        on_gpu = self._accelerator.device.type == "cuda"
        copies = self._stager.stage(self._tensors(), non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _tensors(self) -> dict[str, Tensor]:
        """What this rank has to write: its shards, or everything on the main rank."""
        if is_sharded(self._model) or self._accelerator.is_main_process:
            return training_tensors(self._model, self._optimizer)
        return {}

    def _whole_weights(self) -> dict[str, Tensor]:
        """Gathered one by one, so that no device ever holds the whole model; kept by the main rank."""
        weights = {}
        for name, parameter in self._model.named_parameters():
            value = parameter.detach().full_tensor()
            if self._accelerator.is_main_process:
                weights[name] = value.cpu()
        return weights

    def _write(
        self,
        aside: Path,
        position: Position,
        tensors: dict[str, Tensor],
        weights: dict[str, Tensor] | None,
        random: tuple[dict[str, Any], dict[str, Tensor]],
        last: bool,
    ) -> None:
        """In the thread: this rank's files, on disk, with their facts."""
        rank, main = self._accelerator.process_index, self._accelerator.is_main_process
        trainer = CheckpointFolder(aside).trainer
        files: list[Path] = []
        if is_sharded(self._model):  # first: a rank that failed before it would leave the others in it
            write_shards(tensors, aside, self._group)
            files += sorted(CheckpointFolder(aside).shards.glob(f"shard-{rank + 1:05d}-*"))
        files += write_random_state(trainer, rank, random)
        if main:
            files += self._write_main(aside, position, tensors, weights, last)
        checkpoint.record_facts(aside, files, rank)

    def _write_main(
        self,
        aside: Path,
        position: Position,
        tensors: dict[str, Tensor],
        weights: dict[str, Tensor] | None,
        last: bool,
    ) -> list[Path]:
        """What only the main rank writes; every file of it."""
        trainer = CheckpointFolder(aside).trainer
        if not is_sharded(self._model):
            write_whole(tensors, aside, self._model)
        elif weights is not None:
            self._model.save_pretrained(aside, state_dict=weights)
        else:
            write_config(aside, self._model)
        self._write_extras(aside)
        if last and self._has_code:
            write_remote_code(aside)
        CheckpointFolder(aside).state.write_text(json.dumps(asdict(position), indent=1) + "\n")
        own = [CheckpointFolder(aside).state, CheckpointFolder(aside).optimizer]
        files = [path for path in aside.rglob("*") if path.is_file() and trainer not in path.parents]
        return sorted(files) + [path for path in own if path.exists()]


def _make_room(checkpoints: Path, aside: Path) -> None:
    checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint.clear_leftovers(checkpoints)
    CheckpointFolder(aside).trainer.mkdir(parents=True)


def _reason_of(work: Callable[[], object]) -> str | None:
    """Do it; in a few words what went wrong, if that was the disk's doing."""
    try:
        work()
    except _EXPECTED as error:
        inner: BaseException = error
        if isinstance(error, CheckpointException):
            inner = next(iter(error.failures.values()))[0]
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        return " ".join(str(inner).split())[:300]
    return None
