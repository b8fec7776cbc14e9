"""metrics.jsonl, the trackers beside it, and when something is due.

Lines are flushed as they are written; a run that is resumed first cuts the lines that came after its checkpoint,
so that every step stands there once.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..recipe.quantities import Every


class Metrics:
    """Appends one JSON object a line to metrics.jsonl on the main rank, and passes numbers on to the trackers."""

    def __init__(self, folder: Path, accelerator: Accelerator, resume_step: int):
        self._accelerator = accelerator
        self._file = None
        if accelerator.is_main_process:
            path = folder / "metrics.jsonl"
            _cut_after(path, resume_step)
            self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Write a line; numbers that are not finite become null, as JSON has no word for them."""
        if self._file is not None:
            self._file.write(json.dumps({k: _finite(v) for k, v in line.items()}) + "\n")
            self._file.flush()
        if self._accelerator.trackers:
            numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
            self._accelerator.log(numbers, step=line["step"])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_after(path: Path, step: int) -> None:
    """Drop lines of steps after `step` and a torn last line; the file is replaced in one go."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)


class Cadence:
    """Says after which steps something is due, by tokens, steps or minutes."""

    def __init__(self, every: Every, tokens_per_step: int):
        self._every = every
        self._tokens_per_step = tokens_per_step
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is due after `step` steps. By minutes, asking restarts the clock when the answer is yes."""
        if self._every.unit == "minutes":
            if time.monotonic() - self._last < 60 * self._every.amount:
                return False
            self._last = time.monotonic()
            return True
        amount = int(self._every.amount)
        if self._every.unit == "steps":
            return step % amount == 0
        return step * self._tokens_per_step // amount > (step - 1) * self._tokens_per_step // amount
