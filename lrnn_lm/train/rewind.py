"""Back to a good checkpoint after too many steps in a row that were not finite, and past the rows they read.

The rows left out stand in the position, hence in every checkpoint from then on, and at once in skips.json of
the run folder: a run that is killed in between replays the good steps, and steps over the same rows.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from ..files import replace_file
from ..runs import checkpoint
from ..runs.checkpoint import CheckpointError
from ..runs.layout import RunFolder
from .tensors import load

if TYPE_CHECKING:
    from .loop import Trainer


def rewind(trainer: "Trainer") -> None:
    """Put the trainer back to its last good checkpoint, with the rows of the bad steps left out from then on.

    Every rank calls it. Raises ValueError if there is no such checkpoint, or it went back often enough.
    """
    recipe, bad = trainer.recipe, trainer.position
    trainer.saver.finish()
    found: list[Path | None] = [None]
    if trainer.accelerator.is_main_process:
        found[0] = _last_good(trainer.checkpoints)
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[0] is None or trainer.rewinds >= recipe.train.max_rewinds:
        if not trainer.accelerator.is_main_process:
            raise ValueError("")  # the main rank tells
        often = f" after going back {trainer.rewinds} times" if trainer.rewinds else ""
        raise ValueError(
            f"the loss or its gradient was not finite for {bad.bad_in_a_row} steps in a row, up to "
            f"step {bad.step}{often}; lower optim.lr, then run again to go on from {trainer.last_name()}"
        )
    trainer.rewinds += 1
    skip = [before(bad.samples, bad.bad_in_a_row, recipe.rows_per_step, bad.skips), bad.samples]
    good = load(
        found[0], trainer.bare_model, trainer.optimizer, trainer.accelerator.process_index, trainer.group
    )
    good.skips = merged(bad.skips, [skip])
    good.skipped = bad.skipped
    trainer.position = good
    if trainer.accelerator.is_main_process:
        write_skips(trainer.folder, good.skips)
        checkpoint.drop_after(trainer.checkpoints, good.step)
    trainer.metrics.cut_after(good)
    trainer.metrics.write(
        {"step": good.step, "tokens": good.step * recipe.train.tokens_per_step, "went_back_from": bad.step,
         "left_out_samples": skip}
    )  # fmt: skip
    trainer.saved_step, trainer.saver.good = good.step, found[0].name
    trainer.rows.restart(good)
    if trainer.accelerator.is_main_process:
        trainer.console.print(
            f"[yellow]not finite for {bad.bad_in_a_row} steps up to step {bad.step}: back to "
            f"{found[0].name}, leaving out samples {skip[0]} to {skip[1] - 1}",
            soft_wrap=True,
        )


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
