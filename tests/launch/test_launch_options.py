"""Options of sbatch that `lrnn submit` sets itself are refused however sbatch would read them."""

import pytest
from pydantic import ValidationError

from lrnn_lm.recipe import LaunchSection
from lrnn_lm.recipe.launch import _OWN_OPTIONS, _SHORT


def refused(option: str) -> str | None:
    """The option of ours that the message names."""
    try:
        LaunchSection(sbatch=["--mem=0", option])
    except ValidationError as error:
        return str(error).split("'", 2)[2].split(" is set by")[0].removeprefix(": ")
    return None


@pytest.mark.parametrize("own", _OWN_OPTIONS)
def test_long_options_and_all_their_beginnings(own: str) -> None:
    assert refused(own) == own
    assert refused(f"{own}=4") == refused(f"{own} 4") == own
    for length in range(3, len(own)):
        assert (refused(own[:length]) or "").startswith(own[:length])
        assert (refused(f"{own[:length]}=4") or "").startswith(own[:length])


@pytest.mark.parametrize(("letter", "own"), list(_SHORT.items()))
def test_short_options(letter: str, own: str) -> None:
    for option in (
        f"-{letter}4",
        f"-{letter} 4",
        f"-{letter}=4",
        f"-Q{letter}4",
        f"-HvQ{letter} 4",
        f"-{letter}",
    ):
        assert refused(option) == own, option


@pytest.mark.parametrize(
    ("line", "own"),
    [
        ("-N4", "--nodes"), ("-N 4", "--nodes"), ("--outp=x", "--output"), ("--wra=id", "--wrap"),
        ("-o x", "--output"),
        ("--nod=2", "--nodes"), ("--mem=0 --nodes=4", "--nodes"),
        ("--mem=0 -o x", "--output"), ("-p gpu -N4", "--nodes"),
        ("--exclusive -t5", "--time"), ('--comment="a b" --ar=1', "--array"), ("--no-req", "--no-requeue"),
    ],
)  # fmt: skip
def test_lines(line: str, own: str) -> None:
    assert refused(line) == own


@pytest.mark.parametrize(
    "line",
    [
        "--mem=0", "--exclusive", "--constraint=h100", "--gres=gpu:h100:4", "-C h100",
        "-pN4", "-p N4", "-x node1",
        "--nodelist=n1", "--ntasks-per-core=1", "--time-min=10", "--comment='-N4 --nodes'", "--mail-type=END",
        "-Q",
        "--mem=0 # --nodes=4", "--wait-all-nodes=1", "--error=x", "-e x", "-ALN", "--signal-x", "-w n[1-4]",
    ],
)  # fmt: skip
def test_other_options_pass(line: str) -> None:
    assert refused(line) is None


def test_a_line_that_cannot_be_split() -> None:
    with pytest.raises(ValidationError, match="No closing quotation"):
        LaunchSection(sbatch=["--comment='a"])
