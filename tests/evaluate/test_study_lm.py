"""The language-model study: which device a training is told, and whether its models are recipes."""

from pathlib import Path

import pytest
import torch

from lrnn_lm.recipe import load_recipe
from studies import lm

PLAN = Path(lm.__file__).with_name("lm.yaml")


@pytest.mark.parametrize(
    ("given", "count", "told"),
    [(None, 3, ["0", "1", "2"]), ("2,3", 2, ["2", "3"]), ("1", 1, ["1"]), ("", 0, []), (None, 0, [])],
)
def test_trainings_take_the_devices_that_the_study_was_given(monkeypatch, given, count, told):
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert lm.visible_devices() == told


def test_the_plans_models_are_recipes(monkeypatch):
    """As the command of a run gives them: `mixer` whole, beside a pattern whose entries may say the same."""
    monkeypatch.setattr(lm, "count", lambda model: 50_000 * model["intermediate_size"])  # quick
    monkeypatch.setattr(lm, "TOLERANCE", float("inf"))
    plan = lm.read_plan(PLAN)
    runs = {run.contender: run for run in lm.runs_of(plan, None)}
    for run in runs.values():
        _, _, _, recipe, *overrides = lm.command(run, PLAN.parent / plan["recipe"], Path("c"), Path("r"), [])
        mixers = load_recipe(recipe, overrides).model.layer_pattern or []
        assert len(mixers) == len(run.model.get("layer_pattern", []))
    assert len(runs) > 100
