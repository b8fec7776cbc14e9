"""Runs a benchmark several times, each time in a new process, and keeps the median.

Memory placement, a library's choice of kernels and host scheduling stay the same within a process and differ
between processes, so repeats inside one process understate the spread.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from .results import JsonLines, Row, check_output, read_results

Settings = TypeVar("Settings", bound=Any)  # a dataclass with `processes` and `budget_seconds`
Run = Callable[[Settings, str, Path | None], list[Row]]


def run_in_processes(
    run: Run, settings: Settings, device: str, output: Path | None, time_key: str
) -> tuple[dict[str, Any], list[Row]]:
    """`run` in `settings.processes` processes, one after the other; what they say of themselves, and medians.

    `output` is written anew after every process, so that a run that is cut keeps the processes that ended.

    Raises:
        ValueError: fewer than one process, or what `run` raises of its settings.
    """
    if settings.processes < 1:
        raise ValueError(f"--processes must be at least 1, not {settings.processes}")
    check_output(output)
    started = time.monotonic()
    runs: list[list[Row]] = []
    with TemporaryDirectory() as folder:
        for i in range(settings.processes):
            budget = settings.budget_seconds
            if budget is not None and budget > 0:  # the rest, in equal parts
                rest = budget - (time.monotonic() - started)
                budget = max(rest, 1e-3) / (settings.processes - i)
            once, part = replace(settings, processes=1, budget_seconds=budget), Path(folder) / f"{i}.jsonl"
            print(f"process {i + 1} of {settings.processes}", flush=True)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(run, once, device, part).result()
            about, rows = read_results(part)
            runs.append(rows)
            about["settings"] = asdict(settings)
            file = JsonLines(output, about)
            for row in median_rows(runs, time_key):
                file.add(row)
    return about, file.rows


def median_rows(runs: list[list[Row]], time_key: str) -> list[Row]:
    """Of each row the one from the process of median time (the faster of two), with every process's time.

    The whole row of one process, so that what is derived from its time belongs to it.
    """
    medians = []
    for same in zip(*runs, strict=True):
        done = [row for row in same if time_key in row]
        if not done:
            medians.append(same[0])
            continue
        middle = sorted(done, key=lambda row: row[time_key])[(len(done) - 1) // 2]
        each = [row[time_key] for row in done]
        medians.append({**middle, "processes": len(done), f"{time_key}_each": each})
    return medians
