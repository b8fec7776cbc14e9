"""Harm at random moments: the run goes on from a whole checkpoint and ends as if nothing had happened.

The long version is `python tests/kill_resume.py`.
"""

from pathlib import Path

import pytest
from kill_resume import assert_codes, harm_and_resume


@pytest.mark.parametrize(("ranks", "parallel", "seed", "kills"), [(1, "ddp", 5, 3), (2, "fsdp2", 1, 1)])
def test_harmed_at_random_moments(tmp_path: Path, ranks: int, parallel: str, seed: int, kills: int) -> None:
    """A full disk and both kinds of kills; a kill of one of two ranks."""
    assert len(harm_and_resume(tmp_path, kills, seed, ranks, parallel)) == kills


@pytest.mark.parametrize(
    ("kind", "codes"), [("full disk", [1, 1]), ("full disk", [1, 0]), ("kill one", [1, 1])]
)
def test_a_plain_crash_is_not_taken_for_the_harm(kind: str, codes: list[int]) -> None:
    with pytest.raises(AssertionError, match="the traceback"):
        assert_codes(kind, codes, "the traceback")


@pytest.mark.parametrize(
    ("kind", "codes"), [("full disk", [2, 1]), ("kill one", [1, -9]), ("term all", [0, 0])]
)
def test_the_harm_shows_on_one_rank_at_least(kind: str, codes: list[int]) -> None:
    assert_codes(kind, codes, "")
