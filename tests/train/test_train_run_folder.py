"""What a run leaves beside its checkpoints: the recipe, the held-out text, metrics, the trackers' files."""

import io
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from accelerate import accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from rich.console import Console
from tiny_run import STEPS, TOKENS_PER_STEP, losses, metrics
from trainers import Build

from lrnn_lm.recipe import load_recipe
from lrnn_lm.train import runtime
from lrnn_lm.train.build import build_trainer


def test_the_stored_recipe_is_the_recipe(recipe: Path, straight: Path) -> None:
    assert load_recipe(straight / "recipe.yaml") == load_recipe(recipe)
    assert yaml.safe_load((straight / "recipe.yaml").read_text())["optim"]["betas"] == [0.9, 0.95]


def test_a_finished_run_keeps_its_recipe(build: Build) -> None:
    build("train.tokens=512").run()
    folder = build("train.tokens=512", "optim.lr=0.5").folder
    assert load_recipe(folder / "recipe.yaml").optim.lr == 0.01
    build("train.tokens=1024", "optim.lr=0.5")
    assert load_recipe(folder / "recipe.yaml").optim.lr == 0.5


def test_settings_that_a_run_did_not_have_before_are_told(recipe: Path, tmp_path: Path) -> None:
    """Someone who forgets `name=` would mix two runs unnoticed; what does not change numbers is not told."""

    def said(*overrides: str) -> str:
        console = Console(file=io.StringIO(), width=500)
        trainer = build_trainer(load_recipe(recipe, [f"train.runs_dir={tmp_path}", *overrides]), console)
        trainer.run()
        return console.file.getvalue()

    assert "settings" not in said("train.tokens=512", "optim.lr=0.02")
    assert "settings" not in said("train.tokens=512"), "it is trained already, and keeps its recipe"
    told = said("train.tokens=1024", "train.micro_batch=4", "train.average.decay=0.9", "eval.tokens=256")
    line = next(line for line in told.splitlines() if "resuming with other settings" in line)
    assert "; optim.lr: was 0.02, is 0.01; train.average.decay: was None, is 0.9" in line
    assert re.search(r"eval\.tokens: was \d+, is 256;", line), "the validation loss is of other text"
    assert "micro_batch" not in line
    assert "settings" not in said("train.tokens=1024", "train.average.decay=0.9", "eval.tokens=256")


def test_the_held_out_text_is_there(build: Build, straight: Path) -> None:
    held_out = build().prepared.heldout_path
    assert (straight / "heldout.jsonl").read_bytes() == held_out.read_bytes()


def test_metrics_have_their_fields(straight: Path) -> None:
    assert all(line["tokens"] == line["step"] * TOKENS_PER_STEP for line in metrics(straight))
    lines = [line for line in metrics(straight) if "loss" in line]
    assert len(lines) == STEPS
    for step, line in enumerate(lines, 1):
        assert line["step"] == step
        assert set(line) >= {"loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes", "skipped"}
        assert line["memory_bytes"] > 10**7
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_log_every(build: Build) -> None:
    trainer = build("train.log_every=4")
    trainer.run()
    assert [line["step"] for line in metrics(trainer.folder) if "loss" in line] == [4, 8, 12]


def test_tensorboard_takes_the_recipe_and_the_numbers(build: Build) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps(events: EventAccumulator, name: str) -> list[int]:
        events.Reload()
        return [event.step for event in events.Scalars(name)]

    trackers, every = "tracking.trackers=[tensorboard]", ["checkpoint.every=2 steps", "eval.every=2 steps"]
    trainer = build(trackers, "train.tokens=2048", *every)
    trainer.run()
    events = EventAccumulator(str(trainer.folder / "lrnn-lm"))
    assert (steps(events, "loss"), steps(events, "validation_loss")) == ([1, 2, 3, 4], [2, 4])
    # As if killed before that checkpoint was whole: the steps since the one before are taken again.
    shutil.rmtree(trainer.folder / "checkpoints/step-00000004")
    build(trackers, "train.tokens=3072", *every).run()
    events = EventAccumulator(str(trainer.folder / "lrnn-lm"))
    assert (steps(events, "loss"), steps(events, "validation_loss")) == ([1, 2, 3, 4, 5, 6], [2, 4, 6])


class Moody(GeneralTracker):
    """A tracker whose server is down: it fails in the methods that `fails` names."""

    name, requires_logging_directory = "moody", False
    fails: tuple[str, ...] = ()
    calls: ClassVar[list[str]] = []
    tracker = None

    def __init__(self, run_name: str, **settings: object):
        self.logged: list[int] = []

    def _call(self, method: str) -> None:
        self.calls.append(method)
        if method in self.fails:
            raise ServerError("connection refused")

    def start(self) -> None:
        self._call("start")

    def store_init_configuration(self, values: dict) -> None:
        self._call("store")

    def log(self, values: dict, step: int, **_: object) -> None:
        self._call("log")
        self.logged.append(step)

    def finish(self) -> None:
        self._call("finish")


class ServerError(Exception):
    """As trackers have: no OSError."""


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> type[Moody]:
    monkeypatch.setattr(Moody, "fails", ())
    monkeypatch.setattr(Moody, "calls", [])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Moody)
    return Moody


