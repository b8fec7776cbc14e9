"""What to prepare, as plain frozen data, and the one error that users' mistakes raise.

These are not the recipe's sections: a recipe's `data.source` also says what a loader or a task does with the
rows, while a manifest holds a SourceSpec whole, as all that decides which text was read. This folder imports
nothing of ours, so that it also prepares text without a recipe.
"""

from dataclasses import dataclass, field


class DataError(ValueError):
    """A mistake of the user's in the data or its recipe: what, where and what to do, in a line or two."""


@dataclass(frozen=True)
class SourceSpec:
    """Where documents come from.

    `type` is python-docs, text, jsonl, parquet or hf. `path` is a file, a folder or a glob, or the name of a
    hub dataset; `name` and `split` belong to hf, `text_field` to jsonl, parquet and hf. `limit` reads at most
    that many documents.
    """

    type: str = "python-docs"
    path: str | None = None
    name: str | None = None
    split: str = "train"
    text_field: str = "text"
    limit: int | None = None


@dataclass(frozen=True)
class DataSpec:
    """Text to token shards: everything that `prepare` reads.

    `tokenizer` is a folder, a hub name or a SentencePiece recipe (YAML). `vocab_size` overrides the size in a
    SentencePiece recipe; for a ready tokenizer it is the room it must fit in. `seed` stands here because the
    order of rows depends on it; the bytes of the shards do not. `shard_tokens` is the size at which a shard
    is closed, after the document that reaches it. `num_proc` processes tokenise (none: one a core); it
    changes no byte.
    """

    source: SourceSpec = field(default_factory=SourceSpec)
    validation_source: SourceSpec | None = None
    validation_fraction: float = 0.02
    tokenizer: str = "tokenizers/bpe-4k.yaml"
    sequence_length: int = 2048
    cache_dir: str = "cache"
    shard_tokens: int = 100_000_000
    num_proc: int | None = None
    vocab_size: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class SyntheticSpec:
    """A synthetic task to train on: its name, T, its options, and how many rows there are of either split.

    `examples` None takes the published number, or new rows without end where there is none. The rows are a
    function of `seed` and their number. `cache_dir` receives a tokenizer of the task's symbols.
    """

    task: str
    length: int | None = None
    options: dict[str, int | float] = field(default_factory=dict)
    examples: int | None = None
    validation_examples: int = 1280
    seed: int = 0
    cache_dir: str = "cache"
