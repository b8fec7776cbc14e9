"""Learning rates at points where they are known in closed form, and the optimizer's groups."""

import itertools
import math
import time
from typing import Any

import pytest
import torch
from small_models import small_model
from torch import nn

from lrnn_lm.recipe import recipe_from_dict
from lrnn_lm.recipe.optim import OptimSection
from lrnn_lm.recipe.quantities import Every
from lrnn_lm.train.build import model_config
from lrnn_lm.train.metrics import Cadence
from lrnn_lm.train.optim import decay_groups, learning_rate, make_optimizer

TOTAL, TOKENS = 101, 1000


def rate(step: int, **keys: Any) -> float:
    return learning_rate(step, TOTAL, TOKENS, OptimSection(**{"lr": 1.0, "final_lr": 0.1, **keys}))


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 0.1),
        ("cosine", 8, 0.9),
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.55),  # halfway down
        ("cosine", 40, 0.1 + 0.9 * 0.75),  # a third of the way: (1 + cos 60 degrees) / 2
        ("cosine", 100, 0.1),
        ("constant", 0, 0.1),
        ("constant", 10, 1.0),
        ("constant", 100, 1.0),
        ("wsd", 4, 0.5),
        ("wsd", 50, 1.0),
        ("wsd", 80, 1.0),
        ("wsd", 90, 0.55),
        ("wsd", 100, 0.1),
    ],
)
def test_rates(schedule: str, step: int, expected: float) -> None:
    found = rate(step, schedule=schedule, warmup="10 steps", decay="20 steps")
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup", ["10 steps", "10K", "10%", "0.1"])
def test_warm_up_in_all_units(warmup: str) -> None:
    """10% of 101 steps, 10,000 tokens at 1,000 a step, and 10 steps are the same."""
    assert [rate(step, warmup=warmup) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize("decay", ["20 steps", "20K", "20%"])
def test_decay_in_all_units(decay: str) -> None:
    assert rate(90, schedule="wsd", warmup="0 steps", decay=decay) == pytest.approx(0.55)


def test_a_decay_that_is_longer_than_what_the_warm_up_leaves() -> None:
    """From the end of the warm-up on, at 50 of 101 steps: 51 steps of decay."""
    rates = [rate(step, schedule="wsd", warmup="50 steps", decay="80 steps") for step in range(TOTAL)]
    assert rates[49] == 1.0
    assert rates[50:] == pytest.approx([0.1 + 0.9 * (100 - step) / 51 for step in range(50, TOTAL)])
    assert rate(100, schedule="wsd", warmup="0 steps", decay="0 steps") == pytest.approx(0.1)
    assert rate(99, schedule="wsd", warmup="0 steps", decay="0 steps") == 1.0
    assert rate(150, schedule="wsd") == rate(150, schedule="cosine") == pytest.approx(0.1), "past the end"


def test_no_schedule_leaves_its_bounds_or_jumps() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        rates = [rate(step, schedule=schedule) for step in range(TOTAL)]
        assert all(0 < r <= 1.0 for r in rates)
        assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 0.1 + 1e-12


@pytest.mark.parametrize("total", [1, 2, 3])
def test_runs_of_a_few_steps(total: int) -> None:
    for schedule in ("cosine", "wsd", "constant"):
        rates = [learning_rate(s, total, TOKENS, OptimSection(schedule=schedule)) for s in range(total)]
        assert all(math.isfinite(r) and r > 0 for r in rates)
        assert rates[0] == OptimSection().lr, schedule


MIXERS = {"bd_lru": {}, "h_lru": {"order": 2}, "attention": {"num_heads": 2}, "lstm": {}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_is_in_exactly_one_group(mixer: str, tied: bool) -> None:
    from lrnn_lm import LRNNForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "tie_word_embeddings": tied}
    recipe = recipe_from_dict({"name": "t", "model": small | {"mixer": {"type": mixer, **MIXERS[mixer]}}})
    model = LRNNForCausalLM(model_config(recipe, vocab_size=50))
    groups = decay_groups(model.parameters(), 0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted({id(p) for p in model.parameters()})
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.RMSNorm)}
    biases = {name for name in names.values() if "bias" in name.rsplit(".", 1)[-1]}
    assert norms
    assert spared == norms | biases
    assert (id(model.lm_head.weight) == id(model.model.embed_tokens.weight)) == tied


def test_the_optimizer_is_the_recipes() -> None:
    section = OptimSection(betas=(0.8, 0.9), eps=1e-6)
    optimizer = make_optimizer(small_model("bd_lru"), section, torch.device("cpu"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.9), 1e-6)}


def due_steps(every: str, steps: int = 12) -> list[int]:
    cadence = Cadence(Every.model_validate(every), lambda step: step * TOKENS)
    return [step for step in range(1, steps + 1) if cadence.due(step)]


def test_cadences() -> None:
    assert due_steps("4 steps") == [4, 8, 12]
    assert due_steps("2500") == [3, 5, 8, 10]  # the first step at or past each multiple
    assert due_steps("100") == list(range(1, 13))  # less than a step: after each


def test_a_cadence_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 25 s: a minute has passed after the third, and again three steps later."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    cadence = Cadence(Every.model_validate("1 min"), lambda step: step * TOKENS)
    due = []
    for step in range(1, 10):
        clock[0] += 25
        if cadence.due(step, cadence.timer_expired()):
            due.append(step)
    assert due == [3, 6, 9]
