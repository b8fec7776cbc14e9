"""Folders that are complete or absent: built aside, flushed to disk, renamed; one builder at a time."""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ..files import fsync, signals_unwind

_BUILDING = ".building-"


def build_folder(final: Path, build: Callable[[Path], None]) -> None:
    """Make the folder `final` unless it exists: `build` fills an empty folder, which is then renamed.

    If `build` is stopped, its folder is removed, at the latest by the next call. Of two processes the second
    waits for the first one's folder.
    """
    if final.is_dir():
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    with _lock(final.parent / f".{final.name}.lock") as locked, signals_unwind():
        if final.is_dir():
            return
        if locked:  # so no process is building these
            for left in final.parent.glob(f"{_BUILDING}{final.name}-*"):
                shutil.rmtree(left, ignore_errors=True)
        aside = final.parent / f"{_BUILDING}{final.name}-{secrets.token_hex(4)}"
        try:  # around mkdir too: a signal can hit between two lines
            aside.mkdir()  # not tempfile's, whose folders others cannot read
            build(aside)
            for path in [*aside.rglob("*"), aside]:
                fsync(path)
            _rename_new(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(parent: Path) -> None:
    """Remove half-made folders whose builder has ended."""
    for left in parent.glob(f"{_BUILDING}*"):
        name = left.name.removeprefix(_BUILDING).rpartition("-")[0]
        with _lock(parent / f".{name}.lock", wait=False) as locked:
            if locked:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an advisory lock; yields whether it is held: some network file systems have none."""
    with _lock_file(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except OSError:
            locked = False
        yield locked


def _lock_file(path: Path) -> IO[str]:
    """A lock's file, made unless it is there. Another user's is opened to read, which is enough for `flock`:
    in a cache that several share only its maker may write to it."""
    try:
        return path.open("a")
    except PermissionError:
        if not path.is_file():
            raise
        return path.open()


def _rename_new(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError:
        if not target.is_dir():  # without locks another process may have been first, with the same bytes
            raise
    fsync(target.parent)
