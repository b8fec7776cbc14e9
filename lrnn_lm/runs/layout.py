"""Every name inside a run folder, and which of its checkpoints is the newest.

The links `latest` and `best` are for people: nothing depends on them. A copy of a run may have folders in
their place, a file system without symbolic links has neither.
"""

import os
from dataclasses import dataclass
from pathlib import Path

LATEST, BEST = "latest", "best"
_STEP = "step-"


@dataclass(frozen=True)
class RunFolder:
    """`runs/NAME/`."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def data(self) -> Path:
        """The manifest of the prepared text."""
        return self.path / "data.json"

    @property
    def heldout(self) -> Path:
        """Held-out documents, one JSON object a line; evaluation reads them."""
        return self.path / "heldout.jsonl"

    @property
    def metrics(self) -> Path:
        """A line of numbers a step."""
        return self.path / "metrics.jsonl"

    @property
    def heartbeat(self) -> Path:
        """The last step and when it was, for whoever watches the run."""
        return self.path / "heartbeat.json"

    @property
    def skips(self) -> Path:
        """Ranges of samples that a run of an older version left out."""
        return self.path / "skips.json"

    @property
    def lock(self) -> Path:
        """Held by the process that trains the run."""
        return self.path / ".lock"

    @property
    def checkpoints(self) -> Path:
        """`step-00001000/` and so on."""
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path:
        """The link to the newest checkpoint; see `checkpoint_folder`."""
        return self.checkpoints / LATEST

    @property
    def scores(self) -> Path:
        """Scores of checkpoints, as JSON."""
        return self.path / "eval"

    @property
    def plots(self) -> Path:
        """Pictures."""
        return self.path / "plots"

    @property
    def loss_plot(self) -> Path:
        """The loss against tokens."""
        return self.plots / "loss.png"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    @property
    def launch(self) -> Path:
        """What `lrnn submit` gave to the cluster."""
        return self.path / "launch"

    @property
    def job(self) -> Path:
        """The SLURM job that the run waits or trains in."""
        return self.launch / "job"

    @property
    def logs(self) -> Path:
        """What the cluster's jobs print."""
        return self.path / "logs"


@dataclass(frozen=True)
class CheckpointFolder:
    """`runs/NAME/checkpoints/step-00001000/`: a Hugging Face folder plus `trainer/`."""

    path: Path

    @property
    def run(self) -> RunFolder | None:
        """The run that the checkpoint lies in; None for one that was copied out."""
        return RunFolder(self.path.parents[1]) if self.path.parent.name == "checkpoints" else None

    @property
    def config(self) -> Path:
        """The model's configuration."""
        return self.path / "config.json"

    @property
    def trainer(self) -> Path:
        """What only training needs."""
        return self.path / "trainer"

    @property
    def manifest(self) -> Path:
        """Size and sha256 of every other file."""
        return self.trainer / "manifest.json"

    @property
    def state(self) -> Path:
        """Where the run stood."""
        return self.trainer / "state.json"

    @property
    def optimizer(self) -> Path:
        """The optimizer's tensors, of a run that is not sharded."""
        return self.trainer / "optimizer.safetensors"

    @property
    def shards(self) -> Path:
        """Weights and optimizer of a sharded run, a file a rank."""
        return self.trainer / "shards"


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
    """A checkpoint by the path that a person gives: `../checkpoints/latest` holds without the link, too."""
    if path.name == LATEST and not path.is_dir():
        return latest_checkpoint(path.parent) or path
    return path
