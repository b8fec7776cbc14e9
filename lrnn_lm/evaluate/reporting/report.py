"""Runs side by side: a picture of their losses, and tables of results, printed and as Markdown."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.markup import escape

from ...files import user_path
from ...output import error_console
from ...remote import check_here
from ...runs.layout import RunFolder
from ..show import decimal, markdown_table, print_table, print_written, value_with_error
from .runs import Run, Score, read_run
from .synthetic import synthetic_table

_COLUMNS = ("run", "parameters", "tokens", "training loss", "validation loss")
Table = tuple[list[str], list[list[str]]]  # header and rows


def report(runs: Sequence[str | Path], output: Path | None = None) -> None:
    """Draw loss against tokens for one or several runs, and print their table.

    output: a picture (.png, .svg, .pdf), a Markdown file (.md, with the picture beside it), or a folder,
    which gets report.md and loss.png. Default: plots/loss.png of the run; for several runs, comparison.png
    beside the first. Raises ValueError for a run that is missing or has no step yet, and for a file that
    cannot be written.
    """
    if not runs:
        raise ValueError("no runs to report on")
    once = {user_path(folder).resolve(): folder for folder in _begun(runs)}
    found = _told_apart([read_run(folder) for folder in once.values()])
    picture, markdown = _targets(found, output)
    from .plot import draw

    try:
        draw(found, picture)
        if markdown is not None:
            text = to_markdown(found)
            markdown.write_text(f"{text}\n![Loss against tokens]({picture.name})\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{error.filename or picture}: the report cannot be written: {error.strerror}"
        ) from error
    for header, rows in _tables(found):
        print_table(header, rows, left=2 if header[0] == "task" else 1)
    print_written([picture, *([markdown] if markdown else [])])


def _begun(folders: Sequence[str | Path]) -> Sequence[str | Path]:
    """Without what lies beside runs where `runs/*` names them, unless it is all that there is.

    That is: pictures and tables of earlier reports, folders of sweeps, and runs that wait for their first
    step, which a line names.
    """
    paths = {folder: user_path(folder) for folder in folders}
    folders = [each for each, path in paths.items() if not path.is_file() and path.suffix != ".sweep"]
    begun = [each for each in folders if not _waits(RunFolder(paths[each]))]
    if begun and (waiting := [str(each) for each in folders if each not in begun]):
        error_console().print(f"without a step yet, left out: {escape(', '.join(waiting))}", soft_wrap=True)
    return begun or list(paths)


def _waits(run: RunFolder) -> bool:
    return (run.launch.is_dir() or run.recipe.is_file()) and not run.metrics.is_file()


def _told_apart(runs: list[Run]) -> list[Run]:
    """The runs, with as many folders before their names as tell them apart: `lr-1/small`, `lr-2/small`."""
    parts = [run.path.resolve().parts for run in runs]
    count = next(n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts))
    return [replace(run, name="/".join(part[-count:])) for run, part in zip(runs, parts, strict=True)]


def to_markdown(runs: list[Run]) -> str:
    """The tables of a report as Markdown."""
    return "\n".join(markdown_table(*table) for table in _tables(runs))


def _tables(runs: list[Run]) -> list[Table]:
    """The runs; the synthetic tasks, if several runs are on them; the scores, if there are any."""
    tables = [_run_table(runs)]
    if sources := _source_rows(runs):
        tables.append((["run", "source", "validation loss", "bits per byte"], sources))
    if synthetic := synthetic_table(runs):
        tables.append(synthetic)
    if keys := dict.fromkeys(key for run in runs for key in run.scores):
        rows = [[*key, *(_score(run.scores.get(key), run.step) for run in runs)] for key in keys]
        tables.append((["task", "metric", *(run.name for run in runs)], rows))
    return tables


def _source_rows(runs: list[Run]) -> list[list[str]]:
    """A row for each source of each run on a mixture: its validation."""
    head = "validation_loss/"
    names = [
        (run, key.removeprefix(head)) for run in runs for key in run.validation_keys if key.startswith(head)
    ]
    keys = (head, "bits_per_byte/")
    return [[run.name, name, *(decimal(run.last(key + name)) for key in keys)] for run, name in names]


def _targets(runs: list[Run], output: Path | None) -> tuple[Path, Path | None]:
    """Paths of the picture and of the Markdown, which is None if it is not asked for."""
    if output is None:
        alone = len(runs) == 1
        return (RunFolder(runs[0].path).loss_plot if alone else runs[0].path.parent / "comparison.png"), None
    output = user_path(check_here(str(output), "copy the report when it is written"))
    suffix = output.suffix.lower()
    if suffix in (".png", ".svg", ".pdf"):
        return output, None
    if suffix in (".md", ".markdown"):
        return output.with_suffix(".png"), output
    if suffix and not output.is_dir():
        raise ValueError(f"{output}: a report is a picture (.png, .svg, .pdf), a .md file or a folder")
    return output / "loss.png", output / "report.md"


def _run_table(runs: list[Run]) -> Table:
    """A row a run, with bits per byte (text) and accuracy (synthetic tasks) if some run has them."""
    measured = [
        key for key in ("bits_per_byte", "accuracy") if any(run.last(key) is not None for run in runs)
    ]
    header = [*_COLUMNS, *(key.replace("_", " ") for key in measured), "tokens/s"]
    rows = [
        [
            run.name,
            _count(run.parameters),
            _count(run.tokens),
            decimal(run.training_loss),
            decimal(run.last("validation_loss")),
            *(decimal(run.last(key)) for key in measured),
            _count(run.tokens_per_second),
        ]
        for run in runs
    ]
    return header, rows


def _score(score: Score | None, newest: int | None) -> str:
    """newest: step of the run's newest checkpoint. A score of an older one says so."""
    if score is None:
        return ""
    limit = f" (first {score.limit})" if score.limit is not None else ""
    is_older = None not in (score.step, newest) and score.step < newest
    return value_with_error(score.value, score.error) + limit + f" (step {score.step})" * is_older


def _count(number: float | None) -> str:
    """Three digits and a unit: 1234567 -> 1.23M."""
    if number is None:
        return ""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= scale:
            scaled = number / scale
            return f"{scaled:.{max(0, 2 - int(math.log10(scaled)))}f}{unit}"
    return f"{number:.0f}"
