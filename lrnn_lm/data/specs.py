"""What to prepare, as frozen dataclasses, and the error that users' mistakes raise.

These hold less than the recipe's sections: a manifest stores a SourceSpec whole, so it has only what decides
which text is read. `data/` does not import the recipe and also prepares text without one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

_NAMED = 20  # fields in a message


class DataError(ValueError):
    """A user's mistake in the data or its recipe; the message says what, where and what to do."""


def missing_field(where: str, field: str, others: Iterable[str], what: str = "no field") -> DataError:
    """The error for a row or file at `where` without the text's field; `others` are those that it has."""
    names = list(others)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    choice = f"set data.source.text_field to one of: {', '.join(names[:_NAMED])}{more}"
    return DataError(f"{where}: {what} {field!r}; {choice if names else 'it has no field at all'}")


@dataclass(frozen=True)
class SourceSpec:
    """Where documents come from."""

    type: str = "python-docs"  # or text, jsonl, parquet, hf, megatron, tokens
    path: str | None = None  # a file, a folder, a glob, or the name of a hub dataset
    name: str | None = None  # configuration of a hub dataset
    split: str = "train"  # of a hub dataset
    text_field: str = "text"  # of jsonl, parquet and hf
    limit: int | None = None  # documents read at most
    separator: str | None = None  # of token files: the id or token that ends a document; None: end-of-text
    dtype: str | None = None  # of flat .bin files; None: found out


@dataclass(frozen=True)
class DataSpec:
    """Text to token shards: everything that `prepare` reads."""

    source: SourceSpec = field(default_factory=SourceSpec)
    validation_source: SourceSpec | None = None  # None: hold out a fraction of `source`
    validation_fraction: float = 0.02
    min_document: int | None = None  # training documents whose text has fewer tokens are left out
    tokenizer: str = "tokenizers/bpe-4k.yaml"  # a SentencePiece recipe, a folder, or a hub name
    sequence_length: int = 2048  # only checked: the text must fill one row
    cache_dir: str = "cache"
    shard_tokens: int = 100_000_000  # a shard is closed after the document that reaches this size
    num_proc: int | None = None  # processes that tokenise; None: one a core. Changes no byte
    vocab_size: int | None = None  # overrides a SentencePiece recipe's; a ready tokenizer must fit in it
