"""What cannot be measured is told in a line, with exit code 2."""

import pytest

from lrnn_lm.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--contenders", "bd-m5"], "unknown contender 'bd-m5'"),
        (["train", "--sizes", "3M"], "unknown size '3M'"),
        (["train", "--lengths", "0"], "--lengths"),
        (["train", "--tokens", "many"], "--tokens"),
        (["train", "--width", "17"], "multiple of 16"),
        (["train", "--precision", "fp8"], "auto, bf16 or fp32"),
        (["train", "--steps", "0"], "--steps"),
        (["train", "--budget-seconds", "0"], "--budget-seconds"),
        (["decode", "--modes", "fast"], "unknown mode 'fast'"),
        (["decode", "--batches", "x"], "--batches"),
        (["decode", "--contexts", ""], "--contexts"),
        (["decode", "--tokens", "1"], "--tokens"),
        (["decode", "--size", "huge"], "unknown size"),
        (["kernels", "--only", "M=32"], "fits none of BD-LRU M=1"),
        (["kernels", "--only", "Peers"], "takes a GPU"),
        (["kernels", "--tokens", "8", "--length", "16"], "--length 16 does not fit"),
        (["kernels", "--output", "."], "a folder"),
        (["train", "--contenders", ","], "no contenders"),
        (["train", "--contenders", "nosuch.yaml"], "nosuch.yaml"),
        (["train", "--loss-chunk", "0"], "--loss-chunk"),
        (["train", "--vocab", "0"], "--vocab"),
        (["train", "--profile", "-1"], "--profile"),
        (["train", "--tokens", "32", "--lengths", "64"], "less than one row"),
        (["train", "--budget-seconds", "nan"], "--budget-seconds"),
        (["train", "--output", "rows.md"], "name the rows' file .jsonl"),
        (["decode", "--vocab", "-5"], "--vocab"),
        (["frontier", "--steps", "0"], "--steps"),
        (["frontier", "--lrs", "fast"], "--lrs"),
        (["frontier", "--lrs", "0"], "--lrs"),
        (["frontier", "--lrs", "nan"], "--lrs"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    command, *rest = arguments
    with pytest.raises(SystemExit) as done:
        main(["bench", command, "--device", "cpu", *rest])
    assert done.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--device", "cpu"], ["--tolerance", "0.1"], ["--against", "rows.jsonl"]])
def test_options_of_compare_before_a_benchmarks_name(given, capsys):
    """They would be dropped, and another device measured."""
    with pytest.raises(SystemExit) as done:
        main(["bench", *given, "kernels"])
    assert done.value.code == 2
    assert f"{given[0]} belongs to --compare" in capsys.readouterr().err


def test_a_benchmark_is_to_be_named(capsys):
    with pytest.raises(SystemExit) as done:
        main(["bench", "--device", "cpu"])
    assert done.value.code == 2
    assert "name a benchmark" in capsys.readouterr().err
