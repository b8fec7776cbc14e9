"""`lrnn bench frontier`, a process for each contender: side by side what needs no clock, then speed alone.

A fault of a GPU, memory that runs out or a model without end is then one contender's row. Compilers run side
by side: each process first compiles the kernels of its contender's speed. All append to one file of rows.
With several GPUs, each has its own processes.
"""

import os
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import frontier
from .results import attempt, read_results

SPEED_SHARE = 0.3  # of --budget-seconds
START = "forkserver"
PRELOADED = ["benchmarks.frontier", "lrnn_lm.model.modeling", "lrnn_lm.train.build"]


class Running(NamedTuple):
    name: str
    gpu: str
    began: float
    process: Any


def run_apart(settings: frontier.FrontierSettings, device: str, output: Path) -> None:
    """Append what is missing in `output`. What is still missing when a contender's process has ended gets a
    reason; what --budget-seconds cuts gets none, and the next call measures it."""
    began, budget = time.monotonic(), settings.budget_seconds
    for kinds, share in ((("task", "loss"), 1 - SPEED_SHARE), (("speed",), 1)):
        ends = began + (budget * share if budget else float("inf"))
        _run_kinds(settings, kinds, device, output, ends)


def _run_kinds(
    settings: frontier.FrontierSettings, kinds: tuple[str, ...], device: str, output: Path, ends: float
) -> None:
    """Rows of these kinds, until `ends` (time.monotonic)."""
    # The server imports once what takes ten seconds in a process of its own. It must not start CUDA, which no
    # fork survives: torch then counts devices without it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = get_context(START)
    context.set_forkserver_preload(PRELOADED)
    waiting = [
        name for name in frontier.split(settings.contenders) if _missing(settings, name, kinds, output)
    ]
    free = _gpus(device) * (1 if "speed" in kinds else settings.processes)
    running: list[Running] = []
    while running or (waiting and time.monotonic() < ends):
        while waiting and free and time.monotonic() < ends:
            name, gpu = waiting.pop(0), free.pop(0)
            process = context.Process(target=_measure, args=(settings, name, kinds, device, gpu, output))
            process.start()
            running.append(Running(name, gpu, time.monotonic(), process))
        time.sleep(0.1)
        for one in list(running):
            if not (said := _ended(one, settings.seconds_each, ends)):
                continue
            running.remove(one)
            free.append(one.gpu)
            print(
                f"{one.name}, {' and '.join(kinds)}: {time.monotonic() - one.began:.0f} s, {said}", flush=True
            )
            for row in _missing(settings, one.name, kinds, output) if said != "cut" else ():
                frontier.append(output, {**row, "reason": said})
    if time.monotonic() >= ends:
        print(f"the time of {' and '.join(kinds)} is spent; the same command continues")


def _missing(
    settings: frontier.FrontierSettings, name: str, kinds: tuple[str, ...], output: Path
) -> list[frontier.Row]:
    return frontier.missing(settings, name, kinds, read_results(output)[1])


def _ended(one: Running, limit: float | None, ends: float) -> str:
    """How a contender's process ended, or nothing while it may go on; it is killed when its time is over."""
    if one.process.is_alive():
        late, cut = limit is not None and time.monotonic() - one.began > limit, time.monotonic() > ends
        if not late and not cut:
            return ""
        one.process.kill()
        one.process.join()
        return "cut" if cut else f"not done within {limit:g} s"
    one.process.join()
    return "done" if one.process.exitcode == 0 else f"its process ended with {one.process.exitcode}"


def _gpus(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for a process on each GPU; one empty word on a CPU."""
    if device != "cuda":
        return [""]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return frontier.split(given) if given else [str(i) for i in range(torch.cuda.device_count())]


def _measure(
    settings: frontier.FrontierSettings,
    name: str,
    kinds: tuple[str, ...],
    device: str,
    gpu: str,
    output: Path,
) -> None:
    """In a process of its own: the missing rows of a contender."""
    torch.set_num_threads(1)
    target, settings = torch.device(device), replace(settings, budget_seconds=None)
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before CUDA starts in this process
        if "speed" not in kinds and _missing(settings, name, ("speed",), output):
            brief = replace(settings, decoded=1)
            job = replace(frontier.Fitter(settings).large(name, frontier.ALIGNED), layers=1)
            attempt(lambda: frontier.speed(brief, job, target))
    frontier.measure_rows(settings, [name], kinds, target, output)
