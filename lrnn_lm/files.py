"""What several parts need of the machine: files replaced in one go, random states, the hub, device names."""

import math
import os
import random
import signal
import socket
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_HUB_SECONDS = 5.0  # for a connection


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable(folder: Path, files: Iterable[Path]) -> None:
    """Let those who may read a new folder read its files: safetensors 0.8 makes files for one user alone.

    Not where the file system refuses: a run must not end for it.
    """
    mode = folder.stat().st_mode & 0o666  # as the umask has it
    for file in files:
        if mode & ~(own := file.stat().st_mode):
            with suppress(OSError):
                file.chmod(own | mode)


def replace_file(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file so that a reader, or a process killed in between, sees the old content or the new one.

    `durable` waits until both the content and the name are on disk. Raises OSError, and leaves the old
    content, if there is no room.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write it at a time
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            fsync(aside)
        os.replace(aside, path)
        if durable:
            fsync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Inside, SIGTERM, SIGHUP and SIGUSR1 raise SystemExit, so that what is half-made is removed.

    A handler that is there already stays, as does a signal that is ignored (nohup).
    """
    here = threading.current_thread() is threading.main_thread()
    taken = [n for n in _ENDING if here and signal.getsignal(n) == signal.SIG_DFL]

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def finite(facts: Any) -> Any:
    """The same with None for NaN and infinities, which JSON lacks: a loss or a state may have diverged."""
    if isinstance(facts, dict):
        return {key: finite(value) for key, value in facts.items()}
    if isinstance(facts, list):
        return [finite(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts


def words_of(error: Exception) -> str:
    """An error in a line for a person; of the system's, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        no_folder = isinstance(error, FileExistsError) and not os.path.isdir(error.filename or ".")
        why = "is no folder, but a file or a link to what is gone" if no_folder else error.strerror
        return f"{error.filename or 'output'}: {why}"
    return str(error)


def user_path(path: str | os.PathLike) -> Path:
    """A path as a person writes it: ~ and ~NAME are home folders, $NAME is a variable of the environment.

    Raises ValueError if there is no such person, or no variable that the path begins with.
    """
    found = Path(os.path.expandvars(path))
    if str(found).startswith("$") and not found.exists():
        raise ValueError(f"{path}: there is no such variable here, so write the path out")
    try:
        return found.expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such user here, so write the path out") from None


@contextmanager
def random_state_kept(device: "torch.device") -> Iterator[None]:
    """Inside, others may seed and draw: afterwards the generators of Python, NumPy, the CPU and this device
    are as before."""
    import numpy
    import torch

    python, legacy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # not each GPU of the machine
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(legacy)


@contextmanager
def no_default_device() -> Iterator[None]:
    """Inside, torch makes tensors on the CPU unless told otherwise, whatever the caller has set."""
    torch: Any = sys.modules.get("torch")
    if torch is None:  # nobody can have set anything
        yield
        return
    device = rest = torch.get_default_device()
    contexts = getattr(torch.overrides, "_get_current_function_mode_stack", tuple)  # in torch 2.11 to 2.13
    if len(contexts()) == 1:
        # Taken away, where nothing is around it: any default device, "cpu" too, is a context of every call of
        # torch, which makes them slower and breaks the graphs of torch.compile.
        torch.set_default_device(None)
        rest = torch.get_default_device()  # that of a `with torch.device(..)` stays
    try:
        with nullcontext() if rest.type == "cpu" else torch.device("cpu"):
            yield
    finally:
        if rest != device:
            torch.set_default_device(device)


class RankError(ValueError):
    """The environment contradicts itself about this process; others may be right, so each tells its own."""


def world_size() -> int:
    """Processes that a launcher started together: WORLD_SIZE.

    Raises RankError if this one's RANK is none of theirs: they would meet without it, and it would wait.
    """
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    if size == "1" and os.environ.get("LOCAL_RANK", "-1") == "-1":
        return 1  # nobody is met, whatever RANK is
    if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise RankError(
            f"the environment has RANK={rank} and WORLD_SIZE={size}: ranks count from 0 to WORLD_SIZE - 1; "
            "start all by accelerate launch or torchrun, or unset RANK, LOCAL_RANK and WORLD_SIZE"
        )
    return int(size)


def hub_is_reachable() -> bool:
    """Whether the Hugging Face hub answers: its libraries would spend a minute on retries first.

    False in offline mode. True behind a proxy, where only a request would tell.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies().keys() & {"http", "https", "all"}:
        return True
    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        port = hub.port or (80 if hub.scheme == "http" else 443)
        socket.create_connection((hub.hostname or "", port), _HUB_SECONDS).close()
    except OSError:
        return False
    return True


def pick_device(device: str = "auto") -> "torch.device":
    """A torch device by name: auto (CUDA if there is any), cpu, cuda, cuda:N, or mps.

    AMD's GPUs are named cuda, too. Raises ValueError for another name, or a device that this machine lacks.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        if target.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except RuntimeError:
        raise ValueError(f"device {device!r}: use auto, cpu, cuda, cuda:N or mps") from None
    if target.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"device {device!r}: this machine or this build of torch has no MPS; use cpu or auto"
        )
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: there is no such CUDA device on this machine; use cpu or auto")
    return target
