"""A run as reports read it: curves from metrics.jsonl, scores from eval/*.json, a checkpoint's parameters."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...files import user_path
from ...runs.layout import RunFolder, checkpoint_folder, latest_checkpoint, step_of
from ..harness import WHOLE_ROWS, flatten, variant


@dataclass(frozen=True)
class Score:
    """One metric of one task at the newest checkpoint that was scored on it."""

    value: float
    error: float | None
    step: int | None
    limit: int | None


@dataclass(frozen=True)
class Run:
    """What a report needs of a run."""

    name: str
    path: Path
    training: list[dict[str, Any]]  # lines of metrics.jsonl, one a step with a finite loss, in order
    validation: list[dict[str, Any]]
    tasks: list[dict[str, Any]]  # lines of `eval.during`
    parameters: int | None  # None without a checkpoint
    step: int | None = None  # of the newest checkpoint
    scores: dict[tuple[str, str], Score] = field(default_factory=dict)  # (task, metric)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return max(line["tokens"] for line in [*self.training[-1:], *self.validation[-1:]])

    @property
    def training_loss(self) -> float | None:
        """Nats a token, mean over the last 2% of the logged steps: a single step is noisy."""
        losses = [line["loss"] for line in self.training]
        return statistics.fmean(losses[-max(1, len(losses) // 50) :]) if losses else None

    @property
    def tokens_per_second(self) -> float | None:
        """Median over steps, which leaves out compilation and pauses."""
        speeds = [line["tokens_per_second"] for line in self.training if _number(line, "tokens_per_second")]
        return statistics.median(speeds) if speeds else None

    @property
    def task_keys(self) -> list[str]:
        """TASK/METRIC of the newest line of `eval.during`."""
        return [key for key in self.tasks[-1] if "/" in key] if self.tasks else []

    @property
    def validation_keys(self) -> list[str]:
        """Keys of the newest validation line."""
        return list(self.validation[-1]) if self.validation else []

    def last(self, key: str) -> float | None:
        """The newest value of a key of the validation lines."""
        return next((line[key] for line in reversed(self.validation) if _number(line, key)), None)


def read_run(folder: str | Path, at: int | None = None) -> Run:
    """Read a run, as it was at step `at`; None: all of it. Scores of several steps: the newest.

    Raises ValueError if there is no such folder, or it has no step yet.
    """
    path = user_path(folder)
    if not path.is_dir():
        raise ValueError(f"{folder}: no such run")
    file = RunFolder(path).metrics
    if not file.is_file():
        above = next((run for run in path.parents if RunFolder(run).metrics.is_file()), None)
        hint = " (there is no metrics.jsonl in it)"
        if any(RunFolder(run).metrics.is_file() for run in path.iterdir()):
            hint = f"; did you mean the runs in it, {folder}/*?"
        elif above is not None:
            hint = f"; did you mean its run, {above}?"
        raise ValueError(f"{folder}: not a run{hint}")
    newest = latest_checkpoint(RunFolder(path).checkpoints)
    training, validation, tasks = (
        [line for line in lines if at is None or line["step"] <= at] for lines in _read_metrics(file)
    )
    if not training and not validation:
        raise ValueError(f"{folder}: metrics.jsonl holds no step yet")
    return Run(
        name=path.resolve().name,
        path=path,
        training=training,
        validation=validation,
        tasks=tasks,
        parameters=_count_parameters(checkpoint_folder(RunFolder(path).latest)),
        step=step_of(newest) if newest is not None else None,
        scores=_read_scores(RunFolder(path).scores, at),
    )


def _read_metrics(file: Path) -> tuple[list[dict[str, Any]], ...]:
    """Lines of training, validation and tasks by step. Of several of a step the last counts (a resumed run).

    A line torn by a crash is skipped. What a validation or a task has as null was not finite: NaN.
    """
    kinds: dict[str, dict[int, dict[str, Any]]] = {"loss": {}, "validation_loss": {}, "tasks_seconds": {}}
    with file.open(encoding="utf-8", errors="replace") as lines:
        for text in lines:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if not isinstance(line, dict) or not (_number(line, "step") and _number(line, "tokens")):
                continue
            if _number(line, "loss"):  # not of a skipped step
                kinds["loss"][line["step"]] = line
            for key in ("validation_loss", "tasks_seconds"):
                if key in line and (line[key] is None or _number(line, key)):
                    kinds[key][line["step"]] = {k: math.nan if v is None else v for k, v in line.items()}
    return tuple([found[step] for step in sorted(found)] for found in kinds.values())


def _read_scores(folder: Path, at: int | None) -> dict[tuple[str, str], Score]:
    """Every metric of every task, each from one file: highest step first, then unlimited, then newest.

    at: a step; only of this one, and of files that do not tell theirs.
    """
    found: dict[tuple[str, str], tuple[tuple[int, bool, float], Score]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            for task, metric, rank, score in _scores_of(file):
                if at is not None and score.step not in (at, None):
                    continue
                if (task, metric) not in found or rank >= found[task, metric][0]:
                    found[task, metric] = (rank, score)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            continue  # another program's JSON, or none
    return {key: score for key, (_, score) in sorted(found.items())}


def _scores_of(file: Path) -> Iterator[tuple[str, str, tuple[int, bool, float], Score]]:
    """(task, metric, rank, score) of each score in a file of results."""
    results = json.loads(file.read_text(encoding="utf-8"))
    settings, step = results.get("settings", {}), results.get("checkpoint", {}).get("step")
    limit, lengths = settings.get("limit"), settings.get("lengths")
    rank = (0 + (step or 0), limit is None, file.stat().st_mtime)
    for task, metric, value, error in flatten(results):
        way = variant(results, task, text=task.startswith(("heldout_", "offline_")))
        if lengths and task.startswith(WHOLE_ROWS):  # not the task's own rows
            task = f"{task} at {', '.join(map(str, lengths))}"
        yield ", ".join([task, *way]), metric, rank, Score(value, error, step, limit)


def _count_parameters(checkpoint: Path) -> int | None:
    """Stored parameters, from the safetensors headers; None if files are missing or damaged."""
    from safetensors import SafetensorError, safe_open

    files = sorted(checkpoint.glob("*.safetensors"))
    total = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                names = list(tensors.keys())
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
        except (SafetensorError, OSError):
            return None
    return total if files else None


def mixer_in_words(mixer: dict[str, Any]) -> str:
    """A mixer and the options that have a value: `bd_lru (block_size 4, gate softmax)`."""
    options = [f"{key} {value}" for key, value in mixer.items() if key != "type" and value is not None]
    return mixer["type"] + (f" ({', '.join(options)})" if options else "")


def _number(line: dict[str, Any], key: str) -> bool:
    return isinstance(line.get(key), int | float)
