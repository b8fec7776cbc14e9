"""What a run on a synthetic task needs in place of tokenised text: its rows, and a tokenizer of its symbols.

Rows are made when they are read. Only the tokenizer is written, a word for each id: its number. So a
checkpoint has a tokenizer like any other, and can be asked `17 3 99` as text.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...files import user_path
from ..specs import DataError
from ..storage import build_folder
from ..tokenize import tokenizer_hash
from .tasks import ENDLESS, SyntheticRows, SyntheticTask

FORMAT = 1  # raise it when the same task would give other rows


@dataclass(frozen=True)
class SyntheticData:
    """The two splits of a task, with the attributes of `PreparedData`; there are no held-out documents."""

    task: SyntheticTask
    tokenizer_dir: Path
    train: SyntheticRows
    validation: SyntheticRows
    manifest: dict[str, Any]
    heldout_path: None = None

    @property
    def vocab_size(self) -> int:
        return self.task.vocab_size

    def check_tokenizer(self, folder: str | Path) -> None:
        """Raise DataError unless the tokenizer in `folder` is the task's."""
        if tokenizer_hash(folder) != self.manifest["tokenizer"]["hash"]:
            raise DataError(f"{folder} was trained on other symbols than those of {self.task.name}")


def prepare_synthetic(
    task: SyntheticTask,
    examples: int | None = None,
    validation_examples: int = 1280,
    seed: int = 0,
    cache_dir: str = "cache",
    vocab_size: int | None = None,
) -> SyntheticData:
    """The rows of a task, a function of `seed`, and its tokenizer, written to cache_dir unless it is there.

    examples: training rows; None: the published number, or new rows without end where there is none.
    Raises DataError if the model's `vocab_size` does not hold the task's symbols.
    """
    if vocab_size is not None and vocab_size < task.vocab_size:
        raise DataError(
            f"model.vocab_size {vocab_size} is too small for task {task.name}, which has {task.vocab_size} "
            "symbols; leave it out to have it fit"
        )
    folder = user_path(cache_dir) / "tokenizers" / f"symbols-{task.vocab_size}"
    try:
        build_folder(folder, partial(write_symbols, task.vocab_size))
    except OSError as error:
        raise DataError(f"cannot write to data.cache_dir {cache_dir}: {error.strerror}") from None
    train = SyntheticRows(task, seed, "train", examples or task.kind.examples or ENDLESS)
    validation = SyntheticRows(task, seed, "validation", validation_examples)
    manifest = _manifest(train, validation, tokenizer_hash(folder))
    return SyntheticData(task, folder, train, validation, manifest)


def write_symbols(vocab_size: int, folder: Path) -> None:
    """Write a tokenizer whose words `0` .. `vocab_size - 1` are their own ids; it adds no token."""
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)


def _manifest(train: SyntheticRows, validation: SyntheticRows, tokenizer: str) -> dict[str, Any]:
    """What the run keeps as data.json, with the keys of prepared text; `tokenizer` is its hash."""
    task, examples = train.task, train.num_rows
    source = {"type": "synthetic", "task": task.name, "length": task.length, "options": task.options}
    key = [FORMAT, source, examples, train.seed, tokenizer]
    return {
        "source": {**source, "examples": None if examples == ENDLESS else examples, "seed": train.seed},
        "tokenizer": {"name": "symbols", "vocab_size": task.vocab_size, "hash": tokenizer},
        "splits": {
            rows.split: {"num_tokens": n * task.length, "num_documents": n, "num_bytes": 0}
            for rows in (train, validation)
            if (n := rows.num_rows) != ENDLESS
        },
        "content_hash": hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest(),
    }
