"""Checks kernels on a GPU in processes of their own, and times them in order of importance.

Compiling takes nearly all of the time, so each case is compiled and checked in a process of its own, as many
at once as there are cores; a fault names its case and spares the others. An item is timed as soon as its
cases are right, and the file is written after each. Once nothing compiles any more, all are timed again
(`"alone": true`), as a busy host delays what is launched.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch

from .. import measure

Words = tuple[str, ...]


class Item(NamedTuple):
    """Cases, each the words after `case` of a command line, and what gives a row of times; None: no times."""

    cases: list[Words]
    clock: Callable[[], dict[str, Any]] | None


class _Case:
    """A check in a process of its own. Launches wait for each other, so that an error names its kernel."""

    def __init__(self, module: str, words: Words) -> None:
        self.words, self.right = words, None
        # Files, as a compiler that fails prints more than a pipe holds, and would wait for a reader.
        self.said, self.errors = (TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "case", *words], stdout=self.said, stderr=self.errors,
            env={**os.environ, "CUDA_LAUNCH_BLOCKING": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ended(self) -> bool:
        """Whether it has ended; what it said is printed."""
        if self.right is None and self.process.poll() is not None:
            self.said.seek(0)
            self.errors.seek(0)
            said, error = self.said.read(), self.errors.read()
            self.right = self.process.returncode == 0
            if not self.right and "WRONG" not in said:
                said = f"{' '.join(self.words)}: FAILED, exit code {self.process.returncode}\n{error[-3000:]}"
            print(said.strip(), flush=True)
        return self.right is not None


def run_items(
    module: str, items: dict[str, Item], arguments: Sequence[str]
) -> tuple[list[dict[str, Any]], bool]:
    """Rows of times, and whether no case failed. arguments: [out.json] [--items a,b] [--seconds S]."""
    parser = argparse.ArgumentParser(prog=module)
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--items", default=",".join(items), help="in order of importance")
    parser.add_argument("--seconds", type=float, default=600.0, help="what is not done then is left out")
    options = parser.parse_args(arguments)
    chosen = {name: items[name] for name in options.items.split(",")}
    ends = time.monotonic() + options.seconds
    rows: dict[str, dict[str, Any]] = {}

    def clock(name: str, alone: bool) -> None:
        rows[name] = {"item": name, **chosen[name].clock(), "alone": alone}
        print(rows[name], flush=True)
        if options.output is not None:
            about = measure.describe(torch.device("cuda"))
            measure.write_json(options.output, {"about": about, "rows": [*rows.values()]})

    waiting = [*dict.fromkeys(words for item in chosen.values() for words in item.cases)]
    begun: dict[Words, _Case] = {}
    left = list(chosen)
    while left and time.monotonic() < ends:
        while waiting and sum(not case.ended() for case in begun.values()) < (os.cpu_count() or 1):
            words = waiting.pop(0)
            begun[words] = _Case(module, words)
        ready = [n for n in left if all(w in begun and begun[w].ended() for w in chosen[n].cases)]
        for name in ready[:1]:
            left.remove(name)
            if chosen[name].clock and all(begun[words].right for words in chosen[name].cases):
                clock(name, alone=False)
        time.sleep(0.0 if ready else 0.1)
    for case in begun.values():
        if not case.ended():
            case.process.kill()
    for name in [*rows]:
        if time.monotonic() < ends:
            clock(name, alone=True)
    print(f"not done: {', '.join(left) or 'nothing'}")
    return [*rows.values()], all(case.right is not False for case in begun.values())
