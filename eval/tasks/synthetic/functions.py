"""State tracking, formal languages and MAD as lm-eval tasks: the functions that the YAML files here name.

A row's ids are written as numbers between blanks. The question is the last label of a row; for an
auto-encoder, all labels. A checkpoint trained on the task gets its own options, and its tokenizer reads each
number as one id; to any other language model the row is a text of numbers.

Rows come from the split `eval` of the task's seed, which training never sees.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lrnn_lm.data import SYNTHETIC_TASKS, SyntheticTask
from lrnn_lm.evaluate.tasks.synthetic import known_symbols, run_source

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
    known = known_symbols(pretrained)
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
