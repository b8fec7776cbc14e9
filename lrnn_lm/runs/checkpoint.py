"""Checkpoints: a Hugging Face folder plus `trainer/`; written aside, fsynced, renamed, checked on load.

    checkpoints/step-00001000/   config.json, generation_config.json, the tokenizer's files
        *_lrnn.py                the model's code; at the end of a run only
        model.safetensors        the weights; of a sharded run, at its end only
        trainer/                 state.json, rng-00000.json/.safetensors (a rank each; random states, and
                                 the states that its next rows begin with, see train/carry.py),
                                 optimizer.safetensors, or shards/*.safetensors (a rank each: its part of
                                 weights and optimizer), average.safetensors (or in the shards),
                                 manifest.json (size and sha256 of every other file)
    checkpoints/latest, best     links, where there are any: the newest, that of lowest validation loss

Nothing is pickled. A checkpoint that does not match its manifest is damaged: loading warns and takes the one
before, and the next save removes it. If all are damaged the run ends: to begin anew would overwrite what a
person may still repair. Folders appear and disappear by one rename, so nobody sees half a checkpoint.
`train/tensors.py` has what the files hold, `train/saver.py` when they are written.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from ..files import fsync, readable
from .layout import BEST, LATEST, CheckpointFolder, latest_checkpoint, list_checkpoints, step_name, step_of

FORMAT = 2
_READABLE = (1, 2)
_HASHING_THREADS = 8
_EXPECTED = ("config.json", "trainer/state.json", "trainer/rng-00000.json", "trainer/rng-00000.safetensors")
_WHOLE, _SHARDS = ("model.safetensors", "trainer/optimizer.safetensors"), "trainer/shards"
_LINKS = (LATEST, BEST)
_REPLACED = ".replaced.tmp"  # suffix of a checkpoint while another of its step takes its place


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names it and the last good one."""


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # rows read, over all ranks and epochs
    skipped: int = 0  # steps without an update: loss or gradient was not finite, or an outlier
    outliers: int = 0  # those of them that `train.guard` skipped
    bad_in_a_row: int = 0  # such steps since the last good one
    validated: int = -1  # step of the last validation
    validation_loss: float | None = None  # its loss, nats a token
    scored: int = -1  # step of the last scores of `eval.during`
    # With `train.guard`: [loss, gradient norm] of the last good steps. Replaced, never changed in place.
    recent: list[list[float]] = field(default_factory=list)
    data: str = ""  # content hash of the prepared text that `samples` counts


def aside_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of this step is written before it appears."""
    return checkpoints / f".{step_name(step)}.tmp"


def publish(
    checkpoints: Path,
    step: int,
    keep_last: int,
    keep_best: bool,
    before: str | None = None,
    in_use: str | None = None,
) -> Path:
    """Rename a complete aside folder to its final name, then remove checkpoints that are not kept.

    `before` names the checkpoint that the run resumed from or wrote last; None for a run's first. `in_use`
    names one that stays until the next time, as it is being copied.
    Raises OSError if the disk is full or read-only; older checkpoints stay.
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
    replaced = checkpoints / f".{final.name}{_REPLACED}"
    if final.exists():  # damaged, of steps that the run has rolled back, or not yet the run's last
        final.rename(replaced)
    aside.rename(final)
    fsync(checkpoints)
    shutil.rmtree(replaced, ignore_errors=True)
    _point(checkpoints, LATEST, final.name)
    _prune(checkpoints, before, final, keep_last, keep_best, in_use)
    return final


def record_facts(aside: Path, files: Sequence[Path], rank: int) -> None:
    """Flush files to disk and store their sizes and checksums for the manifest that `publish` writes."""
    readable(aside, files)
    for path in files:
        fsync(path)
    facts = {str(path.relative_to(aside)): _facts(path) for path in files}
    (CheckpointFolder(aside).trainer / f"facts-{rank:05d}.json").write_text(json.dumps(facts))


def read_position(folder: Path) -> Position:
    """The position that a checkpoint resumes from. CheckpointError if a newer version wrote it."""
    state = json.loads(CheckpointFolder(folder).state.read_text())
    state.pop("skips", None)  # of older versions; a run that has any is refused by its skips.json
    if unknown := sorted(state.keys() - {known.name for known in fields(Position)}):
        raise CheckpointError(
            f"{folder} has fields that this version of lrnn-lm does not know ({', '.join(unknown)}); "
            "use the version that wrote it"
        )
    return Position(**state)


def _prune(
    checkpoints: Path, before: str | None, final: Path, keep_last: int, keep_best: bool, in_use: str | None
) -> None:
    """Keep the last `keep_last`, the best, and the newest one written after a good step.

    Weights saved after that may be the cause of the bad steps. `final` is the newest checkpoint, `before` the
    good one that the run held until now.
    """
    saved = list_checkpoints(checkpoints)
    names = [folder.name for folder in saved]
    good = names.index(before) + 1 if before in names else len(names)
    damaged = [folder for folder in saved[good:] if folder != final]  # the run did not resume from these
    whole = [folder for folder in saved if folder not in damaged]
    best = _best(whole) if keep_best else None
    if best is not None:
        _point(checkpoints, BEST, best.name)
    sound = [folder for folder in whole if (at := _position(folder)) is not None and at.bad_in_a_row == 0]
    for folder in saved:
        if folder not in (*whole[-keep_last:], *sound[-1:], best) and folder.name != in_use:
            _remove(folder)
    if not (checkpoints / BEST).exists():
        (checkpoints / BEST).unlink(missing_ok=True)


