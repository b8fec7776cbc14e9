"""What commands share: tables on a console, short numbers, JSON without NaN, checks of arguments."""

import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import finite, replace_file, user_path
from ..remote import check_here

if TYPE_CHECKING:
    from rich.console import Console


def table_console() -> "Console":
    """A console on stdout: as wide as the terminal; in a log, 120 columns. Brackets are text, as in paths.

    A character that stdout's encoding lacks (± in ASCII) prints as `?`: an error would lose hours of work.
    """
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=max(console.width, 120), markup=False)


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, title: str | None = None
) -> None:
    """Print a table; the first `left` columns are aligned to the left, numbers to the right."""
    from rich.table import Table

    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    table_console().print(table)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> str:
    """A table as Markdown; the columns after the first `left`, if given, are aligned to the right."""
    rule = ["---" if left is None or i < left else "---:" for i in range(len(header))]
    lines = [header, rule, *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def print_written(paths: Iterable[Path]) -> None:
    """Say where results are, each path on one line so that it can be copied."""
    for path in paths:
        table_console().print(f"written to {path}", soft_wrap=True, highlight=False)


def check_output(output: Path | None) -> None:
    """Raise ValueError, before hours of scoring, for an output that is a file or is named like one, or that
    this user may not write."""
    check_here(str(output or ""), "copy the scores when they are written")
    if output is None:
        return
    folder = user_path(output).absolute()
    if folder.is_file() or folder.suffix == ".json":
        raise ValueError(f"{output}: a file; --output takes a folder, in which files are named")
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ValueError(f"{output}: no file can be written there; name another folder with --output")


def check_used(
    scores: bool,
    limit: int | None,
    num_fewshot: int | None,
    max_length: int | None,
    lengths: list[int] | None,
    prompt_twice: bool,
) -> None:
    """Raise ValueError for an option of tasks where a probe alone is asked for (not `scores`)."""
    given = {"--limit": limit, "--num-fewshot": num_fewshot, "--max-length": max_length,
             "--lengths": lengths, "--prompt-twice": prompt_twice or None}  # fmt: skip
    if not scores and (idle := next((name for name, value in given.items() if value is not None), None)):
        raise ValueError(
            f"{idle} is for tasks, and a probe alone is asked for: give --tasks, or leave it out"
        )


def check_probes(reads_rows: bool, rows: int | None, certify: str | None, harden: Path | None) -> None:
    """Raise ValueError for an option of a probe that is not asked for."""
    if rows is not None and not reads_rows:
        raise ValueError("--rows is for --length and --recall: give one of them, or leave it out")
    if harden is not None and certify is None:
        raise ValueError("--harden reads the gates for a task: give it, as in --certify s5")


def write_json(facts: Any, path: Path) -> None:
    """Write JSON in one step; makes its folder. Raises ValueError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(finite(facts), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise ValueError(f"{path}: the results cannot be written: {error.strerror}") from error


def check_at_least(least: int, **values: float | None) -> None:
    """Raise ValueError for the first value below `least` (or NaN); None is a value that was not given."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, not {value}")


def decimal(number: float | None) -> str:
    """Four decimals; four digits of a large number (an untrained model's perplexity); '' for None."""
    if number is None:
        return ""
    return f"{number:.4f}" if abs(number) < 1e6 else f"{number:.4g}"


def value_with_error(value: float | None, error: float | None) -> str:
    """`0.2134 ± 0.0041`; without the standard error if it is None."""
    return decimal(value) + (f" ± {decimal(error)}" if error is not None else "")
