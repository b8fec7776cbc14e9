"""kill -9 at random moments: the run goes on from a whole checkpoint and ends as if nothing had happened."""

from pathlib import Path

from kill_resume import kill_and_resume


def test_killed_at_random_moments(tmp_path: Path) -> None:
    assert len(kill_and_resume(tmp_path, kills=3, seed=1)) == 3