def _position(folder: Path) -> Position | None:
    try:
        return read_position(folder)
    except (OSError, ValueError, TypeError):  # damaged
        return None


def _best(folders: Sequence[Path]) -> Path | None:
    """The checkpoint of lowest validation loss, among those validated at their own step."""
    known = [(at, folder) for folder in folders if (at := _position(folder)) is not None]
    found = [
        (at.validation_loss, -at.step, folder)
        for at, folder in known
        if at.validated == at.step and at.validation_loss is not None and not math.isnan(at.validation_loss)
    ]
    return min(found)[2] if found else None


def latest_name(checkpoints: Path) -> str:
    """Name of the checkpoint last written or resumed from, for messages; `none` if there is none."""
    found = latest_checkpoint(checkpoints)
    return "none" if found is None else found.name


def resumes_from(checkpoints: Path) -> str:
    """Where a new start goes on, for messages."""
    found = latest_checkpoint(checkpoints)
    return "the beginning" if found is None else str(checkpoints / found.name)


def _remove(folder: Path) -> None:
    """Hide a folder by one rename, then delete it. If this process dies, the next start deletes it."""
    aside = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def newest_valid(checkpoints: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint; None if none was ever written. `warn` gets a line a damaged one.

    Removes what a killed save left, so only one process may call it. Raises CheckpointError if all are
    damaged or gone, or the newest has another step's name, or a format that this version does not read.
    """
    clear_leftovers(checkpoints)
    _restore_links(checkpoints)
    folders = list_checkpoints(checkpoints)
    for folder in reversed(folders):
        damage = verify(folder)
        if damage is None and (step := read_position(folder).step) != step_of(folder):
            raise CheckpointError(
                f"{folder} is the checkpoint of step {step}, renamed: later ones would be taken for older; "
                f"name it {step_name(step)}, or move it away"
            )
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
    if any((checkpoints / link).is_symlink() for link in _LINKS):  # a dangling link: there were checkpoints
        raise CheckpointError(
            f"the checkpoints of this run are gone from {checkpoints}. Put them back from a copy, "
            "or remove that folder to train from the beginning."
        )
    return None


def verify(folder: Path) -> str | None:
    """None if every file matches the manifest, else what is wrong.

    Raises CheckpointError for a format that this version does not read.
    """
    try:
        manifest = json.loads(CheckpointFolder(folder).manifest.read_text())
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its manifest is missing or unreadable"
    if manifest.get("format") not in _READABLE:
        raise CheckpointError(
            f"{folder} was written by another version of lrnn-lm (format {manifest.get('format')}; this one "
            f"reads {' and '.join(map(str, _READABLE))}). Go on with that version, or move the folder away."
        )
    wrong = _incomplete(folder, manifest["files"])
    try:
        wrong = wrong or next(filter(None, (_misplaced(folder, name) for name in manifest["files"])), None)
        if wrong is not None:
            return wrong
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashlib releases the GIL
            return next(filter(None, pool.map(lambda item: _damage(folder, *item), files)), None)
    except OSError as error:  # of the disk, or a name that no file can have
        return f"a file cannot be read: {error.strerror}"
    except UnicodeEncodeError:
        return "its manifest names a file by what is not Unicode text"


def _incomplete(folder: Path, files: dict[str, Any]) -> str | None:
    """What training resumes from and the manifest does not name; None if it names everything."""
    sharded = (folder / _SHARDS).is_dir()
    if sharded and not any(name.startswith(f"{_SHARDS}/") for name in files):
        return f"its manifest lacks {_SHARDS}"
    missing = [name for name in (*_EXPECTED, *(() if sharded else _WHOLE)) if name not in files]
    return f"its manifest lacks {missing[0]}" if missing else None


def _misplaced(folder: Path, name: str) -> str | None:
    """What is wrong with a name that leads out of the folder, else None. Nothing outside is ever read."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        return f"its manifest names {name!r}, which is not in it"
    below = (folder / part for part in (path, *path.parents[:-1]))
    return next((f"{part.relative_to(folder)} is a link" for part in below if part.is_symlink()), None)


def _damage(folder: Path, name: str, facts: Any) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    size = facts.get("bytes") if isinstance(facts, dict) else None
    if path.stat().st_size != size or _facts(path) != facts:
        return f"{name} is not as its checksum says"
    return None


def clear_leftovers(checkpoints: Path) -> None:
    """Remove half-written files and folders of a save that was killed, and put back what it had replaced."""
    for replaced in checkpoints.glob(f".*{_REPLACED}"):
        final = replaced.with_name(replaced.name[1:].removesuffix(_REPLACED))
        if not final.exists():
            replaced.rename(final)
    places = (".*.tmp", "step-*/.*.tmp", "step-*/trainer/.*.tmp")
    for leftover in [path for place in places for path in checkpoints.glob(place)]:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _point(checkpoints: Path, link: str, name: str) -> None:
    """Point a link at a checkpoint; on a file system without symbolic links, leave it out."""
    aside, path = checkpoints / f".{link}.tmp", checkpoints / link
    try:
        if path.is_dir() and not path.is_symlink():  # a copy of the run followed the link
            _remove(path)
        aside.unlink(missing_ok=True)
        aside.symlink_to(name)
        os.replace(aside, path)
        fsync(checkpoints)
    except OSError:
        with suppress(OSError):  # no link is better than an outdated one
            path.unlink(missing_ok=True)


def _restore_links(checkpoints: Path) -> None:
    """Turn `latest` and `best` back into links where copying the run made folders of them.

    A folder whose own checkpoint is gone or damaged takes that checkpoint's place.
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
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
