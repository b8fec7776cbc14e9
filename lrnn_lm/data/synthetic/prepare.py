"""What a run on a synthetic task needs in place of tokenised text: its rows, and a tokenizer of its symbols.

Rows are made as they are read, so nothing is written but the tokenizer: a word for each id, its number. With
it a checkpoint is as whole as any other, and `17 3 99` can be asked of it as text.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..specs import DataError, SyntheticSpec
from ..storage import build_folder
from ..tokenize import tokenizer_hash
from .tasks import ENDLESS, SyntheticRows, SyntheticTask, task_kind

FORMAT = 1  # raise it when the same spec would give other rows


@dataclass(frozen=True)
class SyntheticData:
    """The two splits of a task, with the names that `PreparedData` has; there are no held-out documents."""

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


def prepare_synthetic(spec: SyntheticSpec, vocab_size: int | None = None) -> SyntheticData:
    """The rows of a task and its tokenizer, which is written to cache_dir unless it is there.

    Raises DataError for a task, length or option that cannot be, and for a model's `vocab_size` that does not
    hold the task's symbols.
    """
    kind = task_kind(spec.task)
    task = SyntheticTask(spec.task, spec.length or kind.length, spec.options)
    if vocab_size is not None and vocab_size < task.vocab_size:
        raise DataError(
            f"model.vocab_size {vocab_size} is too small for task {task.name}, which has {task.vocab_size} "
            "symbols; leave it out to have it fit"
        )
    folder = Path(spec.cache_dir).expanduser() / "tokenizers" / f"symbols-{task.vocab_size}"
    try:
        build_folder(folder, partial(write_symbols, task.vocab_size))
    except OSError as error:
        raise DataError(f"cannot write to data.cache_dir {spec.cache_dir}: {error.strerror}") from None
    examples = spec.examples or kind.examples or ENDLESS
    return SyntheticData(
        task=task,
        tokenizer_dir=folder,
        train=SyntheticRows(task, spec.seed, "train", examples),
        validation=SyntheticRows(task, spec.seed, "validation", spec.validation_examples),
        manifest=_manifest(spec, task, examples, tokenizer_hash(folder)),
    )


def write_symbols(vocab_size: int, folder: Path) -> None:
    """A tokenizer of the words `0` .. `vocab_size - 1` between blanks, each its own id; it adds no other."""
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)


def _manifest(spec: SyntheticSpec, task: SyntheticTask, examples: int, symbols: str) -> dict[str, Any]:
    """What the run keeps as data.json, in the terms of prepared text."""
    source = {"type": "synthetic", "task": task.name, "length": task.length, "options": task.options}
    key = [FORMAT, source, examples, spec.seed, symbols]
    rows = {"train": examples, "validation": spec.validation_examples}
    return {
        "source": {**source, "examples": None if examples == ENDLESS else examples, "seed": spec.seed},
        "tokenizer": {"name": "symbols", "vocab_size": task.vocab_size, "hash": symbols},
        "splits": {
            split: {"num_tokens": count * task.length, "num_documents": count, "num_bytes": 0}
            for split, count in rows.items()
            if count != ENDLESS
        },
        "content_hash": hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest(),
    }
