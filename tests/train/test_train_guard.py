"""`train.guard`: steps far above the last ones are skipped on all ranks; its window survives a stop."""

import math
import signal
from pathlib import Path

import pytest
from rank_runs import Ranks
from test_train_resume import LAST, assert_same_run
from tiny_run import metrics
from trainers import Build, main_exits, send_at

from lrnn_lm.recipe.train import GuardSection
from lrnn_lm.runs.checkpoint import read_position
from lrnn_lm.train.guard import is_outlier
from lrnn_lm.train.loop import Trainer
from lrnn_lm.train.stop import Stopped

ON = "train.guard={deviations: 5, window: 4}"


@pytest.fixture
def spike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of step 7 and 9 are a thousandfold: so are their gradients."""
    loss = Trainer._loss

    def spiked(trainer: Trainer, *arguments: object) -> object:
        return loss(trainer, *arguments) * (1000 if trainer.position.step + 1 in (7, 9) else 1)

    monkeypatch.setattr(Trainer, "_loss", spiked)


def test_deviations_by_hand() -> None:
    guard = GuardSection(deviations=2, window=4)
    recent = [[9.0, 9.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [4.0, 1.0]]  # the first is out of the window
    limit = 2.5 + 2 * math.sqrt(1.25)
    assert not is_outlier([limit - 1e-9, 1.0], recent, guard)
    assert is_outlier([limit + 1e-9, 1.0], recent, guard)
    assert not is_outlier([0.0, 0.5], recent, guard)  # below is fine
    assert is_outlier([2.5, 1.1], recent, guard)  # the norm alone, which never varied
    assert not is_outlier([99.0, 99.0], recent[-3:], guard)  # the window is not full


@pytest.mark.usefixtures("spike")
def test_a_spike_is_skipped_and_counted(build: Build) -> None:
    trainer = build(ON)
    trainer.run()
    lines = [line for line in metrics(trainer.folder) if "grad_norm" in line]
    assert [line["outliers"] for line in lines] == [0] * 6 + [1] * 2 + [2] * 4
    assert lines[-1]["skipped"] == 2
    assert lines[6]["loss"] > 100
    assert max(line["loss"] for line in lines if line["step"] not in (7, 9)) < 7
    position = read_position(trainer.folder / LAST)
    assert position.outliers == position.skipped == 2
    assert position.recent == [
        [line["loss"], line["grad_norm"]] for line in lines if line["step"] in (8, 10, 11, 12)
    ]


@pytest.mark.usefixtures("spike")
def test_stopped_and_resumed_is_straight_through(build: Build) -> None:
    """Just before the spike, and within it; with an average of the weights and groups too."""
    options = (ON, "train.average={decay: 0.5}", "train.z_loss=0.001",
               "optim.groups=[{match: '*norm*', lr_scale: 0.5}]")  # fmt: skip
    whole = build("name=whole", *options)
    whole.run()
    for at in (6, 7):
        stopped = build(*options)
        send_at(stopped, at, signal.SIGTERM)
        with pytest.raises(Stopped):
            stopped.run()
    first = build(*options)
    first.run()
    assert_same_run(first.folder, whole.folder)
    stored = f"{LAST}/trainer/average.safetensors"
    assert (first.folder / stored).read_bytes() == (whole.folder / stored).read_bytes()
    last = metrics(first.folder)[-2]
    assert (last["outliers"], last["z_loss"] > 0) == (2, True)


def test_ranks_decide_alike(recipe: Path, tmp_path: Path) -> None:
    """A guard that takes half of all steps for outliers: two ranks skip what one does."""
    options = (f"train.runs_dir={tmp_path}", "train.guard={deviations: 0.01, window: 2}", "train.z_loss=1e-4")
    Ranks(recipe, 2, *options, "name=two", "train.max_bad_steps=99").expect()
    main_exits(0, "train", recipe, *options, "name=one", "train.max_bad_steps=99")
    one, two = ([x for x in metrics(tmp_path / name) if "outliers" in x] for name in ("one", "two"))
    assert [line["outliers"] for line in one] == [line["outliers"] for line in two]
    assert 0 < one[-1]["outliers"] < 12
    assert [line["z_loss"] for line in two] == pytest.approx([line["z_loss"] for line in one], rel=1e-4)


def test_a_run_that_stays_above_ends(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = Trainer._loss
    monkeypatch.setattr(
        Trainer, "_loss", lambda trainer, *a: loss(trainer, *a) * (1 if trainer.position.step < 8 else 50)
    )
    main_exits(2, "train", recipe, f"train.runs_dir={tmp_path}", ON, "train.max_bad_steps=2")
    said = capsys.readouterr().err
    assert "not finite, or beyond train.guard, for 2 steps in a row, up to step 10" in said
    assert "train.guard.deviations" in said
