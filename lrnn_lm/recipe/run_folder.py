"""Where the checkpoints of a run are. The links `latest` and `best` are for people: nothing depends on them.

A copy of a run may have folders in their place, a file system without symbolic links has neither.
"""

import os
from pathlib import Path

LATEST = "latest"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    found = [p for p in checkpoints.glob("step-*") if p.name.removeprefix("step-").isdecimal() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The one that `latest` links to, else the newest; None if there is none."""
    link = checkpoints / LATEST
    if link.is_symlink() and link.is_dir():
        return checkpoints / os.readlink(link)
    found = list_checkpoints(checkpoints)
    return found[-1] if found else link if link.is_dir() else None


def checkpoint_folder(path: Path) -> Path:
    """A checkpoint by the path that a person gives: `../checkpoints/latest` holds without the link, too."""
    if path.name == LATEST and not path.is_dir():
        return latest_checkpoint(path.parent) or path
    return path
