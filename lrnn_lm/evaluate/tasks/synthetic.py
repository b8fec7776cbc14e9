"""What a checkpoint was trained on, if on a synthetic task, and which tasks of eval/tasks it can answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data import SYNTHETIC_TASKS
from ...files import user_path
from ...runs.layout import CheckpointFolder
from ...runs.load import json_table


def check_answerable(names: Sequence[str], task: str | None, options: dict[str, Any]) -> None:
    """Raise ValueError for a task among `names` that a run on `task` (None: on text) cannot be scored on.

    It reads a folder that no recipe names, has more symbols, or needs the other kind of model.
    """
    if folder := [name for name in names if name.startswith("offline")]:
        raise ValueError(
            f"eval.tasks: {folder[0]} reads a folder of local files, which a recipe cannot give: leave it "
            f"out, and score the trained model by lrnn eval CHECKPOINT --tasks {folder[0]} --data DIR"
        )
    if task is None and "mad_compression" in names:
        raise ValueError(
            "eval.tasks: mad_compression asks an auto-encoder, and this run trains a language model"
        )
    kind = SYNTHETIC_TASKS.get(task or "")
    if kind is None:
        return  # an unknown task is an error when the data is prepared
    known = kind.symbols({**kind.options, **options})
    for name in names:
        asked = name.removeprefix("state_").removeprefix("mad_").removeprefix("recall_")
        if asked in (name, task) or asked not in SYNTHETIC_TASKS:
            continue
        other = SYNTHETIC_TASKS[asked]
        symbols = other.symbols(dict(other.options))
        if symbols > known or other.head != kind.head:
            raise ValueError(
                f"eval.tasks: {name} has {symbols} symbols and needs a model that ends as {other.head!r}; "
                f"this run's, on {task}, has {known} and ends as {kind.head!r}"
            )


def run_source(pretrained: str | Path | None) -> dict[str, Any]:
    """The synthetic task, length and options that a checkpoint was trained on; empty if there is none.

    They are in its config.json; of older checkpoints, in their run. Raises ValueError for a damaged file.
    """
    if pretrained is None:
        return {}
    folder = user_path(pretrained).resolve()
    if source := json_table(folder / "config.json").get("synthetic_task"):
        return source
    if (run := CheckpointFolder(folder).run) is None:
        return {}
    source = json_table(run.data).get("source", {})
    return source if isinstance(source, dict) and source.get("type") == "synthetic" else {}


def known_symbols(pretrained: str | Path | None) -> int | None:
    """Number of symbols in the tokenizer of a synthetic task's checkpoint; None for a checkpoint of text.

    That tokenizer would read an unknown symbol as 0, without an error.
    """
    if pretrained is None:
        return None
    vocab = json_table(user_path(pretrained) / "tokenizer.json").get("model", {}).get("vocab", ())
    return len(vocab) if vocab and vocab == {str(i): i for i in range(len(vocab))} else None
