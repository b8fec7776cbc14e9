"""Helpers of the trainer's tests that act on a trainer or the command line in this process."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lrnn_lm.cli import main
from lrnn_lm.train.loop import Trainer

Build = Callable[..., Trainer]


def send_at(trainer: Trainer, step: int, number: signal.Signals, validating: bool = False) -> None:
    """Have this process send itself a signal within step `step`, or within the validation after it."""
    name = "forward" if validating else "step"
    original = getattr(trainer, name)

    def wrapped(*args: object, **options: object) -> object:
        now = trainer.position.step + (not validating)
        if now == step and not (validating and trainer.model.training):
            os.kill(os.getpid(), number)
        return original(*args, **options)

    setattr(trainer, name, wrapped)


def main_exits(code: int, *arguments: object) -> None:
    """Run the command line here; it must leave with `code`."""
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    assert (exited.value.code or 0) == code


def refused_before_data(
    recipe: Path, overrides: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    """`lrnn train` must refuse these overrides, with all of these words, before it prepares data."""
    cache = recipe.parent / "nothing"
    main_exits(2, "train", recipe, *overrides, f"data.cache_dir={cache}")
    said = capsys.readouterr().err
    assert [word for word in words if word not in said] == []
    assert "Traceback" not in said
    assert not cache.exists()
