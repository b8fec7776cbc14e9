"""State tracking, formal languages and MAD as lm-eval tasks: the functions of eval/tasks/synthetic.

A row's ids are written as numbers between blanks. The question is the last label of a row; for an
auto-encoder, all labels. A checkpoint trained on the task gets its own options, and its tokenizer reads each
number as one id; to any other language model the row is a text of numbers.

Rows come from the split `eval` of the task's seed, which training never sees.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data import SYNTHETIC_TASKS, SyntheticTask
from ...runs.layout import CheckpointFolder
from ...runs.load import json_table

if TYPE_CHECKING:
    import datasets

EXAMPLES = 500  # rows a length


def synthetic_dataset(
    task: str,
    lengths: Sequence[int] | None = None,
    examples: int = EXAMPLES,
    seed: int = 0,
    pretrained: str | None = None,
    **_metadata: Any,
) -> "dict[str, datasets.Dataset]":
    """Rows of context, answer and length, the lengths in turn.

    pretrained: a checkpoint; if it was trained on this task, its options count, and its length. lengths: in
    place of that length, or of the task's own. Raises ValueError for impossible options or lengths.
    """
    from datasets import Dataset

    trained = run_source(pretrained)
    own = trained if trained.get("task") == task else {}
    options = {key: value for key, value in own.get("options", {}).items() if key != "seed"}
    known = _symbols(pretrained)
    lengths = lengths or [own.get("length") or SYNTHETIC_TASKS[task].length]
    rows = []
    for length in lengths:
        made = SyntheticTask(task, int(length), options)
        if known is not None and made.vocab_size > known:
            task_of_it = f" (task {trained['task']})" if trained else ""
            raise ValueError(
                f"task {task} has {made.vocab_size} symbols, and {pretrained} was trained on "
                f"{known}{task_of_it}"
            )
        inputs, labels = made.rows(seed, "eval", np.arange(examples))
        ask = _reading if made.kind.head == "autoencoder" else _question
        rows.append([ask(*pair, int(length)) for pair in zip(inputs, labels, strict=True)])
    return {"test": Dataset.from_list([row for turn in zip(*rows, strict=True) for row in turn])}


def _question(inputs: Any, labels: Any, length: int) -> dict[str, Any]:
    last = int(np.nonzero(labels >= 0)[0][-1])
    context = " ".join(map(str, inputs[: last + 1]))
    return {"context": context, "answer": f" {labels[last]}", "length": length}


def _reading(inputs: Any, labels: Any, length: int) -> dict[str, Any]:
    context, answer = (" ".join(map(str, ids)) for ids in (inputs, labels))
    return {"context": context, "answer": answer, "length": length}


def score_written(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The share of a row's labels that the model wrote, over all lengths and for its own length."""
    written, labels = results[0].split(), doc["answer"].split()
    share = float(np.mean([ours == label for ours, label in zip(written, labels, strict=True)]))
    return {"acc": share, f"acc_{doc['length']}": share}


def score_answer(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Whether the answer is the most likely continuation, over all lengths and for its own length."""
    _, greedy = results[0] if isinstance(results[0], tuple | list) else results
    return {"acc": float(greedy), f"acc_{doc['length']}": float(greedy)}


def check_answerable(names: Sequence[str], task: str, options: dict[str, Any]) -> None:
    """Raise ValueError for a synthetic task among `names` that a model trained on `task` cannot answer.

    It has more symbols, or needs the other kind of model.
    """
    kind = SYNTHETIC_TASKS.get(task)
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
    folder = Path(pretrained).expanduser().resolve()
    if source := json_table(folder / "config.json").get("synthetic_task"):
        return source
    if (run := CheckpointFolder(folder).run) is None:
        return {}
    source = json_table(run.data).get("source", {})
    return source if isinstance(source, dict) and source.get("type") == "synthetic" else {}


def _symbols(pretrained: str | Path | None) -> int | None:
    """Number of symbols in the tokenizer of a synthetic task's checkpoint; None for a checkpoint of text.

    That tokenizer would read an unknown symbol as 0, without an error.
    """
    if pretrained is None:
        return None
    vocab = json_table(Path(pretrained).expanduser() / "tokenizer.json").get("model", {}).get("vocab", ())
    return len(vocab) if vocab and vocab == {str(i): i for i in range(len(vocab))} else None
