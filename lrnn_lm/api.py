"""What `from lrnn_lm import ..` gives, imported when it is first asked for; and `train`, as a function."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .output import say
from .requirements import check_extra

if TYPE_CHECKING:
    from collections.abc import Callable

    from .recipe import Recipe
    from .train.loop import Trainer
    from .train.stop import StopSignal
    from .train.tasks import Scorer

HOMES = {  # name: module; `train` and `evaluate` are packages that can be called
    "BlockDiagonalLRU": "mixers",
    "HigherOrderLRU": "mixers",
    "LRNNConfig": "model",
    "LRNNForCausalLM": "model",
    "LRNNModel": "model",
    "block_diagonal_scan": "kernels",
    "evaluate": "",
    "generate": "evaluate",
    "higher_order_scan": "kernels",
    "load_recipe": "recipe",
    "train": "",
}
FORMATS = ("transformers", "onnx", "executorch", "torch-export")  # of `lrnn export`


def train(recipe: "str | Path | Recipe", overrides: list[str] | None = None) -> Path:
    """Train a recipe, or resume its run; then score it on its `eval.tasks`.

    What `lrnn train` does. Under `accelerate launch`, all processes call it. One run at a time: meanwhile
    torch's default dtype is float32 in all threads of the process.

    Args:
        recipe: a recipe file, or what `load_recipe` made of one.
        overrides: `section.key=value` each, on top of a recipe file.
    Returns:
        The run's last checkpoint: a Hugging Face folder with the model's code. Its run is two folders up.
    Raises:
        ImportError: the extra `train` is not installed.
        ValueError: a mistake in the recipe, or what it asks for cannot be done here, such as training within
            torch.autocast; one or two lines.
        KeyboardInterrupt: a signal (Ctrl-C, SIGTERM) asked it to stop. The run is saved; the same call goes
            on with it.

    Example:
        >>> from lrnn_lm import train
        >>> checkpoint = train("recipes/demo.yaml", ["train.tokens=8K", "eval.tasks=[]"])
        >>> sorted(file.name for file in checkpoint.glob("*.py"))
        ['configuration_lrnn.py', 'kernels_lrnn.py', 'modeling_lrnn.py']
    """
    check_extra("train", "matplotlib")  # which is imported at the end only
    from .recipe import Recipe, load_recipe
    from .train.runtime import own_settings
    from .train.stop import Stopped, StopSignal

    if isinstance(recipe, Recipe) and overrides:
        raise ValueError("overrides go with a recipe file; give them to load_recipe, or pass the file's path")
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    try:
        with own_settings(), StopSignal() as stop:
            stop.hold()  # within an import it would come out as that import's error
            trainer = trainer_of(loaded, stop)
            return score_run(trainer, trainer.run(stop), stop)
    except Stopped as stopped:
        raise KeyboardInterrupt(str(stopped)) from None


def trainer_of(recipe: "Recipe", stop: "StopSignal", from_checkpoint: Path | None = None) -> "Trainer":
    """A trainer that can score the recipe's tasks, with the caller's signal handlers."""
    from .train.build import build_trainer

    return build_trainer(
        recipe, stop=stop, check=task_check(recipe), from_checkpoint=from_checkpoint,
        scorer=task_scorer(recipe),
    )  # fmt: skip


def task_check(recipe: "Recipe") -> "Callable[[Path], None] | None":
    """Check that a run can be scored on its `eval.tasks`, and on those of `eval.during`; returns the check of
    its folder for build_trainer.

    Raises ValueError: hours of training later would be too late.
    """
    from .runs.layout import RunFolder

    during = recipe.eval.during.tasks if recipe.eval.during else []
    names = [*recipe.eval.tasks, *during]
    if not names:
        return None
    from .evaluate import check_tasks
    from .evaluate.live import check_data
    from .evaluate.tasks.synthetic import check_answerable

    source = recipe.data.source
    members = check_tasks(names)  # of a tag; what was asked for comes first, to be named in messages
    check_answerable([*names, *members], source.task, source.options)

    def check(folder: Path) -> None:
        check_tasks(names, RunFolder(folder).heldout)
        if during:
            check_data(during, folder)

    return check


def task_scorer(recipe: "Recipe") -> "Scorer | None":
    """Scores the tasks of `eval.during` on the model in training, for build_trainer."""
    during = recipe.eval.during
    if during is None:
        return None
    from .evaluate.live import LiveScorer

    folder = Path(recipe.train.runs_dir) / recipe.name
    return LiveScorer(folder, during.tasks, during.limit, min(8, recipe.train.micro_batch))


def score_run(trainer: "Trainer", checkpoint: Path, stop: "StopSignal") -> Path:
    """On the main rank: score a trained run on its `eval.tasks`, write its card. Returns the checkpoint."""
    from .recipe import load_recipe
    from .runs.branch import changes
    from .runs.layout import RunFolder

    recipe = trainer.recipe
    if not trainer.accelerator.is_main_process:
        return checkpoint
    before = trainer.first_step >= recipe.total_steps
    what = "was trained already" if before else "is trained"
    steps = trainer.position.step
    said = f"{recipe.name} {what}: {steps} step{'' if steps == 1 else 's'}, checkpoint {checkpoint}"
    if before and (changed := changes(load_recipe(RunFolder(trainer.folder).recipe), recipe)):
        told = "; ".join([*changed[:8], *([f"and {len(changed) - 8} more"] if changed[8:] else [])])
        said += f"\nwith other settings ({told}): give this run another name=.. to train with these"
    say(said, sys.stdout)
    from .evaluate import evaluate
    from .evaluate.reporting.card import write_run_card
    from .model import LRNNForCausalLM
    from .train.parallel import is_sharded
    from .train.tensors import has_average

    averaged = RunFolder(trainer.folder).average
    try:
        # Of a smaller budget, and what an export left that was killed.
        for old in (averaged, *averaged.parent.glob(f".{averaged.name}.*.tmp")):
            shutil.rmtree(old, ignore_errors=True)
        # An auto-encoder cannot be exported.
        if has_average(checkpoint) and isinstance(trainer.bare_model, LRNNForCausalLM):
            export_checkpoint(checkpoint, averaged, average=True)
        if recipe.eval.tasks:
            stop.leave_if_asked()
            live = (trainer.bare_model, trainer.tokenizer)  # what is sharded is read from the checkpoint
            model, tokenizer = (None, None) if is_sharded(trainer.bare_model) else live
            evaluate(checkpoint, recipe.eval.tasks, limit=recipe.eval.limit, model=model, tokenizer=tokenizer)
    finally:  # the run is trained, whatever became of its scores
        write_run_card(trainer.folder)
        trainer.saver.copy_rest()
        if trainer.lock is not None:
            trainer.lock.close()
    return checkpoint


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    dtype: str | None = None,
    license: str | None = None,
    average: bool = False,
    format: str = "transformers",
) -> None:
    """What `lrnn export` does: a new folder that torch and transformers alone load, with a card; or graphs.

    format: transformers, or one of graphs (`model.export.graphs`; in fp32, without a card). license: named in
    the card; None for the recipe's. average: the moving average of the weights. Raises ValueError as
    `runs.export.export` and `weights_to_export`.
    """
    from transformers.utils.logging import disable_progress_bar

    from .evaluate.reporting.card import write_export_card
    from .runs.export import export, export_graphs
    from .train.tensors import weights_to_export

    if format not in FORMATS:
        raise ValueError(f"format {format!r}: use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    graphs = format != "transformers"
    if license is not None and not license.strip():
        raise ValueError("license: give a name, as in apache-2.0, or leave it out for the recipe's")
    if graphs and (dtype or license):
        raise ValueError(f"--format {format} writes fp32 and no card: leave --dtype and --license out")
    disable_progress_bar()
    weights = weights_to_export(checkpoint, average)
    if graphs:
        export_graphs(checkpoint, folder, format, weights)
        return

    def write_card(aside: Path) -> None:
        write_export_card(checkpoint, aside, license, average)

    export(checkpoint, folder, dtype, write_card, weights)
