"""Several checkpoints on the same tasks, and their scores side by side as a table and a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..runs.layout import RunFolder
from ..runs.load import describe
from .harness import evaluate, flatten
from .reporting.score_plot import draw_scores
from .show import print_table, table_console, value_with_error
from .team import ALONE, Team


def evaluate_each(
    checkpoints: Sequence[str | Path],
    tasks: list[str],
    output: Path | None = None,
    team: Team = ALONE,
    **settings: Any,
) -> list[dict[str, Any]]:
    """`evaluate` for each checkpoint; of several also a table and a picture of all scores.

    output: a folder; each of several checkpoints gets its own in it, named after its run or folder.
    settings: as `evaluate` takes them. Raises ValueError as `evaluate` does; for a missing checkpoint, before
    any is scored.
    """
    names = checkpoint_names(checkpoints)
    results = []
    for checkpoint, where in zip(checkpoints, folders(checkpoints, output), strict=True):
        results.append(evaluate(checkpoint, tasks, output=where, team=team, **settings))
    if len(results) > 1 and team.is_main:
        print_table(["task", "metric", *names], beside(results), left=2, title="beside each other")
        run = describe(checkpoints[0]).run  # without `output` the picture goes to the first one's run
        folder = output if output is not None or run is None else RunFolder(run).plots
        if folder is not None:
            picture = Path(folder) / "comparison.png"
            draw_scores(names, results, picture)
            table_console().print(f"drawn in {picture}", soft_wrap=True, highlight=False)
    return results


def folders(checkpoints: Sequence[str | Path], output: Path | None) -> list[Path | None]:
    """Where each checkpoint's results go: `output`, or for several checkpoints a folder each in it."""
    names = checkpoint_names(checkpoints)
    return [output if output is None or len(names) == 1 else Path(output) / name for name in names]


def for_each(
    work: Callable[..., object],
    checkpoints: Sequence[str | Path],
    output: Path | None,
    *arguments: Any,
    **options: Any,
) -> None:
    """work(checkpoint, *arguments, output=.., **options) for each; of several, `output` has a folder each."""
    for checkpoint, where in zip(checkpoints, folders(checkpoints, output), strict=True):
        work(checkpoint, *arguments, output=where, **options)


def beside(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of task, metric, and each checkpoint's value ± standard error."""
    columns = [{(task, metric): rest for task, metric, *rest in flatten(found)} for found in results]
    rows = []
    for task, metric in dict.fromkeys(key for column in columns for key in column):
        cells = [column.get((task, metric), [None, None]) for column in columns]
        rows.append([task, metric, *(value_with_error(*cell) for cell in cells)])
    return rows


def checkpoint_names(checkpoints: Sequence[str | Path]) -> list[str]:
    """A name for each, different from the others': its run; with its step, and folders further up, if needed.

    Raises ValueError for a checkpoint that is given twice.
    """
    found = [describe(checkpoint) for checkpoint in checkpoints]
    names = [info.run.name if info.run is not None else info.name for info in found]
    if len(set(names)) == len(names):
        return names
    parts = []  # of each name, last part first
    for info in found:
        above = info.path.parent if info.run is None else info.run
        parts.append([info.name, *reversed(above.parts[1:])])
    for count in range(2, max(map(len, parts)) + 1):
        names = ["-".join(reversed(part[:count])) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(info.path for i, info in enumerate(found) if info.path in [f.path for f in found[:i]])
    raise ValueError(f"{twice}: each checkpoint is to be given once")
