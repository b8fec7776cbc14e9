"""Is the run alive, and who holds it up: a heartbeat file, stacks of a step that hangs, the slowest rank."""

import faulthandler
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ..files import replace_file
from ..runs.layout import RunFolder

_BEAT_SECONDS = 5.0  # between writes of the file, which may lie on a network
_SLOW = 1.5  # times the median: a straggler


class Heartbeat:
    """`heartbeat.json` in the run folder: step, time (seconds since 1970), tokens and what is being done.

    Whoever reads it knows a run that stands still by the age of `time`. And a step that takes longer than
    `stall_seconds` has the stacks of its threads printed to stderr, by a thread of C that no lock can stop.
    """

    def __init__(self, folder: Path, main: bool, stall_seconds: float):
        self._path, self._main, self._stall = RunFolder(folder).heartbeat, main, stall_seconds
        self._last = -_BEAT_SECONDS

    def beat(self, step: int, tokens: int, doing: str = "training", now: bool = False) -> None:
        """At every step boundary; `now` writes whether or not it is time."""
        if _has_descriptor():
            faulthandler.dump_traceback_later(self._stall, exit=False)
        moment = time.monotonic()
        if not self._main or (not now and moment - self._last < _BEAT_SECONDS):
            return
        self._last = moment
        facts = {"step": step, "time": time.time(), "tokens": tokens, "doing": doing, "pid": os.getpid()}
        with suppress(OSError):  # no room for a line: the next checkpoint will tell, and better
            replace_file(self._path, json.dumps(facts) + "\n")

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()


def _has_descriptor() -> bool:
    """faulthandler writes to the descriptor itself; a captured stderr has none."""
    try:
        sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    return True


class Stopwatch:
    """Seconds of a rank's own work: a step's first forward pass, in which it waits for nobody."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []

    def start(self) -> None:
        self._marks = [self._mark()]

    def stop(self) -> None:
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """Of the last pass; asked after a transfer that had to wait for the device anyway."""
        if len(self._marks) != 2:
            return 0.0
        first, last = self._marks
        return first.elapsed_time(last) / 1000 if self._cuda else last - first

    def _mark(self) -> "torch.cuda.Event | float":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def slots(accelerator: Accelerator, seconds: float) -> list[float]:
    """Zeros but for this rank's place: their sum over ranks holds everybody's seconds."""
    return [
        seconds if rank == accelerator.process_index else 0.0 for rank in range(accelerator.num_processes)
    ]


def straggler(seconds: list[float]) -> dict[str, float]:
    """`slowest_rank` and how many times the median it takes, if that is much; nothing otherwise."""
    if len(seconds) < 2 or min(seconds) <= 0:
        return {}
    ordered: Tensor = torch.tensor(seconds)
    slowest = int(ordered.argmax())
    times = float(ordered[slowest] / ordered.median())
    return {"slowest_rank": slowest, "slowdown": times} if times > _SLOW else {}
