"""Reports of synthetic runs."""

import re
import shutil

import pytest
from rich.console import Console

from lrnn_lm.evaluate.reporting.card import write_run_card
from lrnn_lm.evaluate.reporting.report import report, to_markdown
from lrnn_lm.evaluate.reporting.runs import read_run
from lrnn_lm.evaluate.reporting.synthetic import synthetic_table
from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import build_trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds and two learning rates of parity, and an auto-encoder."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = [("parity", seed, lr) for seed in (0, 1) for lr in (1e-3, 1e-2)] + [("compression", 0, 1e-3)]
    for task, seed, lr in jobs:
        recipe = load_recipe(f"recipes/synthetic/{task}.yaml", [
            f"name={task}-{seed}-{lr}", "model.hidden_size=8", "model.intermediate_size=8",
            "train.tokens=1024", "train.tokens_per_step=512", "data.source.validation_examples=16",
            f"optim.lr={lr}", f"seed={seed}",
            "train.device=cpu", f"train.runs_dir={folder}", f"data.cache_dir={folder / 'cache'}",
        ])  # fmt: skip
        build_trainer(recipe, Console(quiet=True)).run()
    return sorted(path for path in folder.iterdir() if (path / "metrics.jsonl").is_file())


def test_a_row_a_model_and_a_column_a_task(runs):
    found = [read_run(path) for path in runs]
    header, rows = synthetic_table(found)
    assert header == ["model", "compression x 32", "parity x 32"]
    assert len(rows) == 1
    assert rows[0][0] == "bd_lru (block_size 4, gate softmax), 2 x 8, SwiGLU 8"
    best = max(
        sum(run.last("accuracy") for run in found if run.name in (f"parity-0-{lr}", f"parity-1-{lr}")) / 2
        for lr in (1e-3, 1e-2)
    )
    assert rows[0][2].startswith(f"{best:.4f} ± ")
    assert synthetic_table(found[:1]) is None


@pytest.mark.parametrize(
    ("old", "new", "rows"),
    [
        ("num_hidden_layers: 2", "num_hidden_layers: 3", 2),
        ("- 0.98", "- 0.95", 1),
        ("seed: 0", "seed: 2", 1),
        ("curriculum: []", "curriculum: [{length: 4, steps: 1}]", 1),
        ("z_loss: 0.0", "z_loss: 0.1", 1),
        ("ramp: null", "ramp: {start: 256, tokens: 512}", 1),
        ("start_from_other: 0.0", "start_from_other: 0.5", 1),
        ("guard: null", "guard: {deviations: 6.0, window: 128}", 1),
        ("repeat: 1", "repeat: 2", 2),
        ("learn_initial_state: false", "learn_initial_state: true", 2),
        ("init_from: null", "init_from: other", 2),
    ],
)
def test_only_seeds_are_averaged(runs, tmp_path, old, new, rows):
    """Another model is a row of its own; other training is another try; neither is another seed."""
    first = next(path for path in runs if path.name.startswith("parity-0"))
    shutil.copytree(first, tmp_path / "other", symlinks=True)
    recipe = first / "recipe.yaml"
    assert old in recipe.read_text()
    (tmp_path / "other" / "recipe.yaml").write_text(recipe.read_text().replace(old, new, 1))
    _, found = synthetic_table([read_run(first), read_run(tmp_path / "other")])
    assert len(found) == rows
    assert ("±" in found[0][1]) == old.startswith("seed")


@pytest.mark.parametrize("how", ["micro_batch: 1", "segment: 8", "log_every: 7", "runs_dir: elsewhere"])
def test_seeds_may_run_in_other_ways(runs, tmp_path, how):
    first = next(path for path in runs if path.name.startswith("parity-0"))
    shutil.copytree(first, tmp_path / "other", symlinks=True)
    text = (first / "recipe.yaml").read_text().replace("seed: 0", "seed: 2", 1)
    other, changes = re.subn(rf"(?m)^  {how.split(':')[0]}: .*$", f"  {how}", text)
    assert changes == 1
    assert other != text
    (tmp_path / "other/recipe.yaml").write_text(other)
    _, [row] = synthetic_table([read_run(first), read_run(tmp_path / "other")])
    assert "±" in row[1]


@pytest.mark.parametrize("text", ["", "a: [", "data: 3", "[1]"])
def test_a_damaged_recipe_is_named(runs, tmp_path, text):
    shutil.copytree(runs[0], tmp_path / "broken", symlinks=True)
    (tmp_path / "broken" / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"broken/recipe\.yaml: not a run's recipe"):
        synthetic_table([read_run(tmp_path / "broken"), read_run(runs[1])])


def test_report_shows_accuracy_in_place_of_bits(runs, tmp_path):
    report(runs, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "accuracy" in text
    assert "bits per byte" not in text
    assert "parity x 32" in to_markdown([read_run(path) for path in runs])


def test_cards(runs):
    for path in runs:
        card = write_run_card(path).read_text()
        language_model = "parity" in path.name
        assert ("AutoModelForCausalLM" in card) == ("text-generation" in card) == language_model
        assert ("A causal language model of" if language_model else "An auto-encoder of") in card
        assert "type synthetic" in card
