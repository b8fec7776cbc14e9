"""Harm at random moments: the run goes on from a whole checkpoint and ends as if nothing had happened.

The long version is `python tests/kill_resume.py`.
"""

from pathlib import Path

import pytest
from kill_resume import harm_and_resume


@pytest.mark.parametrize(("ranks", "parallel"), [(1, "ddp"), (2, "fsdp2")])
def test_harmed_at_random_moments(tmp_path: Path, ranks: int, parallel: str) -> None:
    assert len(harm_and_resume(tmp_path, 3, seed=ranks, ranks=ranks, parallel=parallel)) == 3
