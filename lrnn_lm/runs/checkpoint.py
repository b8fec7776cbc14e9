"""Checkpoints: a Hugging Face folder plus `trainer/`; written aside, fsynced, renamed, checked on load.

    checkpoints/step-00001000/   config.json, generation_config.json, the tokenizer's files
        *_lrnn.py                the model's code; at the end of a run only
        model.safetensors        the weights; of a sharded run, at its end only
        trainer/                 state.json, rng-00000.json/.safetensors (a rank each),
                                 optimizer.safetensors, or shards/*.safetensors (a rank each: its part of
                                 weights and optimiser),
                                 manifest.json (size and sha256 of every other file)
    checkpoints/latest, best     links, where there are any: the newest, that of lowest validation loss

Nothing is pickled. A folder whose manifest does not hold is damaged: it is skipped, with a warning, for the
one before, and removed once the run has saved again; if all are damaged the run ends there rather than begin
anew over what may still be of use. A folder leaves as it comes, by one rename, so that none ever shows half.
What is in the files is `tensors.py`; when they are written, `saver.py`.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..files import fsync, replace_file
from .layout import BEST, LATEST, CheckpointFolder, latest_checkpoint, list_checkpoints, step_name, step_of

FORMAT = 2
_READABLE = (1, 2)
_HASHING_THREADS = 8
_EXPECTED = ("config.json", "trainer/state.json", "trainer/rng-00000.json", "trainer/rng-00000.safetensors")
_WHOLE, _SHARDS = ("model.safetensors", "trainer/optimizer.safetensors"), "trainer/shards"
_LINKS = (LATEST, BEST)
COPY = ".plain-"  # of a sharded checkpoint, as a plain folder, while it is exported


class CheckpointError(ValueError):
    """A checkpoint that could not be written or read; the message says which, and what stays."""


@dataclass
class Position:
    """Where a run stands: optimiser steps done, samples passed, steps skipped, the last validation.

    `data` is the content hash of the prepared text whose samples are counted; `skips` are the ranges of
    samples [first, end) that are left out because they led nowhere.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    validated: int = -1
    validation_loss: float | None = None
    data: str = ""
    skips: list[list[int]] = field(default_factory=list)


