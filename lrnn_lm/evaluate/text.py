"""Which text a checkpoint is scored on, and what results of another text than its run's are called."""

import hashlib
from pathlib import Path

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
