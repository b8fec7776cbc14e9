"""Several checkpoints on the same tasks."""

import json

import pytest

from lrnn_lm.cli import main
from lrnn_lm.evaluate.compare import beside


def evaluate(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["eval", *map(str, arguments), "--device", "cpu", "--limit", "3", "--tasks", "heldout_cloze"])
    return left.value.code or 0


def test_beside_each_other(checkpoint, tmp_path, capsys):
    copy = tmp_path / "copy" / "checkpoints" / "step-00000020"
    copy.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    text = (checkpoint.parent.parent / "heldout.jsonl").read_bytes()
    (tmp_path / "copy" / "heldout.jsonl").write_bytes(text)
    assert evaluate(checkpoint, copy, "--output", tmp_path / "out") == 0
    assert "beside each other" in capsys.readouterr().out
    files = [next((tmp_path / "out" / name).glob("*.json")) for name in ("tiny", "copy")]
    results = [json.loads(file.read_text()) for file in files]
    for row in beside(results):
        assert row[0] == "heldout_cloze"
        assert row[2] == row[3]


def test_mistakes(checkpoint, tmp_path, capsys):
    assert evaluate(checkpoint, checkpoint) == 2
    assert "given once" in capsys.readouterr().err
    assert evaluate(checkpoint, tmp_path / "none") == 2
    assert "no such checkpoint folder" in capsys.readouterr().err
