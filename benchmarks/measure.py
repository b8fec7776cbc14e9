"""Timers, limits of the machine, and tables, shared by all benchmarks.

A number means little without the machine's limits, so each run measures them too: the speed of a device copy
(bytes read plus bytes written) and of a large bf16 matrix product, on random data.
"""

import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lrnn_lm.model.decoding.step import nothing_left_behind

Work = Callable[[], Any]


def describe(device: torch.device) -> dict[str, Any]:
    """What a result has to be read with."""
    about: dict[str, Any] = {"torch": torch.__version__, "device": "cpu", "threads": torch.get_num_threads()}
    if device.type == "cuda":
        import triton  # with a GPU it is there: torch's CUDA builds bring it

        properties = torch.cuda.get_device_properties(device)
        about = {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return {**about, "platform": platform.machine(), **_commit()}


def _commit() -> dict[str, str]:
    """{"commit": of this code, with `+` where it was changed since}; nothing outside a git checkout."""
    if (git := shutil.which("git")) is None:
        return {}
    ask = [
        git,
        "-C",
        str(Path(__file__).resolve().parent),
        "describe",
        "--always",
        "--exclude=*",
        "--dirty=+",
    ]
    told = subprocess.run(ask, capture_output=True, text=True, check=False)
    return {"commit": told.stdout.strip()} if told.returncode == 0 else {}


def cpu_seconds(contenders: Sequence[Work], repeats: int = 7) -> list[float]:
    """Median wall time of a call of each, after a warm-up; they take turns, so a busy moment hits all."""
    for work in contenders:
        work()
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats):
        for work, taken in zip(contenders, times, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def gpu_seconds(work: Work, repeats: int = 30, graph: bool = True) -> float:
    """Median time of a call by CUDA events.

    With `graph` the call is captured once and replayed, so that launching from Python costs nothing; what
    cannot be captured is timed as it is launched.
    """
    call = work
    if graph:
        with suppress(RuntimeError):
            call = captured(work)
    for _ in range(3):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs) / 1e3


def captured(work: Work) -> Work:
    """The call as a CUDA graph. RuntimeError where it synchronises, or allocates outside the pool."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with nothing_left_behind(stream.device), torch.cuda.graph(graph, stream=stream):
        kept = work()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def ceilings(device: torch.device) -> dict[str, float]:
    """{"copy_bytes_per_second", "matmul_flops_per_second"} of a GPU."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = gpu_seconds(lambda: target.copy_(source), graph=False)
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = gpu_seconds(lambda: a @ b, graph=False)
    return {
        "copy_bytes_per_second": 2 * source.numel() / copy,
        "matmul_flops_per_second": 2 * size**3 / product,
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=console.width if console.is_terminal else 160).print(table)  # a file takes wide lines


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
