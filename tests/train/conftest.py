"""Fixtures of the trainer's tests: data prepared once, an undisturbed run to compare with."""

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import write_recipe
from trainers import Build, send_at

from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import build_trainer
from lrnn_lm.train.loop import Trainer
from lrnn_lm.train.stop import Stopped


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose data all tests share."""
    return write_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def build(recipe: Path, tmp_path: Path) -> Build:
    """A trainer of the tiny recipe, in a folder of runs of the test's own: `build("optim.lr=1")`."""

    def build(*overrides: str, runs: Path = tmp_path) -> Trainer:
        loaded = load_recipe(recipe, [f"train.runs_dir={runs}", *overrides])
        return build_trainer(loaded, Console(quiet=True))

    return build


@pytest.fixture(scope="session")
def straight(recipe: Path) -> Path:
    """The run folder of the undisturbed run. Not to be changed."""
    trainer = build_trainer(load_recipe(recipe), Console(quiet=True))
    trainer.run()
    return trainer.folder


@pytest.fixture(scope="session")
def stopped_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from options to a run that was stopped after step 10, with checkpoints 8 and 10; each is run
    once. To be copied, not to be changed."""

    @cache
    def run(*options: str) -> Path:
        runs = tmp_path_factory.mktemp("stopped")
        trainer = build_trainer(
            load_recipe(recipe, [f"train.runs_dir={runs}", *options]), Console(quiet=True)
        )
        send_at(trainer, 10, signal.SIGTERM)
        with pytest.raises(Stopped):
            trainer.run()
        return trainer.folder

    return run
