"""Which errors of a command a person can mend, and what is printed of them in place of a traceback."""

import errno
import os
import re
import sys
from itertools import pairwise
from typing import Any

from typer.core import TyperGroup

from .files import RankError, words_of
from .output import say

_ERRNO = (  # of the system's errors
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
_LESS_MEMORY = {  # what to do about a full GPU or memory, by command
    "train": "lower train.micro_batch, set train.activation_checkpointing=true, or read long rows by "
    "train.segment; lrnn info RECIPE estimates the memory",
    "eval": "lower --batch-size or --max-length; of a probe --length or --rows",
    "generate": "lower --segment or --max-new-tokens",
}
_CPU = "DefaultCPUAllocator: can't allocate memory"  # torch's words, in a plain RuntimeError


class Commands(TyperGroup):
    """Takes `--prompt --greedy` for a prompt that was forgotten, not for the prompt "--greedy"."""

    def resolve_command(self, context: Any, words: list[str]) -> Any:
        name, command, rest = super().resolve_command(context, words)
        options = {text: o for o in command.get_params(context) for text in o.opts if text[:1] == "-"}
        for option, value in pairwise(rest):
            if option in options and not options[option].is_flag and value in options:
                raise ValueError(f"{option} has no value; if that is {value}, write {option}={value}")
        return name, command, rest


def is_users(mistake: Exception) -> bool:
    """Whether a person can mend it: a ValueError of ours, no memory, or a system error in _ERRNO."""
    if isinstance(mistake, RuntimeError):
        return _is_out_of_memory(mistake)
    return not isinstance(mistake, OSError) or mistake.errno in _ERRNO


def tell(mistake: Exception, command: str) -> None:
    """Print a mistake of `lrnn COMMAND` to stderr, in a line or two; nothing where another rank does."""
    if not _is_told_here() and not isinstance(mistake, RankError):
        return
    if _is_out_of_memory(mistake):
        asked = re.search(r"(?:[Tt]ried|Unable) to allocate ([\d.]+ \w+)", str(mistake))
        place = "in memory" if isinstance(mistake, MemoryError) or _CPU in str(mistake) else "on the GPU"
        # The empty line ends the line of the progress bar.
        print(f"\nlrnn: no room {place} for {asked[1] if asked else 'what is'} more", file=sys.stderr)
        print(f"lrnn: {_LESS_MEMORY.get(command, 'end what else runs there')}", file=sys.stderr)
    elif message := words_of(mistake):  # empty where another rank prints it
        say(f"lrnn: {message}", sys.stderr)


def tell_replaced(overrides: list[str] | None) -> list[str] | None:
    """Say which overrides a later one of the same key replaces, as where a script adds to its own.

    No error: the last one counts, as with options of a command line. Returns them all.
    """
    given: dict[str, list[str]] = {}
    for text in overrides or []:
        given.setdefault(text.partition("=")[0].strip(), []).append(text)
    for key, texts in given.items():
        if len({*texts}) > 1 and _is_told_here():
            print(
                f"lrnn: {key} is given {len(texts)} times; the last counts: {texts[-1].strip()}",
                file=sys.stderr,
            )
    return overrides


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # only what is imported can have raised it
    of_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return of_gpu or isinstance(error, MemoryError) or _CPU in str(error)


def _is_told_here() -> bool:
    """Whether this rank prints the message.

    Before the process group exists every rank finds the same mistake, so only local rank 0 prints it. In a
    job of `lrnn submit` (LRNN_LOGS) every rank has its own log and prints it there.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" or "LRNN_LOGS" in os.environ:
        return True
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
