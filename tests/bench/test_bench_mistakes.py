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
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    command, *rest = arguments
    with pytest.raises(SystemExit) as done:
        main(["bench", command, "--device", "cpu", *rest])
    assert done.value.code == 2
    assert message in capsys.readouterr().err
