"""metrics.jsonl, the trackers beside it, and when something is due.

A line is flushed when it is written and on disk before the next checkpoint is. A resumed run first drops the
lines after its checkpoint, so that every step has one line. A run that starts again without a checkpoint
renames the old file to metrics-1.jsonl, metrics-2.jsonl and so on.
"""

import json
import os
import secrets
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..files import finite, replace_file
from ..recipe import Recipe, flatten
from ..recipe.quantities import Every
from ..runs.checkpoint import Position
from ..runs.layout import RunFolder, latest_checkpoint
from .exchange import on_any_rank


class Metrics:
    """Appends one JSON object a line to metrics.jsonl on the main rank; numbers go on to the trackers."""

    def __init__(
        self, folder: Path, accelerator: Accelerator, resumed: Position, tell: Callable[[str], None]
    ):
        """tell: gets a line of what does not end the run."""
        self._accelerator, self._tell = accelerator, tell
        self._path = RunFolder(folder).metrics
        self._file = None
        self._failed: list[Any] = []  # trackers that are left out, and still open
        self.problem: str | None = None
        self._step = resumed.step
        self._begins = False  # on the main rank: whether the run has no checkpoint of its own
        if accelerator.is_main_process:
            self._begins = latest_checkpoint(RunFolder(folder).checkpoints) is None
            if self._begins:
                self._put_away()
            _cut_after(self._path, resumed)
            self._file = self._path.open("a", encoding="utf-8")

    def _put_away(self) -> None:
        """Rename the metrics of steps that no checkpoint leads to, and say so."""
        path = self._path
        if not path.exists() or not path.read_bytes().strip():
            return
        taken = [old.stem.removeprefix(f"{path.stem}-") for old in path.parent.glob(f"{path.stem}-*.jsonl")]
        number = 1 + max((int(word) for word in taken if word.isdecimal()), default=0)
        put = path.rename(path.with_stem(f"{path.stem}-{number}"))
        self._tell(f"starting again: this run has no checkpoint; metrics of its earlier start are in {put}")

    def write(self, line: dict[str, Any]) -> None:
        """Write a line; numbers that are not finite become null, which JSON lacks otherwise.

        If the disk is full `problem` says so, and all ranks learn of it in the next step.
        """
        if self._file is not None:
            try:
                self._file.write(json.dumps(finite(line), allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:
                self.problem = (
                    f"could not write {self._path}: {error.strerror}. Free some space and run the same "
                    "command again to resume from the last checkpoint."
                )
        if self._accelerator.trackers:
            numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
            self._each_tracker(lambda tracker: tracker.log(numbers, step=line["step"]))

    def check(self) -> None:
        """Raise ValueError with the `problem`; without a message on ranks that write nothing."""
        if self.problem is not None or self._file is None:
            raise ValueError(self.problem or "")

    def sync(self) -> None:
        """Flush the lines to disk, so that no checkpoint is ahead of them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # `write` has reported a full disk
                self._file.close()
        failed = [*self._failed]  # one that fails in `finish` is not asked again
        self._each_tracker(lambda tracker: tracker.finish())
        _finish(failed)

    def start_trackers(self, recipe: Recipe) -> None:
        """Give trackers the recipe, flat and as numbers or texts: TensorBoard takes nothing else.

        Raises ValueError, on all ranks, if one cannot start; a resumed run, as of a job at night, goes on
        without.
        """
        if not recipe.tracking.trackers:
            return
        flat = flatten(recipe).items()
        settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in flat}
        accelerator, started, failures = self._accelerator, [], []
        named = accelerator.log_with
        # It hides what an earlier start wrote of the steps that are taken again.
        options = {"tensorboard": {"purge_step": self._step + 1}}
        for tracker in named:  # one at a time: one that cannot start must not take the others with it
            accelerator.log_with, accelerator.trackers = [tracker], []
            try:
                if tracker == "wandb" and accelerator.is_main_process:
                    options["wandb"] = self._wandb_options(recipe.name)
                accelerator.init_trackers(recipe.tracking.project, config=settings, init_kwargs=options)
                started += accelerator.trackers
            except Exception as error:  # trackers' errors have no class in common, see `_each_tracker`
                failures.append(f"{tracker} cannot start ({_in_words(error)})")
                _finish(accelerator.trackers)  # it may have started, and failed at the recipe
        problem = f"tracking.trackers: {', '.join(failures)}" if failures else None
        accelerator.log_with, accelerator.trackers = named, started
        failed, begins = on_any_rank(accelerator, problem is not None, self._begins)
        if failed and begins:
            raise ValueError(f"{problem}: mend that, or set tracking.trackers=[]" if problem else "")
        if problem:
            self._tell(f"{problem}: going on without")

    def _wandb_options(self, name: str) -> dict[str, str]:
        """So that a resumed run goes on in the W&B run that it began: else each start of a job is another.

        A run that begins again, or a copy under another name, is a run of its own. W&B's variables win.
        Offline each start is one: W&B before 0.31 cannot resume there, and what is synced later would replace
        the rest.
        """
        file, known = RunFolder(self._path.parent).tracking, {}
        if not self._begins:
            with suppress(FileNotFoundError, ValueError):  # damaged: another W&B run, as without the file
                known = json.loads(file.read_text("utf-8"))
        if not isinstance(known, dict) or known.get("name") != name or not isinstance(known.get("id"), str):
            known = {"name": name, "id": secrets.token_hex(4)}
            replace_file(file, json.dumps(known), durable=True)
        options = {"name": name}
        if os.environ.get("WANDB_MODE", "online") == "online":
            options |= {"id": known["id"], "resume": "allow"}
        variables = {"id": "WANDB_RUN_ID", "name": "WANDB_NAME", "resume": "WANDB_RESUME"}
        return {key: value for key, value in options.items() if variables[key] not in os.environ}

    def _each_tracker(self, work: Callable[[Any], None]) -> None:
        """A server that is down must not end a run, nor what comes after its last step: metrics.jsonl has the
        numbers too. Such a tracker is left out from then on, as each attempt may take minutes."""
        for tracker in [*self._accelerator.trackers]:
            try:
                work(tracker)
            except Exception as error:  # each tracker raises errors of its own
                self._accelerator.trackers.remove(tracker)
                self._failed.append(tracker)
                self._tell(f"tracker {tracker.name} failed ({_in_words(error)}): going on without")


def _finish(trackers: list[Any]) -> None:
    """Close trackers that failed: left open, a later run of this process would go on in the same one."""
    for tracker in trackers:
        with suppress(Exception):  # they have failed, and have been told of
            tracker.finish()


def _in_words(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def _cut_after(path: Path, resumed: Position) -> None:
    """Drop lines after the position that the run resumes from, and torn lines.

    The validation and the scores at that very step are dropped too if the position does not count them: they
    will run again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            facts = json.loads(line)
            last = resumed.validated if "validation_loss" in facts else resumed.step
            last = resumed.scored if "tasks_seconds" in facts else last
            if facts["step"] <= last:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    replace_file(path, "".join(kept))


class Cadence:
    """Says after which steps something is due, by tokens, steps or minutes."""

    def __init__(self, every: Every, tokens_at: Callable[[int], int], main: bool = True):
        """tokens_at: tokens of the first n steps. main: whether this is the main rank: its timer decides."""
        self._every, self._tokens_at, self._main = every, tokens_at, main
        self._last = time.monotonic()
        self._pending = False

    def timer_expired(self) -> bool:
        """Whether the interval, if in minutes, has passed on the main rank; if so the timer restarts."""
        is_timed = self._main and self._every.unit == "minutes"
        if not is_timed or time.monotonic() - self._last < 60 * self._every.amount:
            return False
        self._last = time.monotonic()
        return True

    def due(self, step: int, timer: bool = False, wait: bool = False) -> bool:
        """Whether it is due after `step` steps.

        timer: the main rank's `timer_expired`, which decides if the interval is in minutes. wait: put it off
        to the next call without `wait`.
        """
        amount = int(self._every.amount)
        if self._every.unit == "minutes":
            due = timer
        elif self._every.unit == "steps":
            due = step % amount == 0
        else:
            due = self._tokens_at(step) // amount > self._tokens_at(step - 1) // amount
        due |= self._pending
        self._pending = due and wait
        return due and not wait
