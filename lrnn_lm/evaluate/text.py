"""Which text a checkpoint is scored on, and the names of results.

Those of another text or checkpoint are never replaced.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import user_path
from ..runs.layout import RunFolder
from ..runs.load import CheckpointInfo
from .tasks.heldout import FOLDER_NAMES, heldout_path

# What eval/tasks/offline reads of its folder.
OFFLINE_FILES = ("lambada_openai.jsonl", "blimp/*.jsonl", "wikitext2_test.txt")


def documents_of(info: CheckpointInfo, data: Path | None) -> str | None:
    """The held-out file that is passed, or the run's; or the folder of the offline tasks. None: no data.

    The tasks that need data raise an error themselves.
    """
    if data is not None and user_path(data).is_dir():
        folder = user_path(data)
        if not any((folder / name).is_file() for name in FOLDER_NAMES):
            return str(folder)
    if data is None and (info.run is None or not RunFolder(info.run).heldout.is_file()):
        return None
    return str(heldout_path(data, info.path))


def other_text(info: CheckpointInfo, data: str | None) -> str | None:
    """NAME DIGEST of the text at `data`, as `documents_of` gives it; None for the run's own.

    By content: the same text elsewhere has the same digest, and one that was changed has another.
    """
    if data is None:
        return None
    path = Path(data)
    digest = _digest(path)
    own = None if info.run is None else RunFolder(info.run).heldout
    if own is not None and own.is_file() and path.is_file() and digest == _digest(own):
        return None
    return f"{path.resolve().stem} {digest}"


def stem_of(info: CheckpointInfo, output: Path | None, what: str) -> str:
    """The name, without its ending, of a file with results of a checkpoint in its folder.

    In a folder other than the run's own it begins with the run's: results of other runs may be there.
    """
    stem = f"{info.name}-{what}"
    if output is None:
        return stem
    where = f"{info.run.name}-" if info.run is not None else ""
    return free_stem(user_path(output), f"{where}{stem}", [info])


def free_stem(folder: Path, stem: str, infos: Sequence[CheckpointInfo]) -> str:
    """`stem`, or where folder/stem.json is of other checkpoints, that with a digest of where these lie."""
    paths = [str(info.path) for info in infos]
    file = folder / f"{stem}.json"
    if not file.is_file() or _paths_of(file) == paths:
        return stem
    return f"{stem}-{hashlib.sha256(' '.join(paths).encode()).hexdigest()[:8]}"


def _paths_of(file: Path) -> list[Any]:
    """The checkpoints that results are of."""
    with suppress(ValueError, AttributeError):  # another program's JSON
        stored = json.loads(file.read_text(encoding="utf-8"))
        results = stored if isinstance(stored, list) else [stored]
        return [each.get("checkpoint", {}).get("path") for each in results]
    return []


def in_name(*words: str | None) -> str:
    """Words at the end of a file's name, `-` before each."""
    return "".join(f"-{word.replace(' ', '-')}" for word in words if word)


def _digest(path: Path) -> str:
    """Of a file, or of what the offline tasks read in a folder."""
    files = [path] if path.is_file() else [f for name in OFFLINE_FILES for f in sorted(path.glob(name))]
    found = hashlib.sha256()
    for file in files:
        if not path.is_file():
            found.update(f"{file.relative_to(path)}\n".encode())
        with file.open("rb") as content:
            found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()[:8]
