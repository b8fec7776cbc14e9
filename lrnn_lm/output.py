"""Standard error for people: what is written there must not end a run when nobody reads it any more.

Only the standard library is imported at first, so that handlers of signals are installed before torch is
loaded.
"""

import os
import select
import stat
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def error_console() -> "Console":
    """Rich's, on standard error. What it belongs to goes on in silence where the reader has ended, as after
    Ctrl-C of `| tee log`."""
    from rich.console import Console

    class Lasting(Console):
        def on_broken_pipe(self) -> None:
            """Rich would end the process here, before the run is saved."""
            leave_output()

    return Lasting(stderr=True, highlight=False)


def leave_output() -> None:
    """Send output that nobody can read any more to /dev/null: a write error would end the run unsaved."""
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            descriptor = stream.fileno() if stream is not None else -1
            kind = os.fstat(descriptor).st_mode
            dead = stat.S_ISCHR(kind) and not os.isatty(descriptor)  # the terminal was closed
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