def run(recipe: Path, runs: Path, tokens: int, *overrides: str, parent: Path | None = None) -> str:
    """What a run with a tracker says."""
    console = Console(file=io.StringIO(), width=500)
    options = [f"train.runs_dir={runs}", f"train.tokens={tokens}", "tracking.trackers=[tensorboard]"]
    build_trainer(load_recipe(recipe, [*options, *overrides]), console, from_checkpoint=parent).run()
    return console.file.getvalue()


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_fails_does_not_end_a_run(
    fails: str, recipe: Path, tmp_path: Path, moody: type[Moody], straight: Path
) -> None:
    moody.fails = (fails,)
    said = run(recipe, tmp_path, 4 * TOKENS_PER_STEP)
    assert said.count("tracker moody failed (ServerError: connection refused): going on without") == 1
    assert losses(tmp_path / "tiny")[0] == losses(straight)[0]
    assert len(losses(tmp_path / "tiny")) == 4


@pytest.mark.parametrize("fails", ["store", "log", "finish"])
def test_a_tracker_that_fails_is_closed(fails: str, recipe: Path, tmp_path: Path, moody: type[Moody]) -> None:
    """Once: it was left open unless `finish` itself failed, and a later run of the process went on in it."""
    moody.fails = (fails,)
    with pytest.raises(ValueError, match="cannot start") if fails == "store" else nullcontext():
        run(recipe, tmp_path, 2 * TOKENS_PER_STEP)
    assert moody.calls[-1] == "finish"
    assert [moody.calls.count(method) for method in ("start", "finish")] == [1, 1]


def test_a_tracker_that_cannot_start(recipe: Path, tmp_path: Path, moody: type[Moody]) -> None:
    """Told before the first step of a run. Where a job resumes at night, the run goes on."""
    for fails in ("start", "store"):
        moody.fails = (fails,)
        with pytest.raises(
            ValueError, match=r"tracking\.trackers: tensorboard cannot start \(ServerError: conn"
        ):
            run(recipe, tmp_path, TOKENS_PER_STEP)
        assert not list((tmp_path / "tiny").glob("checkpoints/*"))
    moody.fails = ()
    run(recipe, tmp_path, TOKENS_PER_STEP)
    moody.fails = ("start",)
    parent = tmp_path / "tiny/checkpoints/step-00000001"
    with pytest.raises(ValueError, match="cannot start"):  # a branch begins, though not at step 0
        run(recipe, tmp_path, 2 * TOKENS_PER_STEP, "name=branch", parent=parent)
    assert "cannot start (ServerError: connection refused): going on without" in run(
        recipe, tmp_path, 2 * TOKENS_PER_STEP
    )
    assert len(losses(tmp_path / "tiny")) == 2


def test_a_tracker_that_cannot_start_takes_no_other_with_it(
    recipe: Path, tmp_path: Path, moody: type[Moody], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sound(Moody):
        name, begun = "sound", 0
        logged_by_all: ClassVar[list[int]] = []

        def _call(self, method: str) -> None:
            Sound.begun += method == "start"

        def log(self, values: dict, step: int, **_: object) -> None:
            self.logged_by_all.append(step)

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Sound)
    monkeypatch.setattr(runtime, "find_spec", lambda name: name)
    monkeypatch.setattr(accelerator, "filter_trackers", lambda named, *_: named)
    run(recipe, tmp_path, TOKENS_PER_STEP)
    moody.fails = ("start",)
    for number, order in enumerate(("[tensorboard,wandb]", "[wandb,tensorboard]"), 1):
        steps = number + 1
        said = run(recipe, tmp_path, steps * TOKENS_PER_STEP, f"tracking.trackers={order}")
        assert (
            "trackers: tensorboard cannot start (ServerError: connection refused): going on without" in said
        )
        assert (Sound.begun, {*Sound.logged_by_all}) == (number, {*range(2, steps + 1)})


def test_a_resumed_run_goes_on_in_its_wandb_run(
    recipe: Path, tmp_path: Path, moody: type[Moody], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a run that begins again, nor a copy under another name does; W&B's variables win."""
    given: list[dict] = []

    class Recorded(Moody):
        def __init__(self, run_name: str, **options: object) -> None:
            given.append(options)
            super().__init__(run_name)

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorded)
    monkeypatch.setattr(runtime, "find_spec", lambda name: name)
    monkeypatch.setattr(accelerator, "filter_trackers", lambda named, *_: named)
    for variable in ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)

    def start(steps: int, *overrides: str) -> dict:
        run(recipe, tmp_path, steps * TOKENS_PER_STEP, "tracking.trackers=[wandb]", *overrides)
        return given[-1]

    first = start(1)
    assert (first["name"], first["resume"]) == ("tiny", "allow")
    assert start(2) == first
    shutil.copytree(tmp_path / "tiny", tmp_path / "copy")
    assert start(3, "name=copy")["id"] != first["id"]
    assert start(3) == first
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert "id" not in start(4)
    monkeypatch.delenv("WANDB_RUN_ID")
    monkeypatch.setenv("WANDB_MODE", "offline")  # older versions cannot resume there
    assert start(5) == {"name": "tiny"}
    monkeypatch.delenv("WANDB_MODE")
    for steps, damaged in enumerate(("", "null", "[1]", '{"name": "tiny"}', '{"name": "tiny", "id": 3}'), 6):
        (tmp_path / "tiny/tracking.json").write_text(damaged)
        assert start(steps)["id"] not in (first["id"], 3)
    again = start(11)
    shutil.rmtree(tmp_path / "tiny/checkpoints")
    assert start(1)["id"] != again["id"]
