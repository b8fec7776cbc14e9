"""`lrnn bench --compare`: what is slower is said, with exit code 1; what cannot be compared, with 2."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import compare, measure, train
from lrnn_lm.cli import main

ROWS = [
    {"contender": "bd-m4", "size": "212M", "B": 4, "T": 16, "step_seconds": 0.1},
    {"contender": "lstm", "size": "212M", "B": 4, "T": 16, "step_seconds": 0.2},
    {"contender": "mamba2", "size": "212M", "B": 4, "T": 16, "reason": "out of memory"},
]


def write(path: Path, rows: list[dict], device: str = "cpu", **about) -> Path:
    lines = [{"about": {"device": device, **about}}, *rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def bench(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as done:
        main(["bench", *map(str, arguments)])
    return done.value.code or 0


def test_two_files(tmp_path, capsys):
    old = write(tmp_path / "old.jsonl", ROWS)
    same = write(tmp_path / "same.jsonl", [{**ROWS[0], "step_seconds": 0.104}, *ROWS[1:]])
    assert bench("--compare", old, "--against", same) == 0
    assert "nothing is slower" in capsys.readouterr().out
    slow = write(
        tmp_path / "slow.jsonl", [{**ROWS[0], "step_seconds": 0.15}, {**ROWS[1], "step_seconds": 0.1}]
    )
    assert bench("--compare", old, "--against", slow) == 1
    said = capsys.readouterr().out
    assert "bd-m4, 212M, 4, 16: step_seconds is 1.50 times what it was" in said
    assert "faster" in said
    assert bench("--compare", old, "--against", slow, "--tolerance", "0.6") == 0


def test_a_row_that_no_longer_runs(tmp_path):
    broken = [{**ROWS[0]}, {k: v for k, v in ROWS[1].items() if k != "step_seconds"} | {"reason": "boom"}]
    assert compare.judge(ROWS, broken, 0.05) == [
        "lstm, 212M, 4, 16: step_seconds was measured before; now boom"
    ]
    assert "it is not there" in compare.judge(ROWS, broken[:1], 0.05)[0]


def test_run_again(tmp_path, capsys):
    """A run beside itself on a noisy machine: the same rows; only the clock may differ."""
    settings = train.TrainSettings(
        "bd-m4", "16", "64", width=32, layers=1, vocab=61, compile=False, steps=2, warmup=1
    )
    train.run(settings, "cpu", tmp_path / "old.jsonl")
    assert bench("--compare", tmp_path / "old.jsonl", "--device", "cpu", "--tolerance", "9") == 0
    assert "bd-m4, 32x1, 4, 16" in capsys.readouterr().out


def test_a_file_names_its_commit():
    """Of the code that made it, where git knows; two files of one table may be of two commits."""
    told = measure.describe(torch.device("cpu")).get("commit", "")
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    known = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    assert told.rstrip("+") == known


def test_mistakes_are_told(tmp_path, capsys):
    old = write(tmp_path / "old.jsonl", ROWS)
    other = write(tmp_path / "other.jsonl", ROWS, device="H100")
    kernels = tmp_path / "kernels.json"
    kernels.write_text(json.dumps({"about": {"device": "cpu"}, "rows": []}))
    gpu = write(tmp_path / "gpu.jsonl", ROWS, "H100", benchmark="train", settings={})
    for arguments, message in (
        (["--compare", tmp_path / "none"], "no such file"),
        (["--compare", old, "--against", other], "two devices"),
        (["--compare", kernels, "--device", "cpu"], "--against"),
        (["--compare", gpu, "--device", "cpu"], "measured on H100"),
        (["--compare", old, "train"], "leave the command out"),
        (["--compare", old, "--against", old, "--tolerance", "-1"], "--tolerance"),
    ):
        assert bench(*arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("about", "message"), [
    ({"benchmark": "train", "settings": {"nosuch": 1}}, "another version"),
    ({"benchmark": "train", "settings": {"fp8": True}}, "another version"),
    ({"benchmark": "train", "settings": "tokens"}, "another version"),
    ({"benchmark": "train"}, "another version"),
    ({"benchmark": "train", "settings": {}, "device": "a toaster"}, "measured on a toaster"),
    ({"benchmark": "kernels"}, "--against NEW"),
])  # fmt: skip
def test_files_that_cannot_be_run_again(tmp_path, capsys, about, message):
    here = {"device": measure.describe(torch.device("cpu"))["device"], **about}
    assert bench("--compare", write(tmp_path / "old.jsonl", ROWS, **here), "--device", "cpu") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"about": []}\n{}', '{"about": {}}\n[1]', "\udcff", ""])
def test_files_that_are_no_benchmarks(tmp_path, capsys, text):
    file = tmp_path / "file.jsonl"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert bench("--compare", file, "--against", file) == 2
    assert "file.jsonl: not a file that" in capsys.readouterr().err


def test_benchmarks_of_different_kinds(tmp_path, capsys):
    train_rows, decode_rows = (
        write(tmp_path / f"{kind}.jsonl", ROWS, benchmark=kind) for kind in ("train", "decode")
    )
    assert bench("--compare", train_rows, "--against", decode_rows) == 2
    assert "different benchmarks" in capsys.readouterr().err


def test_a_time_that_is_none_is_not_compared():
    rows = [{**ROWS[0], "step_seconds": "fast"}, {**ROWS[1], "step_seconds": 0}]
    assert compare.judge(rows, ROWS, 0.05) == []
    assert "was not measured" in compare.judge(ROWS, rows, 0.05)[0]
