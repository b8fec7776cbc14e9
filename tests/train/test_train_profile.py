"""`train.profile`: a trace and a table of some steps, from a run that stays the same."""

import json
from pathlib import Path

from tiny_run import LAST, fingerprint, losses
from trainers import Build


def test_steps_are_profiled_and_no_bit_changes(build: Build, straight: Path) -> None:
    trainer = build("train.profile={at: 2, steps: 2}")
    trainer.run()
    events = json.loads((trainer.folder / "profile/trace.json").read_text())["traceEvents"]
    updates = [e for e in events if e.get("name", "").startswith("Optimizer.step#")]
    assert len(updates) == 2
    table = (trainer.folder / "profile/table.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU" in table
    assert fingerprint(trainer.folder / LAST) == fingerprint(straight / LAST)
    assert losses(trainer.folder) == losses(straight)


def test_a_resumed_run_profiles_nothing_that_is_past(build: Build) -> None:
    build("train.tokens=1024", "optim.schedule=constant").run()
    trainer = build("train.tokens=2048", "optim.schedule=constant", "train.profile={at: 2, steps: 1}")
    trainer.run()
    assert not (trainer.folder / "profile").exists()
