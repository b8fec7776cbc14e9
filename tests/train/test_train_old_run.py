"""A run that commit 9c681f8 made: its checkpoint still loads, and training goes on from it.

`run_of_9c681f8.tar.xz` is what `lrnn train old.yaml` left there: eight steps of a model of 16 channels, its
34 files of code. The losses below are those of the eight steps after them, by 9c681f8 too.
"""

import json
import shutil
from pathlib import Path

import pytest

from lrnn_lm.cli import main

ARCHIVE = Path(__file__).with_name("run_of_9c681f8.tar.xz")
LOSS, VALIDATION_LOSS = 5.4272308349609375, 5.419137333714684  # nats a token, at step 16


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.unpack_archive(ARCHIVE, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return done.value.code or 0


def test_training_goes_on_as_it_would_have_then(folder):
    assert run("train", "old.yaml", "train.tokens=4096") == 0
    lines = [json.loads(line) for line in (folder / "runs/old/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 17))
    (validation,) = [line for line in lines if line["step"] == 16 and "validation_loss" in line]
    (trained,) = [line for line in lines if line["step"] == 16 and "loss" in line]
    assert trained["loss"] == pytest.approx(LOSS, rel=1e-6)
    assert validation["validation_loss"] == pytest.approx(VALIDATION_LOSS, rel=1e-6)


def test_the_checkpoint_loads_and_exports(folder, capsys):
    checkpoint = "runs/old/checkpoints/step-00000008"
    assert run("generate", checkpoint, "--prompt", "the state", "--max-new-tokens", "3", "--greedy") == 0
    assert run("info", checkpoint) == 0
    assert run("info", "runs/old/recipe.yaml") == 0, "a stored recipe named every mixer's options then"
    assert run("export", checkpoint, "out") == 0
    code = {path.name for path in (folder / "out").glob("*.py")}
    assert code == {"configuration_lrnn.py", "kernels_lrnn.py", "modeling_lrnn.py"}
