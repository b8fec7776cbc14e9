"""Shared by the whole-model benchmarks: rows written as measured, a time budget, failures as rows."""

import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lrnn_lm.evaluate.show import markdown_table

from .measure import print_table

Row = dict[str, Any]


def failures() -> tuple[type[Exception], ...]:
    """What a model raises that a machine, a version or a size does not support (out of memory included)."""
    known: tuple[type[Exception], ...] = (
        RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError, ImportError,
        OSError,
    )  # fmt: skip
    if importlib.util.find_spec("triton") is None:
        return known
    from triton.errors import TritonError

    return (*known, TritonError)


def attempt(measure: Callable[[], Row]) -> Row:
    """The row that a measurement gives, or `{"reason": ..}` if it fails; its memory is free again after."""
    try:
        row = measure()
    except failures() as error:
        said = " ".join(str(error).split()) or "no message"
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "  # a ValueError's text says it
        row = {"reason": f"{kind}{said[:200]}"}
    release()  # here the traceback, which holds the model, is gone
    return row


def release() -> None:
    """Give memory and compiled code back, so that the next contender begins as the first did."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Budget:
    """Seconds that a run may take; None for as many as it needs."""

    def __init__(self, seconds: float | None):
        if seconds is not None and not seconds > 0:
            raise ValueError(f"--budget-seconds must be positive, not {seconds:g}")
        self.seconds = seconds
        self._start = time.monotonic()
        self._longest = 0.0

    def spent(self) -> float:
        return time.monotonic() - self._start

    def refusal(self) -> str | None:
        """Why the next measurement is left out: it would end too late if it took as long as the longest."""
        if self.seconds is None or self.spent() + self._longest <= self.seconds:
            return None
        spent = f"{self.spent():.0f} of {self.seconds:g} s are spent"
        return f"skipped: {spent}, one takes up to {self._longest:.0f}"

    def run(self, measure: Callable[[], Row]) -> Row:
        """`attempt`, timed; or the refusal as a row."""
        if reason := self.refusal():
            return {"reason": reason}
        before = self.spent()
        row = attempt(measure)
        self._longest = max(self._longest, self.spent() - before)
        return row


def check_output(path: Path | None) -> None:
    """ValueError for a file of rows whose name is the table's or the picture's."""
    if path is not None and path.suffix in (".md", ".png"):
        raise ValueError(f"{path}: the table and the picture go there; name the rows' file .jsonl")


class JsonLines:
    """A file of JSON lines, each on disk as soon as it is known; the first says what was measured where."""

    def __init__(self, path: Path | None, about: dict[str, Any]):
        self._path = path
        self.rows: list[Row] = []
        check_output(path)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"about": about}) + "\n", encoding="utf-8")

    def add(self, row: Row) -> None:
        row = {key: value for key, value in row.items() if value is not None}
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read_results(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What a benchmark's file says of itself, and its rows; of `bench kernels`' single object, too.

    Raises ValueError for a file that is missing or is not of a benchmark.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}")
    try:
        text = path.read_text(encoding="utf-8")
        if "rows" in (whole := _loads(text)):
            about, rows = whole["about"], whole["rows"]
        else:
            first, *rest = (json.loads(line) for line in text.splitlines() if line.strip())
            about, rows = first["about"], rest
        if not isinstance(about, dict) or not all(isinstance(row, dict) for row in rows):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a file that `lrnn bench` wrote") from None
    return about, rows


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # more than one line
        return {}


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """The median, and the distance from the 10th to the 90th percentile over it."""
    ordered = sorted(seconds)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.9))
    middle = statistics.median(ordered)
    return middle, (high - low) / middle


def show(value: float | None, form: str = ",.0f", scale: float = 1.0) -> str:
    """A number for a table; nothing for None."""
    return "" if value is None else format(value * scale, form)


def tabulate(title: str, columns: list[str], cells: list[list[str]], output: Path | None) -> None:
    """Print a table without its empty columns; beside `output`, if given, the same in Markdown."""
    used = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in cells)]
    columns, cells = [columns[i] for i in used], [[row[i] for i in used] for row in cells]
    print_table(title, columns, cells)
    if output is None:
        return
    path = output.with_suffix(".md")
    path.write_text(markdown_table(columns, cells), encoding="utf-8")
    print(f"written: {path}")


def numbers(text: str, what: str) -> list[int]:
    """`2048,32K` as counts; ValueError naming what is wrong."""
    from lrnn_lm.recipe import parse_count

    try:
        counts = [parse_count(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if not counts or min(counts) < 1:
        raise ValueError(f"{what}: give one count or several, separated by commas, not {text!r}")
    return counts
