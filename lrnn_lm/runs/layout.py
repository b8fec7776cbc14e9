"""Every name inside a run folder, and which of its checkpoints is the newest.

The links `latest` and `best` are for people: nothing depends on them. A copy of a run may have folders in
their place, and a file system without symbolic links has neither.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..remote import local_copy, url_of

LATEST, BEST = "latest", "best"
_STEP = "step-"


def _inside(*names: str) -> Any:
    """A path inside the folder that the property belongs to."""
    return property(lambda folder: folder.path.joinpath(*names))


@dataclass(frozen=True)
class RunFolder:
    """`runs/NAME/`; every property is a Path, whether or not the file exists."""

    path: Path

    recipe = _inside("recipe.yaml")  # resolved: with every default written out
    parent = _inside("parent.json")  # of a branch: the checkpoint that it began from
    data = _inside("data.json")  # the manifest of the prepared text
    heldout = _inside("heldout.jsonl")  # held-out documents, one JSON object a line; evaluation reads them
    metrics = _inside("metrics.jsonl")  # one JSON object a logged step
    tracking = _inside("tracking.json")  # the id that W&B knows the run by
    heartbeat = _inside("heartbeat.json")  # the last step and its time, for whoever watches the run
    skips = _inside("skips.json")  # ranges of samples that a run of an older version left out
    lock = _inside(".lock")  # held by the process that trains the run
    checkpoints = _inside("checkpoints")  # step-00001000/ and so on
    latest = _inside("checkpoints", LATEST)  # link to the newest checkpoint; see `checkpoint_folder`
    scores = _inside("eval")  # scores of checkpoints, as JSON
    plots = _inside("plots")
    loss_plot = _inside("plots", "loss.png")  # loss against tokens
    trace = _inside("profile", "trace.json")  # with train.profile: a Chrome trace of some steps
    profile_table = _inside("profile", "table.txt")  # their operators and kernels, the longest first
    average = _inside("average")  # with train.average: its last weights, exported
    card = _inside("README.md")  # the model card
    launch = _inside("launch")  # what `lrnn submit` gave to the cluster
    job = _inside("launch", "job")  # id of the SLURM job that the run waits or trains in
    logs = _inside("logs")  # what the cluster's jobs print


@dataclass(frozen=True)
class CheckpointFolder:
    """`runs/NAME/checkpoints/step-00001000/`: a Hugging Face folder plus `trainer/`."""

    path: Path

    config = _inside("config.json")  # the model's configuration
    trainer = _inside("trainer")  # what only training needs
    manifest = _inside("trainer", "manifest.json")  # size and sha256 of every other file
    state = _inside("trainer", "state.json")  # where the run stood: `checkpoint.Position`
    optimizer = _inside("trainer", "optimizer.safetensors")  # of a run that is not sharded
    average = _inside("trainer", "average.safetensors")  # the same, with train.average
    shards = _inside("trainer", "shards")  # weights and optimizer of a sharded run, a file a rank

    @property
    def run(self) -> RunFolder | None:
        """The run that holds this checkpoint; None for a checkpoint that was copied out."""
        return RunFolder(self.path.parents[1]) if self.path.parent.name == "checkpoints" else None


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"{_STEP}{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for another name."""
    digits = folder.name.removeprefix(_STEP)
    return int(digits) if folder.name.startswith(_STEP) and digits.isdecimal() else None


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    found = [(step, p) for p in checkpoints.glob(f"{_STEP}*") if (step := step_of(p)) is not None]
    return [p for _, p in sorted(found) if p.is_dir()]


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The one that `latest` links to, else the newest; None if there is none."""
    link = checkpoints / LATEST
    if link.is_symlink() and link.is_dir():
        return checkpoints / os.readlink(link)
    found = list_checkpoints(checkpoints)
    return found[-1] if found else link if link.is_dir() else None


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint that a person names, of a URL a copy here. `checkpoints/latest` needs no such link."""
    if (url := url_of(path)) is not None:
        return local_copy(url)
    if path.name == LATEST and not path.is_dir():
        return latest_checkpoint(path.parent) or path
    return path
