"""A recipe that is whole, to be changed."""

from pathlib import Path

import pytest


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(
        "model: {hidden_size: 32, mixer: {type: bd_lru, block_size: 2, gate: tanh}}\n"
        "data: {source: {type: text, path: x}, sequence_length: 32}\n"
        "train: {tokens: 2560, tokens_per_step: 128}\n"
    )
    return path