def aside_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of this step is written before it appears."""
    return checkpoints / f".{step_name(step)}.tmp"


def publish(checkpoints: Path, step: int, keep_last: int, keep_best: bool, before: str | None = None) -> Path:
    """Let what was written aside, each file with its facts, appear under its name; then drop the oldest.

    `before` names the checkpoint that the run went on from or wrote last; None for a run's first.
    Raises OSError if the disk is full or cannot be written; what was there before stays.
    """
    final, aside = checkpoints / step_name(step), aside_of(checkpoints, step)
    facts: dict[str, Any] = {}
    for path in sorted(CheckpointFolder(aside).trainer.glob("facts-*.json")):
        facts |= json.loads(path.read_text())
        path.unlink()
    manifest = {"format": FORMAT, "step": step, "files": dict(sorted(facts.items()))}
    path = CheckpointFolder(aside).manifest
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    folders = [folder for folder in aside.rglob("*") if folder.is_dir()]
    for written in (path, *folders, aside):
        fsync(written)
    if final.exists():  # a damaged one, or one of a future that was given up, that this run went back over
        _remove(final)
    aside.rename(final)
    fsync(checkpoints)
    _point(checkpoints, LATEST, final.name)
    _prune(checkpoints, before, final, keep_last, keep_best)
    return final


def put_file(folder: Path, name: str, write: Callable[[Path], object]) -> None:
    """Put a file into a finished checkpoint, in place of one of that name if there is one; `write` makes it.

    The checkpoint is whole at every moment. A new file appears before the manifest names it; while one is
    replaced, the manifest has the checksums of both. Raises OSError if the disk is full.
    """
    manifest = CheckpointFolder(folder).manifest
    files = json.loads(manifest.read_text())["files"]
    aside = folder / f".{name}.tmp"
    try:
        write(aside)
        fsync(aside)
        facts = _facts(aside)
        if name in files:
            _write_files(manifest, {**files, name: [*_alternatives(files[name]), facts]})
        os.replace(aside, folder / name)
        fsync(folder)
        _write_files(manifest, {**files, name: facts})
    finally:
        aside.unlink(missing_ok=True)


def named_files(folder: Path) -> set[str]:
    """The files that the manifest names. Others may be what a killed process left: they count for nothing."""
    return set(json.loads(CheckpointFolder(folder).manifest.read_text())["files"])


def _write_files(path: Path, files: dict[str, Any]) -> None:
    """Have the manifest of a finished checkpoint name these files, in one go."""
    manifest = {**json.loads(path.read_text()), "files": dict(sorted(files.items()))}
    replace_file(path, json.dumps(manifest, indent=1) + "\n", durable=True)


def _alternatives(facts: Any) -> list[Any]:
    """What a file may be: one thing, or two where a process ended while the file was replaced."""
    return facts if isinstance(facts, list) else [facts]


def record_facts(aside: Path, files: Sequence[Path], rank: int) -> None:
    """Have these files on disk, and their sizes and checksums beside them until the folder is published."""
    for path in files:
        fsync(path)
    facts = {str(path.relative_to(aside)): _facts(path) for path in files}
    (CheckpointFolder(aside).trainer / f"facts-{rank:05d}.json").write_text(json.dumps(facts))


def read_position(folder: Path) -> Position:
    """Where a checkpoint stands."""
    return Position(**json.loads(CheckpointFolder(folder).state.read_text()))


def _prune(checkpoints: Path, before: str | None, final: Path, keep_last: int, keep_best: bool) -> None:
    """Keep the last few up to `before`, the checkpoint that was good until now, and `final`; and the best.

    And the last that was not written amid bad steps, to which the run may have to go back.
    """
    saved = list_checkpoints(checkpoints)
    names = [folder.name for folder in saved]
    good = names.index(before) + 1 if before in names else len(names)
    damaged = [folder for folder in saved[good:] if folder != final]  # else the run would have begun there
    whole = [folder for folder in saved if folder not in damaged]
    best = _best(whole) if keep_best else None
    if best is not None:
        _point(checkpoints, BEST, best.name)
    sound = [folder for folder in whole if (at := _position(folder)) is not None and at.bad_in_a_row == 0]
    for folder in saved:
        if folder not in (*whole[-keep_last:], *sound[-1:], best):
            _remove(folder)
    if not (checkpoints / BEST).exists():
        (checkpoints / BEST).unlink(missing_ok=True)


def _position(folder: Path) -> Position | None:
    try:
        return read_position(folder)
    except (OSError, ValueError, TypeError):  # damaged since it was written
        return None


def _best(folders: Sequence[Path]) -> Path | None:
    """The one of lowest validation loss, of those that were validated at their very step."""
    found = []
    for folder in folders:
        position = _position(folder)
        if position is None:
            continue
        if position.validated == position.step and position.validation_loss is not None:
            found.append((position.validation_loss, -position.step, folder))
    return min(found)[2] if found else None


def latest_name(checkpoints: Path) -> str:
    """The checkpoint last written or resumed from, for messages."""
    found = latest_checkpoint(checkpoints)
    return "none" if found is None else found.name


def drop_after(checkpoints: Path, step: int) -> None:
    """Take away the checkpoints of a future that the run has given up."""
    for folder in list_checkpoints(checkpoints):
        if step_of(folder) > step:
            _remove(folder)
    _point(checkpoints, LATEST, step_name(step))
    if not (checkpoints / BEST).exists():
        (checkpoints / BEST).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Take a folder away at one stroke; what then lies aside is cleared now or at the next start."""
    aside = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def newest_valid(checkpoints: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose manifest holds, None if none was written; damaged ones go through `warn`.

    Clears what a killed save left, so only one process may call it. Raises CheckpointError if all are
    damaged or gone, or the newest was written by a version that this one does not know.
    """
    clear_leftovers(checkpoints)
    if any(checkpoints.glob(f"{COPY}*")):
        with room_for_copy(checkpoints):
            pass
    _take_in(checkpoints)
    folders = list_checkpoints(checkpoints)
    for folder in reversed(folders):
        damage = verify(folder)
        if damage is None:
            _point(checkpoints, LATEST, folder.name)
            return folder
        before = "trying the one before" if folder != folders[0] else "there is none before"
        warn(f"checkpoint {folder} is damaged ({damage}); {before}")
    if folders:
        raise CheckpointError(
            f"no checkpoint in {checkpoints} is whole. Put one back from a copy, "
            "or remove that folder to train from the beginning."
        )
    if any((checkpoints / link).is_symlink() for link in _LINKS):  # purged: the run had checkpoints
        raise CheckpointError(
            f"the checkpoints of this run are gone from {checkpoints}. Put them back from a copy, "
            "or remove that folder to train from the beginning."
        )
    return None


def verify(folder: Path) -> str | None:
    """None if every file is as the manifest says, else what is wrong.

    Raises CheckpointError for a checkpoint of another version.
    """
    try:
        manifest = json.loads(CheckpointFolder(folder).manifest.read_text())
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is missing or unreadable"
    if manifest.get("format") not in _READABLE:
        raise CheckpointError(
            f"{folder} was written by another version of lrnn-lm (format {manifest.get('format')}; this one "
            f"reads {' and '.join(map(str, _READABLE))}). Go on with that version, or move the folder away."
        )
    wrong = _incomplete(folder, manifest["files"])
    wrong = wrong or next(filter(None, (_misplaced(folder, name) for name in manifest["files"])), None)
    if wrong is not None:
        return wrong
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashing leaves Python's lock to others
        return next(filter(None, pool.map(lambda item: _damage(folder, *item), files)), None)


def _incomplete(folder: Path, files: dict[str, Any]) -> str | None:
    """What training goes on from must be among what is checked."""
    sharded = (folder / _SHARDS).is_dir()
    if sharded and not any(name.startswith(f"{_SHARDS}/") for name in files):
        return f"its manifest lacks {_SHARDS}"
    missing = [name for name in (*_EXPECTED, *(() if sharded else _WHOLE)) if name not in files]
    return f"its manifest lacks {missing[0]}" if missing else None


def _misplaced(folder: Path, name: str) -> str | None:
    """A name that leads out of the folder; nothing there is read."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        return f"its manifest names {name!r}, which is not in it"
    below = (folder / part for part in (path, *path.parents[:-1]))
    return next((f"{part.relative_to(folder)} is a link" for part in below if part.is_symlink()), None)


def _damage(folder: Path, name: str, facts: Any) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    sizes = [each.get("bytes") for each in _alternatives(facts) if isinstance(each, dict)]
    if path.stat().st_size not in sizes or _facts(path) not in _alternatives(facts):
        return f"{name} is not as its checksum says"
    return None


def clear_leftovers(checkpoints: Path) -> None:
    """Remove what a killed save left half-written."""
    places = (".*.tmp", "step-*/.*.tmp", "step-*/trainer/.*.tmp")
    for leftover in [path for place in places for path in checkpoints.glob(place)]:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def room_for_copy(checkpoints: Path) -> Iterator[None]:
    """Around the life of a copy beside the checkpoints; what killed processes left of theirs goes first.

    Whoever has a copy shares a lock. Who gets it alone knows that all there are have been left.
    """
    with (checkpoints / ".plain.lock").open("a") as lock:
        with suppress(OSError):  # others are at it, or a file system that knows no locks: then all stay
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in checkpoints.glob(f"{COPY}*"):
                shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def _point(checkpoints: Path, link: str, name: str) -> None:
    """Let a link name a checkpoint; without it, where the file system has none."""
    aside, path = checkpoints / f".{link}.tmp", checkpoints / link
    try:
        if path.is_dir() and not path.is_symlink():  # a copy that was made of the link
            _remove(path)
        aside.unlink(missing_ok=True)
        aside.symlink_to(name)
        os.replace(aside, path)
        fsync(checkpoints)
    except OSError:
        with suppress(OSError):  # better none than one that leads elsewhere
            path.unlink(missing_ok=True)


def _take_in(checkpoints: Path) -> None:
    """Whatever copied the run followed its links: make the folders that came of them links again.

    A copy whose own checkpoint is gone or damaged takes its place.
    """
    for link in _LINKS:
        copied = checkpoints / link
        if copied.is_symlink() or not copied.is_dir():
            continue
        try:
            named = checkpoints / step_name(read_position(copied).step)
        except (OSError, ValueError, TypeError):
            continue  # damaged: `_point` will remove it
        if named.is_dir() and verify(named) is not None and verify(copied) is None:
            _remove(named)
        if not named.is_dir():
            copied.rename(named)
        _point(checkpoints, link, named.name)


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
