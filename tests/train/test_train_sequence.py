"""Ranks that share rows (`train.sequence_parallel`) against one rank: losses, gradients, runs of the trainer.

Processes of gloo's on the CPU.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from forks import server
from rank_runs import Ranks, free_port, weights
from shared_rows import SEGMENTS, cases, compare
from tiny_run import losses, validations
from trainers import refused_before_data

from lrnn_lm.recipe import load_recipe


@pytest.mark.parametrize("count", SEGMENTS)
def test_losses_and_gradients_are_those_of_one_rank(count: int, tmp_path: Path) -> None:
    out, port = tmp_path / "errors.json", free_port()
    ranks = [server().Process(target=compare, args=(rank, count, port, out)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    errors = json.loads(out.read_text())
    assert len(errors) == len(cases(count))
    assert {k: e for k, e in errors.items() if not e < (1e-12 if "fp64" in k else 1e-6)} == {}


# The trainer -----------------------------------------------------------------------------------------

WINDOW = "model.layer_pattern=[{type: bd_lru, short_conv: 4}, {type: attention, num_heads: 2, window: 24}]"
SHORT = ("train.tokens=1536", "train.micro_batch=3", "checkpoint.every=2 steps", "eval.every=2 steps", WINDOW)


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    """The run of one rank: 3 steps of 8 rows of packed documents."""
    Ranks(recipe, 1, "name=alone", *SHORT).expect()
    return recipe.parent / "runs/alone"


@pytest.mark.parametrize(
    ("parallel", "ranks", "options"),
    [
        ("fsdp2", 4, ("train.segment=16",)),
        pytest.param("hsdp", 4, (), marks=pytest.mark.slow),
    ],
)
def test_a_run_of_shared_rows_is_that_of_one_rank(
    recipe: Path, alone: Path, parallel: str, ranks: int, options: tuple[str, ...]
) -> None:
    """Two ranks to a row, two rows at a time. FSDP2's ranks have two passes over each row."""
    name = f"shared-{parallel}"
    Ranks(
        recipe, ranks, f"name={name}", "train.sequence_parallel=2", *options, *SHORT, parallel=parallel
    ).expect()
    assert_agree(alone.parent / name, alone)


def assert_agree(run: Path, alone: Path) -> None:
    for read in (losses, validations):
        assert read(run) == [(step, pytest.approx(loss, rel=2e-6)) for step, loss in read(alone)] != []


def test_a_run_goes_on_bit_for_bit(recipe: Path, alone: Path) -> None:
    """Of two ranks, one row at a time, from step 2 on; undisturbed, it is that of one."""
    options, last = ("train.sequence_parallel=2", *SHORT), "checkpoints/step-00000003"
    Ranks(recipe, 2, "name=straight-2", *options).expect()
    straight = recipe.parent / "runs/straight-2"
    assert_agree(straight, alone)
    parts = Path(shutil.copytree(straight, recipe.parent / "runs/parts-2", symlinks=True))
    shutil.rmtree(parts / last)
    assert "resuming from step 2" in Ranks(recipe, 2, "name=parts-2", *options).expect()
    assert losses(parts) == losses(straight)
    assert validations(parts) == validations(straight)
    assert torch.equal(weights(parts / last), weights(straight / last))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("train.sequence_parallel=3",), ("train.sequence_parallel 3", "divide", "sequence_length 64")),
        (("train.sequence_parallel=4", "train.segment=32"), ("4 does not divide", "64 in segments of 32")),
        (("train.sequence_parallel=0",), ("train.sequence_parallel",)),
        (("train.sequence_parallel=2",), ("2 does not divide 1 rank:", "multiple of 2 processes")),
        (("train.sequence_parallel=2", "model.mixer={type: attention}"), ("sequence_parallel", "window")),
        (("train.sequence_parallel=2", "model.layer_pattern=[bd_lru, gla]"), ("gla", "gradients")),
        (("train.sequence_parallel=2", "data.rows_in_order=2"), ("sequence_parallel", "rows_in_order")),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_what_cannot_be_is_said_before_data_is_prepared(
    recipe: Path, overrides: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    refused_before_data(recipe, overrides, words, capsys)


def test_ranks_that_do_not_share_rows_evenly(recipe: Path) -> None:
    said = Ranks(recipe, 3, "name=uneven", "train.sequence_parallel=2").expect(2)
    assert said.count("lrnn: ") == said.count("train.sequence_parallel 2 does not divide 3 ranks") == 1
    three = load_recipe(
        recipe, ["train.sequence_parallel=2", "train.tokens_per_step=192", "train.tokens=384"]
    )
    with pytest.raises(ValueError, match="3 rows does not split over 2 groups of 2 ranks"):
        three.check_ranks(4, "ddp")
