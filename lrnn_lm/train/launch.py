"""`python -m lrnn_lm.train.launch`: `accelerate launch` with other exit codes and signal handling.

Accelerate's launcher turns every exit code of the ranks into 1, so a scheduler cannot tell a run that stopped
and saved (85) from a broken one; and after a signal it kills the ranks within 30 seconds. This one exits with
the code of the rank that ended first, and passes signals on to the ranks, which act on them at a step
boundary. Options, configuration files and environment are Accelerate's. Not needed where each task of srun is
a rank.
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
    """Launch; exits with 0, or with the code of the first rank that failed."""
    options = launch_command_parser().parse_args(arguments)
    for number in _PASSED_ON:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # under nohup, this process and the ranks ignore it
        signal.signal(number, _pass_on)
    # In the main thread torch's agent would install its own signal handlers, which kill the ranks.
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
        except ProcessLookupError:  # it has ended
            continue


def _hears_the_keyboard(child: int) -> bool:
    """Whether Ctrl-C reaches the child itself. To pass it on would be a second one, which quits at once.

    Torch's launcher gives each rank a session; a single process stays in ours.
    """
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.getpgid(child) == os.getpgrp() == os.tcgetpgrp(terminal.fileno())
    except ProcessLookupError:
        raise
    except OSError:  # no terminal
        return False


def _children() -> list[int]:
    """Running processes that this one started."""
    tasks = Path(f"/proc/{os.getpid()}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def _code(exitcode: int) -> int:
    """The exit code as a shell gives it: 128 + the signal's number for a rank that a signal ended."""
    return exitcode if exitcode >= 0 else 128 - exitcode


if __name__ == "__main__":
    main()
