"""Certified state tracking, from training to proof: the rows of docs/certificate.md.

`python -m studies.certificate --task s5 --output docs/results/certificate.jsonl`, ten minutes on a quiet CPU.
A model is trained, hardened, and what reads its state is trained on: a row after each, with the verdict of
`lrnn eval --certify` and accuracies in the second half of held-out rows. A task whose rows are in the file is
not run again; runs go on where they stopped.
"""

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lrnn_lm.data import SyntheticTask
from lrnn_lm.evaluate.probe.certify import certify
from lrnn_lm.files import words_of
from lrnn_lm.recipe import load_recipe
from lrnn_lm.runs.load import load_checkpoint
from lrnn_lm.train.build import build_trainer

from .jsonl import append_row, rows_to_continue
from .rows import task_rows

RECIPES = Path(__file__).parents[1] / "recipes/synthetic"
LENGTHS = {512: 256, 16_384: 16}  # rows of each length


def train(recipe: str, name: str, runs: Path, overrides: list[str]) -> Path:
    """The run's last checkpoint."""
    given = [f"name={name}", f"train.runs_dir={runs}", "train.device=cpu", *overrides]
    trainer = build_trainer(load_recipe(RECIPES / f"{recipe}.yaml", given), Console())
    trainer.run()
    return trainer.folder / "checkpoints/latest"


@torch.no_grad()
def accuracies(checkpoint: Path, task: str) -> dict[str, float]:
    """Share of right answers in the second half of held-out rows, by length."""
    model, _ = load_checkpoint(checkpoint, "cpu")
    found = {}
    for length, count in LENGTHS.items():
        made = SyntheticTask(task, length, {"start": 1})
        inputs, labels = task_rows(made, 0, "test", 0, count, torch.device("cpu"))
        said = torch.cat([model.float()(part).logits.argmax(-1) for part in inputs.split(8)])
        found[str(length)] = float((said == labels)[:, length // 2 :].float().mean())
    return found


def row(checkpoint: Path, task: str, after: str, hardened: Path | None = None) -> dict[str, Any]:
    """A verdict: `length` None for every length; of `blocks`, `follow` are functions of the task's state."""
    facts = certify(checkpoint, task, hardened=hardened, device="cpu")
    follow = sum(block["follows"] and block["values"] > 1 for block in facts["blocks"])
    return {
        "task": task, "after": after, "step": facts["checkpoint"]["step"], "blocks": len(facts["blocks"]),
        "follow": follow, **{key: facts[key] for key in ("wrong", "length", "margin")},
        "accuracy": accuracies(checkpoint, task),
    }  # fmt: skip


def rows_of(task: str, runs: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """A row after each of the three steps. overrides: of the first training."""
    given = [f"data.source.task={task}", *overrides]
    trained = train("s5-extrapolates", f"{task}-extrapolates", runs, given)
    hardened = runs / f"{task}-hardened"
    if hardened.exists():
        raise ValueError(f"{hardened}: remove this folder of an earlier call")
    made = [row(trained, task, "trained", hardened), row(hardened, task, "hardened")]
    blocks = f"model.mixer.num_blocks={made[1]['blocks']}"
    given = [f"data.source.task={task}", f"model.init_from={hardened}", blocks]
    read = train("s5-certified", f"{task}-certified", runs, given)
    return [*made, row(read, task, "read out")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", required=True)
    parser.add_argument("overrides", nargs="*", help="of recipes/synthetic/s5-extrapolates.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs/certificate"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    about = {"torch": torch.__version__, "platform": platform.machine(), "overrides": options.overrides}
    try:
        if any(row["task"] == options.task for row in rows_to_continue(options.output, "task", "after")):
            return
        made = rows_of(options.task, options.runs, options.overrides)
    except (ValueError, OSError) as error:
        parser.error(words_of(error))
    for row in made:
        append_row(options.output, {**row, **about})


if __name__ == "__main__":
    main()
