"""SIGTERM, SIGUSR1, SIGINT and SIGHUP stop a run: in training at a step boundary, otherwise at once.

Only the standard library is imported here, so that the handlers are installed before torch is loaded.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..output import leave_output

EXIT_STOPPED = 85  # stopped by a signal with nothing lost; SLURM requeues on it
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Stopped(SystemExit):
    """The run was asked to stop and has saved its state; the process exits with EXIT_STOPPED.

    `tell`: whether this rank's message is the one to show.
    """

    def __init__(self, message: str, tell: bool = True):
        super().__init__(EXIT_STOPPED)
        self.message, self.tell = message, tell

    def __str__(self) -> str:
        return self.message


class OtherRankError(Exception):
    """Another rank has failed in the scoring of tasks. It says why, and this one nothing."""


class AskedToStopError(Exception):
    """A signal came during a validation or the scoring of tasks, on any rank."""


class StopSignal:
    """Signal handlers as a context manager, which restores the old ones at its end.

    A signal raises Stopped at once during start-up, data preparation and scoring, where half-made files are
    removed on the way out. Inside `held()` it only sets `asked`, on which the ranks agree at step boundaries.
    A second SIGINT ends the process at once. SIGHUP means that the terminal was closed; under `nohup` it
    stays ignored. In another thread than the main one, signals are left to the program.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._held = False
        self._interrupts = 0
        self._old: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> "StopSignal":
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        main = threading.current_thread() is threading.main_thread()  # elsewhere Python installs none
        numbers = [n for n in _SIGNALS if main and not (ignored and n == signal.SIGHUP)]
        self._old = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From now on signals wait until `asked` is read."""
        self._held = True

    def let_go(self) -> None:
        """From now on signals raise Stopped at once; so does one that came while they were held."""
        self._held = False
        self.leave_if_asked()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Inside a held part, let signals raise Stopped at once again."""
        self.let_go()
        try:
            yield
        finally:
            self._held = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, signals wait until `asked` is read: the state of training."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def leave_if_asked(self) -> None:
        """Raise Stopped, unless held, if a signal came and was not acted on, as during the last save."""
        if self._name is not None and not self._held:
            raise Stopped(f"stopped by {self._name}; run the same command again to resume")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os._exit(128 + signal.SIGINT)
        if number == signal.SIGHUP:
            leave_output()
        self._name = signal.Signals(number).name
        if not self._held:
            self.leave_if_asked()

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._name is not None

    @property
    def name(self) -> str:
        """The signal's name; in words if another rank received it."""
        return self._name or "a signal on another rank"
