"""Copying a run's checkpoints elsewhere while it trains (`checkpoint.copy_to`), on the main rank.

A process of its own copies: it takes no time of training's Python, and no random numbers, which the stores'
drivers draw for their retries from the generator that a checkpoint holds.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

_COPY = "import sys; sys.path[:] = {path!r}; from lrnn_lm.runs.remote_copy import main; main(sys.argv[1:])"


class Copier:
    """Starts the process that copies a checkpoint, one at a time, and tells when it could not."""

    def __init__(self, run: Path, copy_to: str, tell: Callable[[str], None]):
        """copy_to: the folder of runs there. tell: gets a line a failed copy."""
        self._run, self._to, self._tell = run, copy_to, tell
        self._process: subprocess.Popen[bytes] | None = None
        self._said = TemporaryFile()  # noqa: SIM115 (a pipe that nobody reads would fill, and stop the copy)
        self._name: str | None = None  # of the checkpoint last begun
        self.problem: str | None = None  # why the last copy failed; None: it did not

    @property
    def in_use(self) -> str | None:
        """Name of the checkpoint that is being copied."""
        busy = self._process is not None and self._process.poll() is None
        return self._name if busy else None

    def offer(self, name: str) -> None:
        """Begin to copy a checkpoint, unless an older one is still being copied: then it is left out."""
        if self.in_use is None:
            self._collect()
            self._start(name)

    def wait(self, until: float | None = None) -> bool:
        """Wait for the copy that is being made, at most until this time (monotonic); whether it has ended."""
        if self._process is None:
            return True
        try:
            self._process.wait(None if until is None else max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        self._collect()
        return True

    def finish(self, name: str, until: float | None = None, everything: bool = False) -> bool:
        """Copy a checkpoint unless that is done, and with `everything` all else of the run; whether it is."""
        if self.wait(until) and (everything or self._name != name or self.problem is not None):
            self._start(name, *(["everything"] if everything else []))
        if self.wait(until):
            return self.problem is None
        self._tell(f"{self._name} is still being copied to {self._to}; not waiting for it any longer")
        return False

    def _start(self, name: str, *options: str) -> None:
        self._name = name
        self._said.seek(0)
        self._said.truncate()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _COPY.format(path=sys.path),
             str(self._run), self._to, name, *options],
            stdin=subprocess.DEVNULL, stdout=self._said, stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the trainer
        )  # fmt: skip

    def _collect(self) -> None:
        """Read how the last copy ended, and tell if it failed."""
        if self._process is None:
            return
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read()
        self._process = None
        lines = said.decode(errors="replace").strip().splitlines()
        self.problem = (lines[-1] if lines else f"it ended with code {code}") if code else None
        if self.problem is not None:
            self._tell(f"could not copy {self._name} to {self._to}: {self.problem}")
