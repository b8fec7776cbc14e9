"""`python -m lrnn_lm.train.launch` is `accelerate launch`, but for how it ends and what it does with signals.

Accelerate's launcher turns every exit code of the ranks into 1, so a scheduler cannot tell a run that was
stopped and saved (85) from a broken one; and it gives ranks that a signal ends half a minute. This one
leaves with the code of the rank that ended first, and passes signals on to the ranks, which act on them at a
step boundary. Options, configuration files and environment are Accelerate's. Where each task of srun is a
rank, no launcher stands in between and none is needed.
"""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def main(arguments: list[str] | None = None) -> None:
    """Launch as told; exits with 0, or the code of the first rank that ended with another."""
    options = launch_command_parser().parse_args(arguments)
    for number in _PASSED_ON:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # under nohup the ranks ignore it as this process does
        signal.signal(number, _pass_on)
    # torch's agent takes the signals for itself, and ends the ranks on one, unless it is in another thread
    launching = ThreadPoolExecutor(1).submit(launch_command, options)
    try:
        launching.result()
    except ChildFailedError as failed:
        sys.exit(_code(failed.get_first_failure()[1].exitcode))
    except subprocess.CalledProcessError as failed:  # a single process
        sys.exit(_code(failed.returncode))


def _pass_on(number: int, frame: FrameType | None) -> None:
    for child in _children():
        try:
            if number != signal.SIGINT or not _hears_the_keyboard(child):
                os.kill(child, number)
        except ProcessLookupError:  # ended in between
            continue


def _hears_the_keyboard(child: int) -> bool:
    """Whether Ctrl-C reaches the child itself: passed on it would be a second one, which quits at once.

    Torch's launcher gives its ranks sessions of their own; a process alone stays in ours.
    """
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.getpgid(child) == os.getpgrp() == os.tcgetpgrp(terminal.fileno())
    except ProcessLookupError:
        raise
    except OSError:  # no terminal
        return False


def _children() -> list[int]:
    """Processes started by this one and still there."""
    tasks = Path(f"/proc/{os.getpid()}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def _code(exitcode: int) -> int:
    """As a shell has it: 128 and the signal for a rank that one ended."""
    return exitcode if exitcode >= 0 else 128 - exitcode


if __name__ == "__main__":
    main()
