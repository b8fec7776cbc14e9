"""Fixtures of the tests of `lrnn submit`: a recipe, and programs that stand in for SLURM's."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """
name: base
model: {hidden_size: 32, num_hidden_layers: 1, intermediate_size: 32, mixer: {num_blocks: 8}}
data: {sequence_length: 64}
train: {tokens: 10240, tokens_per_step: 1024}
launch: {gpus_per_node: 4, modules: [cuda/12.4]}
"""

Program = Callable[[str, str], Path]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs: base.yaml lies there, and nothing else."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "base.yaml").write_text(RECIPE)
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """A shell script that is found by its name: `program("sbatch", "echo 12")`."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def make(name: str, body: str) -> Path:
        path = programs / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH without sbatch, on a machine that has it."""
    bare = tmp_path / "bare"
    bare.mkdir()
    monkeypatch.setenv("PATH", str(bare))
