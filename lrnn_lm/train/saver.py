"""Checkpoints during training: copy tensors at a step boundary, write them in a thread, publish later.

begin    every rank copies its tensors to the CPU; a thread writes, flushes and hashes its files aside
written  whether this rank's part is on disk; each step sums it over ranks with what it sends anyway
finish   once all ranks have written: the main rank completes the manifest and renames the folder; a process
         of its own copies it elsewhere (`copier.py`)
settle   finish, and wait for the copy
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException

from ..model.export import write_remote_code
from ..model.modeling import LRNNForCausalLM
from ..recipe import Recipe
from ..runs import checkpoint
from ..runs.checkpoint import CheckpointError, Position
from ..runs.layout import CheckpointFolder
from .average import Average
from .copier import Copier
from .parallel import is_sharded
from .runtime import random_state
from .tensors import (
    WEIGHTS,
    Group,
    fill_state,
    training_tensors,
    write_config,
    write_random_state,
    write_shards,
    write_whole,
)

_EXPECTED = (OSError, SafetensorError, CheckpointException)  # the disk is full or gone


class Saver:
    """The checkpoints of a run. All ranks call `begin` and `finish`, at the same step boundaries."""

    def __init__(
        self,
        checkpoints: Path,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer: Path,
        recipe: Recipe,
        step: int,
        console: Console,
        group: Group = None,
        average: Average | None = None,
    ):
        """`model` is the bare model. tokenizer: its folder, whose files go beside the weights. step: where
        the run resumes. group: a gloo group of all ranks: threads write shards while training uses NCCL.
        """
        self.checkpoints, self._accelerator = checkpoints, accelerator
        self._model, self._optimizer, self._section = model, optimizer, recipe.checkpoint
        self._group, self._average = group, average
        # In memory: a scheduled cleaning of the cache must not cost the run its next checkpoints.
        self._tokenizer = {
            p.relative_to(tokenizer): p.read_bytes() for p in tokenizer.rglob("*") if p.is_file()
        }
        self._has_code = isinstance(model, LRNNForCausalLM)  # the auto-encoder loads with this package only
        # The private class: in torch 2.11 the public DefaultStager can be used once and keeps no buffers.
        self._stager = StateDictStager(pin_memory=accelerator.device.type == "cuda")
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._step = step or -1  # of the checkpoint last begun or resumed from
        self.stalled = 0.0  # seconds that training waited here; the trainer logs them and sets 0
        self.carried: Callable[[], dict[str, Tensor]] = dict  # states of this rank's rows, by name
        self._good = checkpoint.step_name(step) if step else None  # the one last published or resumed from
        self._patience = 30 * recipe.train.timeout_minutes  # seconds to wait for the copy: half the timeout
        self._copier: Copier | None = None
        if recipe.checkpoint.copy_to is not None and accelerator.is_main_process:
            self._copier = Copier(
                checkpoints.parent,
                recipe.checkpoint.copy_to,
                lambda text: console.print(f"[yellow]{escape(text)}", soft_wrap=True),
            )

    @property
    def written(self) -> bool:
        """Whether this rank has written its part of a checkpoint that is not published yet."""
        return self._writing is not None and self._writing.done()

    def warm_up(self) -> None:
        """Allocate the pinned buffers before training: that takes about a second for gigabytes."""
        if self._accelerator.device.type == "cuda" and self._section.background:
            fill_state(self._model, self._optimizer)
            self._copied()

    def begin(self, position: Position, last: bool = False) -> None:
        """Save the run as it is now, unless it was saved at this step.

        last: add the model's code, so that it loads without this package, and the weights of a sharded run
        as one file. Returns once the tensors are copied; with `checkpoint.background=false`, once all is
        written. Raises CheckpointError if this or the previous save failed on any rank.
        """
        if position.step == self._step:
            return
        self.finish()
        if last and self._copier is not None:  # what is being copied would outlive `keep_last`
            self._copier.wait(self._limit())
        began = time.perf_counter()
        self._step = position.step
        aside = checkpoint.aside_of(self.checkpoints, position.step)

        def make_room() -> None:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoint.clear_leftovers(self.checkpoints)
            CheckpointFolder(aside).trainer.mkdir(parents=True)

        self._on_main(make_room)
        tensors = self._copied()
        weights = self._whole_weights() if last and is_sharded(self._model) else None
        state = replace(position)  # a copy: training moves the position while this is written
        plain, own = random_state()
        random = plain, own | self.carried()
        self._writing = self._pool.submit(self._write, aside, state, tensors, weights, random, last)
        self.stalled += time.perf_counter() - began
        if not self._section.background:
            self.finish()

    def finish(self) -> None:
        """Wait until all ranks have written the save in progress, if there is one, and publish it.

        Raises CheckpointError on every rank if one of them could not write.
        """
        if self._writing is None:
            return
        began = time.perf_counter()
        writing, self._writing = self._writing, None
        self._agree(_reason_of(writing.result))
        keep = self._section.keep_last, self._section.keep_best
        copying = self._copier.in_use if self._copier is not None else None
        self._on_main(lambda: checkpoint.publish(self.checkpoints, self._step, *keep, self._good, copying))
        self._good = checkpoint.step_name(self._step)
        if self._copier is not None:
            self._copier.offer(self._good)
        self.stalled += time.perf_counter() - began

    def settle(self) -> None:
        """`finish`, and wait until the newest checkpoint is copied, or could not be, which is told.

        All ranks call it.
        """
        self.finish()
        if self._section.copy_to is not None and self._good is not None:
            here = (self.checkpoints / self._good).is_dir()  # not yet, in a branch that has saved nothing
            self._on_main(lambda: here and self._copier.finish(self._good, self._limit()))

    def _limit(self) -> float | None:
        """Until when to wait for a copy: others that wait for this rank time out."""
        return None if self._accelerator.num_processes == 1 else time.monotonic() + self._patience

    def copy_rest(self) -> None:
        """On the main rank, at the end: copy all else of the run, too. Raises ValueError if that fails."""
        if self._copier is not None and not self._copier.finish(self._good, everything=True):
            raise ValueError(
                f"the run is trained, but not copied to {self._section.copy_to} ({self._copier.problem}). "
                "Run the same command again to copy it."
            )

    def complete(self, position: Position) -> None:
        """Save the run's last checkpoint again, with code and whole weights, unless it has them.

        It lacks them if it was saved on the way to a larger budget. Raises CheckpointError as `begin` and
        `finish`.
        """
        folder = CheckpointFolder(self.checkpoints / checkpoint.step_name(position.step))
        has_code = not self._has_code or "auto_map" in json.loads(folder.config.read_text())
        if not has_code or not (folder.path / WEIGHTS).exists():
            self._step = -1
            self.begin(position, last=True)
            self.finish()

    def close(self) -> None:
        """End the thread without waiting, after an error; the next start removes what is half-written."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _on_main(self, work: Callable[[], object]) -> None:
        """Do something on the main rank; raise CheckpointError on every rank if that fails."""
        self._agree(_reason_of(work) if self._accelerator.is_main_process else None)

    def _agree(self, problem: str | None) -> None:
        """Raise CheckpointError on every rank if any has a problem; the main rank's has the message."""
        problems = [problem]
        if self._accelerator.num_processes > 1:
            problems = gather_object([problem])
        reason = next(filter(None, problems), None)
        if reason is None:
            return
        if not self._accelerator.is_main_process:
            raise CheckpointError("")
        shutil.rmtree(checkpoint.aside_of(self.checkpoints, self._step), ignore_errors=True)
        raise CheckpointError(
            f"could not save {self.checkpoints / checkpoint.step_name(self._step)}: {reason}; "
            f"last good checkpoint: {checkpoint.latest_name(self.checkpoints)}. "
            f"{_advice(reason)} and run the same command again to resume from it."
        )

    def _copied(self) -> dict[str, Tensor]:
        """What this rank writes, on the CPU, in buffers that the next save uses again.

        Its shards; without sharding, everything on the main rank and nothing on the others.
        """
        on_gpu = self._accelerator.device.type == "cuda"
        writes = is_sharded(self._model) or self._accelerator.is_main_process
        tensors = training_tensors(self._model, self._optimizer, self._average) if writes else {}
        copies = self._stager.stage(tensors, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _whole_weights(self) -> dict[str, Tensor]:
        """The weights on the main rank, gathered one by one so that no device holds the whole model."""
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
        """In the thread: write this rank's files, flush them and record their checksums."""
        rank, folder = self._accelerator.process_index, CheckpointFolder(aside)
        sharded = is_sharded(self._model)
        files: list[Path] = []
        if sharded:  # first, as it is a collective: after an error here the others would hang
            write_shards(tensors, aside, self._group)
            files += sorted(folder.shards.glob(f"shard-{rank + 1:05d}-*"))
        files += write_random_state(folder.trainer, rank, random)
        if self._accelerator.is_main_process:
            if not sharded:
                write_whole(tensors, aside, self._model)
                files += [path for path in (folder.optimizer, folder.average) if path.exists()]
            elif weights is not None:
                self._model.save_pretrained(aside, state_dict=weights)
            else:
                write_config(aside, self._model)
            for name, content in self._tokenizer.items():
                (aside / name).parent.mkdir(exist_ok=True)
                (aside / name).write_bytes(content)
            if last and self._has_code:
                write_remote_code(aside)
            folder.state.write_text(json.dumps(asdict(position), indent=1) + "\n")
            files.append(folder.state)
            written = (path for path in aside.rglob("*") if path.is_file())
            files += sorted(path for path in written if folder.trainer not in path.parents)
        checkpoint.record_facts(aside, files, rank)


def _advice(reason: str) -> str:
    """What to do about a save that failed: a disk may also be gone, read-only or another user's."""
    full = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    return "Free some space" if any(words in reason for words in full) else "Mend that"


def _reason_of(work: Callable[[], object]) -> str | None:
    """Do some work; why it failed, if the disk is to blame, else None."""
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
