"""Fixtures of the data tests: a small spec, the same prepared once, and the embedded documents."""

from pathlib import Path

import pytest
from corpora import make_texts, write_jsonl, write_recipe

from lrnn_lm.data import DataSpec, PreparedData, SourceSpec, prepare
from lrnn_lm.data.sources import documents


def tiny_spec(folder: Path) -> DataSpec:
    """60 documents, a BPE recipe of 400 pieces, rows of 32 tokens, several shards, one process."""
    return DataSpec(
        source=SourceSpec(type="jsonl", path=str(write_jsonl(folder / "corpus.jsonl", make_texts(60)))),
        validation_fraction=0.2,
        tokenizer=str(write_recipe(folder / "tiny.yaml")),
        sequence_length=32,
        cache_dir=str(folder / "cache"),
        shard_tokens=1500,
        num_proc=1,
    )


@pytest.fixture
def spec(tmp_path: Path) -> DataSpec:
    return tiny_spec(tmp_path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """tiny_spec, prepared once. Not to be changed."""
    return prepare(tiny_spec(tmp_path_factory.mktemp("prepared")), progress=False)


@pytest.fixture(scope="session")
def python_docs() -> list[str]:
    """The documents of the embedded source."""
    return list(documents(SourceSpec()))
