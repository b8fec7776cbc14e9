"""Back to a good checkpoint after too many steps in a row that were not finite, and past the rows they read.

The rows left out stand in the position, hence in every checkpoint from then on, and at once in skips.json of
the run folder: a run that is killed in between replays the good steps, and steps over the same rows.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..files import replace_file
from ..recipe import Recipe
from ..runs import checkpoint
from ..runs.checkpoint import CheckpointError, Position
from ..runs.layout import RunFolder


@dataclass(frozen=True)
class Rewound:
    """Where the run goes on after bad steps, from which checkpoint, without which samples [first, end)."""

    position: Position
    folder: Path
    skip: list[int]

    def line(self, bad_step: int, tokens_per_step: int) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        step = self.position.step
        return {"step": step, "tokens": step * tokens_per_step, "went_back_from": bad_step,
                "left_out_samples": self.skip}  # fmt: skip

    def message(self, bad: Position) -> str:
        return (
            f"not finite for {bad.bad_in_a_row} steps up to step {bad.step}: back to "
            f"{self.folder.name}, leaving out samples {self.skip[0]} to {self.skip[1] - 1}"
        )


def rewind(
    bad: Position,
    run: Path,
    recipe: Recipe,
    rewinds: int,
    accelerator: Accelerator,
    load: Callable[[Path], Position],
    resume_from: Callable[[], str],
) -> Rewound:
    """Load the last good checkpoint of a run, with the rows of the bad steps left out from then on.

    Every rank calls it. rewinds: how often the run did so before; load: puts a checkpoint into the model and
    the optimizer; resume_from: the checkpoint that a new start would go on from, for the message.

    Raises ValueError if there is no such checkpoint, or the run did so `max_rewinds` times.
    """
    checkpoints = RunFolder(run).checkpoints
    found: list[Path | None] = [None]
    if accelerator.is_main_process:
        found[0] = _last_good(checkpoints)
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[0] is None or rewinds >= recipe.train.max_rewinds:
        if not accelerator.is_main_process:
            raise ValueError("")  # the main rank tells
        often = f" after going back {rewinds} times" if rewinds else ""
        raise ValueError(
            f"the loss or its gradient was not finite for {bad.bad_in_a_row} steps in a row, up to "
            f"step {bad.step}{often}; lower optim.lr, then run again to go on from {resume_from()}"
        )
    skip = [before(bad.samples, bad.bad_in_a_row, recipe.rows_per_step, bad.skips), bad.samples]
    good = load(found[0])
    good.skips = merged(bad.skips, [skip])
    good.skipped = bad.skipped
    if accelerator.is_main_process:
        write_skips(run, good.skips)
        checkpoint.drop_after(checkpoints, good.step)
    return Rewound(good, found[0], skip)


def _last_good(checkpoints: Path) -> Path | None:
    """The newest whole one that was not written amid bad steps."""
    for folder in reversed(checkpoint.list_checkpoints(checkpoints)):
        try:
            if checkpoint.verify(folder) is None and checkpoint.read_position(folder).bad_in_a_row == 0:
                return folder
        except CheckpointError:
            continue
    return None


def before(samples: int, steps: int, rows: int, skips: list[list[int]]) -> int:
    """The first sample of the last `steps` steps up to `samples`, which jumped over what is left out."""
    for _ in range(steps):
        for first, end in sorted(skips, reverse=True):
            if first < samples <= end:
                samples = first
        samples -= rows
    return samples


def merged(*lists: list[list[int]]) -> list[list[int]]:
    """Ranges of several lists, each once, in order."""
    return [list(skip) for skip in sorted({tuple(skip) for skips in lists for skip in skips})]


def write_skips(folder: Path, skips: list[list[int]]) -> None:
    replace_file(RunFolder(folder).skips, json.dumps(skips) + "\n", durable=True)


def read_skips(folder: Path) -> list[list[int]]:
    """Samples that the run leaves out, as told by its folder; checkpoints may be older.

    Raises ValueError, naming the file, if it is not a list of ranges.
    """
    path = RunFolder(folder).skips
    if not path.exists():
        return []
    try:
        skips = json.loads(path.read_bytes())
    except ValueError:
        skips = None
    if not isinstance(skips, list) or not all(map(_is_range, skips)):
        raise ValueError(
            f"{path}: not a list of ranges of samples to leave out, as in [[48, 64]]; mend it, or remove "
            "it to leave out only what the checkpoints know of"
        )
    return skips


def _is_range(skip: Any) -> bool:
    return isinstance(skip, list) and list(map(type, skip)) == [int, int] and 0 <= skip[0] < skip[1]
