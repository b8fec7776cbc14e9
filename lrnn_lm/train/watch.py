"""Whether a run is alive and what slows it: a heartbeat file, stacks of a hanging step, the slowest rank."""

import faulthandler
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ..files import replace_file
from ..runs.layout import RunFolder

_BEAT_SECONDS = 5.0  # between writes of the file, which may be on a network file system
_SLOW = 1.5  # a rank that takes this many times the median is a straggler


class Heartbeat:
    """`heartbeat.json` in the run folder: step, time (seconds since 1970), tokens and what is being done.

    An old `time` means that the run hangs. If a step takes longer than `stall_seconds`, the stacks of all
    threads are printed to stderr, by a C thread that needs no GIL.
    """

    def __init__(self, folder: Path, main: bool, stall_seconds: float):
        self._path, self._main, self._stall = RunFolder(folder).heartbeat, main, stall_seconds
        self._last = -_BEAT_SECONDS

    def beat(self, step: int, tokens: int, doing: str = "training", now: bool = False) -> None:
        """Call it at every step boundary; `now` writes the file even if 5 seconds have not passed."""
        with suppress(OSError, ValueError, AttributeError, RuntimeError):  # stderr has no descriptor
            faulthandler.dump_traceback_later(self._stall, exit=False)
        moment = time.monotonic()
        if not self._main or (not now and moment - self._last < _BEAT_SECONDS):
            return
        self._last = moment
        facts = {"step": step, "time": time.time(), "tokens": tokens, "doing": doing, "pid": os.getpid()}
        with suppress(OSError):  # a full disk: the next checkpoint reports it
            replace_file(self._path, json.dumps(facts) + "\n")

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()


class Stopwatch:
    """Seconds of a rank's own work: a step's first forward pass, which waits for no other rank."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Around that pass."""
        began = self._mark()
        yield
        self._marks = [began, self._mark()]

    def seconds(self) -> float:
        """Of the last pass. Call it after the host has waited for the device: it would wait here again."""
        if not self._marks:
            return 0.0
        first, last = self._marks
        return first.elapsed_time(last) / 1000 if self._cuda else last - first

    def _mark(self) -> "torch.cuda.Event | float":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def straggler(seconds: list[float]) -> dict[str, float]:
    """`slowest_rank` and its `slowdown`, in times the (lower) median; empty if no rank is a straggler."""
    if len(seconds) < 2 or min(seconds) <= 0:
        return {}
    each = torch.tensor(seconds)
    slowest = int(each.argmax())
    times = float(each[slowest] / each.median())
    return {"slowest_rank": slowest, "slowdown": times} if times > _SLOW else {}
