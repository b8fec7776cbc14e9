"""Several checkpoints on the same tasks: one after the other, then their scores beside each other, as a table
and as a picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs.layout import RunFolder
from ..runs.load import describe
from .harness import check_output, evaluate, flatten
from .reporting.score_plot import draw_scores
from .show import decimal, table_console
from .team import ALONE, Team


def evaluate_each(
    checkpoints: Sequence[str | Path],
    tasks: list[str],
    output: Path | None = None,
    team: Team = ALONE,
    **settings: Any,
) -> list[dict[str, Any]]:
    """`evaluate` for each checkpoint, and if there are several a table beside each other and a picture.

    output: a folder; several checkpoints get one each below it, named after their run or folder. settings:
    as `evaluate` takes them. Raises ValueError as it does, before any is scored if one is not there.
    """
    names = checkpoint_names(checkpoints)
    check_output(output)
    if len(names) > 1 and output is not None and Path(output).suffix == ".json":
        raise ValueError(f"{output}: the results of several checkpoints need a folder, not one file")
    results = []
    for checkpoint, where in zip(checkpoints, folders(checkpoints, output), strict=True):
        results.append(evaluate(checkpoint, tasks, output=where, team=team, **settings))
    if len(results) > 1 and team.is_main:
        _show(names, results)
        picture = _picture(checkpoints[0], output)
        if picture is not None:
            draw_scores(names, results, picture)
            table_console().print(f"drawn in {picture}", soft_wrap=True, highlight=False)
    return results


def folders(checkpoints: Sequence[str | Path], output: Path | None) -> list[Path | None]:
    """Where each checkpoint's results go: `output`, in which each of several has a folder of its own."""
    names = checkpoint_names(checkpoints)
    return [output if output is None or len(names) == 1 else Path(output) / name for name in names]


def beside(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of task, metric, and each checkpoint's value ± standard error."""
    columns = [{(task, metric): rest for task, metric, *rest in flatten(found)} for found in results]
    rows = []
    for task, metric in dict.fromkeys(key for column in columns for key in column):
        cells = [column.get((task, metric), [None, None]) for column in columns]
        values = [
            decimal(value) + (f" ± {decimal(error)}" if error is not None else "") for value, error in cells
        ]
        rows.append([task, metric, *values])
    return rows


def checkpoint_names(checkpoints: Sequence[str | Path]) -> list[str]:
    """A name for each that tells it from the others: its run, with its step if two are of one run; folders
    further up where that does not tell. ValueError for one that is given twice.
    """
    found = [describe(checkpoint) for checkpoint in checkpoints]
    names = [info.run.name if info.run is not None else info.name for info in found]
    if len(set(names)) == len(names):
        return names
    parts = []  # of a name, the last first
    for info in found:
        above = info.path.parent if info.run is None else info.run
        parts.append([info.name, *reversed(above.parts[1:])])
    for count in range(2, max(map(len, parts)) + 1):
        names = ["-".join(reversed(part[:count])) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(info.path for i, info in enumerate(found) if info.path in [f.path for f in found[:i]])
    raise ValueError(f"{twice}: each checkpoint is to be given once")


def _picture(first: str | Path, output: Path | None) -> Path | None:
    """Where the picture goes: into `output`, else among the plots of the first one's run, if it has a run."""
    run = describe(first).run
    folder = Path(output) if output is not None else RunFolder(run).plots if run is not None else None
    return None if folder is None else folder / "comparison.png"


def _show(names: list[str], results: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="beside each other")
    for i, title in enumerate(["task", "metric", *names]):
        table.add_column(title, justify="left" if i < 2 else "right", overflow="fold")
    for row in beside(results):
        table.add_row(*row)
    table_console().print(table)
