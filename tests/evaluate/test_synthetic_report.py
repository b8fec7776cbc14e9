"""Reports of synthetic runs, and the study script at toy size."""

import argparse
import importlib.util
from pathlib import Path

import pytest
from rich.console import Console

from lrnn_lm.data import MAD_TASKS
from lrnn_lm.evaluate.card import write_run_card
from lrnn_lm.evaluate.report import report, to_markdown
from lrnn_lm.evaluate.runs import read_run
from lrnn_lm.evaluate.synthetic_report import synthetic_table
from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import build_trainer

ROOT = Path(__file__).parents[2]


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
    assert rows[0][0] == "bd_lru (block_size 4, gate softmax), width 8"
    best = max(
        sum(run.last("accuracy") for run in found if run.name in (f"parity-0-{lr}", f"parity-1-{lr}")) / 2
        for lr in (1e-3, 1e-2)
    )
    assert rows[0][2].startswith(f"{best:.4f} ± ")
    assert synthetic_table(found[:1]) is None


def test_report_shows_accuracy_in_place_of_bits(runs, tmp_path):
    report(runs, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "accuracy" in text
    assert "bits per byte" not in text
    assert "parity x 32" in to_markdown([read_run(path) for path in runs])


def test_cards(runs):
    for path in runs:
        card = write_run_card(path).read_text()
        assert ("AutoModelForCausalLM" in card) == ("parity" in path.name)
        assert "type synthetic" in card


@pytest.fixture(scope="module")
def study():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("study", ROOT / "eval/studies/synthetic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(folder, **changes):
    settings = {
        "output": folder, "study": "states", "tasks": "parity", "models": "bd_lru-m4,attention",
        "gates": "softmax", "hidden": 16, "steps": 2, "rows": 4, "lrs": "1e-3,1e-2", "seeds": "0,1",
        "start": 0, "minutes": 5.0, "jobs": 1, "workers": 0, "device": "cpu",
    }  # fmt: skip
    return argparse.Namespace(**{**settings, **changes})


def test_study(study, tmp_path):
    jobs = study.jobs_of(options(tmp_path), None)
    assert [(job["model"], job["lr"], job["seed"]) for job in jobs] == [
        ("bd_lru-m4-softmax", 1e-3, 0), ("bd_lru-m4-softmax", 1e-2, 0),
        ("attention", 1e-3, 0), ("attention", 1e-2, 0),
    ]  # fmt: skip
    study.set_parameters(jobs)
    done = [study.run(job) for job in (jobs[0], jobs[2])]
    sizes = [result["parameters_had"] for result in done]
    assert max(sizes) / min(sizes) < 1.02
    assert all(len(result["by_length"]) == 5 for result in done)
    rates = study.best_rates(done, 0)
    assert rates == {("parity", "bd_lru-m4-softmax"): 1e-3, ("parity", "attention"): 1e-3}
    others = study.jobs_of(options(tmp_path), rates)
    assert [(job["lr"], job["seed"]) for job in others] == [(1e-3, 1), (1e-3, 1)]
    assert "| parity | attention |" in study.table(done, rates)
    failed = study.run({**jobs[0], "mixer": {"type": "bd_lru", "gate": "smoothmax"}, "name": "wrong"})
    assert "smoothmax" in failed["error"]
    with pytest.raises(ValueError, match="unknown model 'bd_lru-m3'"):
        study.jobs_of(options(tmp_path, models="bd_lru-m3"), None)


def test_every_model_and_task_of_the_study_has_a_recipe(study, tmp_path):
    assert set(study.STUDIES["mad"]) == set(MAD_TASKS)
    both = options(tmp_path, tasks="s3,memorisation", models=",".join(study.MODELS))
    for job in study.jobs_of(both, None)[::2]:
        assert study.recipe_of(job).model.mixer.type == job["mixer"]["type"]
