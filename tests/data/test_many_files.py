"""More files than a process may have open: `ulimit -n` is often 1,024, and a corpus may have thousands."""

import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpora import make_texts, write_jsonl

from lrnn_lm.data import DataSpec, PreparedData, SourceSpec, TrainLoader, prepare

FILES = 400


@pytest.fixture
def few_files() -> Iterator[None]:
    """Inside, this process may open some hundred files more, fewer than the tests' corpora have."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * is_open + 100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def check(made: PreparedData, rows: int, spec: DataSpec, workers: int = 0) -> None:
    """All rows of an epoch, in one step, are those of the stream. A micro-batch of a worker's is no file."""
    length = spec.sequence_length
    loader = TrainLoader(made.train, length, 0, rows, 4, num_workers=workers)
    batches = next(iter(loader))
    found = {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}
    whole = made.train.read(0, rows * length).reshape(rows, length)
    assert found == {tuple(row.tolist()) for row in whole}


@pytest.mark.parametrize("workers", [0, 1])
def test_shards(spec: DataSpec, few_files: None, workers: int) -> None:
    write_jsonl(Path(spec.source.path), make_texts(FILES))
    made = prepare(replace(spec, shard_tokens=1), progress=False)
    assert len(made.train._shards) > FILES / 2
    assert len(os.listdir(made.folder)) > resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    check(made, (made.train.num_tokens - 1) // spec.sequence_length, spec, workers)
    assert len(made.validation.read(0, made.validation.num_tokens)) == made.validation.num_tokens


def test_token_files(spec: DataSpec, prepared: PreparedData, tmp_path: Path, few_files: None) -> None:
    folder = tmp_path / "ids"
    folder.mkdir()
    for number in range(FILES):
        ids = np.random.default_rng(number).integers(10, 390, 50)
        np.append(ids, 2).astype("<u2").tofile(folder / f"{number:03d}.bin")
    source = SourceSpec(type="tokens", path=str(folder), dtype="uint16")
    given = replace(spec, source=source, tokenizer=str(prepared.tokenizer_dir))
    made = prepare(given, progress=False)
    check(made, (made.train.num_tokens - 1) // spec.sequence_length, spec)
