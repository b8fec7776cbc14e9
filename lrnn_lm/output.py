"""Standard error for people: what is written there must not end a run when nobody reads it any more.

Only the standard library is imported at first, so that handlers of signals are installed before torch is
loaded.
"""

import os
import select
import stat
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def error_console() -> "Console":
    """Rich's, on standard error. What it belongs to goes on in silence where the reader has ended, as after
    Ctrl-C of `| tee log`, or where the disk of a log is full."""
    from rich.console import Console

    class Lasting(Console):
        def on_broken_pipe(self) -> None:
            """Rich would end the process here, before the run is saved."""
            leave_output()

        def _check_buffer(self) -> None:  # rich's, without a public name: where all output is written
            try:
                super()._check_buffer()
            except OSError:
                leave_output(self.file)

    return Lasting(stderr=True, highlight=False)


def leave_output(failed: object = None) -> None:
    """Send output that nobody can read any more to /dev/null: a write error would end the run unsaved.

    failed: a stream that could not be written; it is among them.
    """
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            descriptor = stream.fileno() if stream is not None else -1
            kind = os.fstat(descriptor).st_mode
            closed = stat.S_ISCHR(kind) and not os.isatty(descriptor)  # the terminal
            dead = closed or (stream is failed and stream is not None)
            if stat.S_ISFIFO(kind):  # the reader, such as `tee`, has ended
                pipe = select.poll()
                pipe.register(descriptor, 0)
                dead = bool(pipe.poll(0))
        except (OSError, ValueError):  # closed
            continue
        if dead:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def say(words: object, stream: TextIO) -> None:
    """Print a line. A stream that cannot be written changes no exit code."""
    try:
        print(words, file=stream, flush=True)
    except OSError:
        leave_output(stream)
