"""SIGTERM, SIGUSR1, SIGINT, SIGHUP: at once while nothing is to be saved, at a step boundary in training.

Only the standard library is imported here, so that the handlers stand before torch is loaded.
"""

import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 85  # stopped by a signal with nothing lost; SLURM requeues on it
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Stopped(SystemExit):
    """The run was asked to stop and has saved what there was; ends in EXIT_STOPPED if nobody catches it.

    `tell`: whether this is the rank whose message a person should see.
    """

    def __init__(self, message: str, tell: bool = True):
        super().__init__(EXIT_STOPPED)
        self.message, self.tell = message, tell

    def __str__(self) -> str:
        return self.message


class StopSignal:
    """Handlers of the signals, as a context manager; the old ones come back at its end.

    SIGHUP is a terminal that was closed. Under `nohup` it is ignored, and stays so.

    A signal raises Stopped where it hits (start-up, data preparation, the scores at the end: what is
    half-made is removed on the way out). Inside `held()` it only becomes a wish, `asked`, on which the ranks
    agree at step boundaries. A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._held = False
        self._interrupts = 0
        self._old: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> "StopSignal":
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in _SIGNALS if not (ignored and number == signal.SIGHUP)]
        self._old = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From now on signals wait until `asked` is read."""
        self._held = True

    def let_go(self) -> None:
        """From now on signals act where they hit; one that came while they were held, here."""
        self._held = False
        self.leave_if_asked()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Among what is held, something that a signal may cut short: Stopped is raised where it hits."""
        self.let_go()
        try:
            yield
        finally:
            self._held = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """While training: signals wait until `asked` is read."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def leave_if_asked(self) -> None:
        """Raise Stopped, unless held, if a signal came that nobody acted on, as during the last save."""
        if self._name is not None and not self._held:
            raise Stopped(f"stopped by {self._name}; run the same command again to go on")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os._exit(128 + signal.SIGINT)
        if number == signal.SIGHUP:
            _leave_terminal()
        self._name = signal.Signals(number).name
        if not self._held:
            self.leave_if_asked()

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._name is not None

    @property
    def name(self) -> str:
        """The signal that came, or a word for one that came to another rank."""
        return self._name or "a signal on another rank"


def _leave_terminal() -> None:
    """What is written to a terminal that is gone would be an error, before anything was saved."""
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            descriptor = stream.fileno() if stream is not None else -1
            dead = stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor)
        except (OSError, ValueError):  # closed
            continue
        if dead:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
