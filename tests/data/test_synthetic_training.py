"""Synthetic tasks through the trainer: accuracy in the metrics, exact resume, the auto-encoder, mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_run import fingerprint, metrics

from lrnn_lm.cli import main
from lrnn_lm.data import SYNTHETIC_TASKS, TrainLoader, validation_batches
from lrnn_lm.model import LRNNForReconstruction
from lrnn_lm.recipe import load_recipe, shipped
from lrnn_lm.runs.load import load_checkpoint
from lrnn_lm.train.build import build_trainer

RECIPES = sorted(p for p in shipped("recipes/synthetic").glob("*.yaml") if p.name != "base.yaml")
BASELINES = [path for path in RECIPES if path.stem not in ("s5-extrapolates", "s5-certified")]
SMALL = [
    "model.hidden_size=16", "model.intermediate_size=16", "train.tokens_per_step=1024", "train.micro_batch=8",
    "train.log_every=1", "eval.tokens=2K", "data.source.validation_examples=20", "train.device=cpu",
]  # fmt: skip


def build(name: str, folder: Path, *overrides: str):
    recipe = load_recipe(
        f"recipes/synthetic/{name}.yaml",
        [*SMALL, f"train.runs_dir={folder / 'runs'}", f"data.cache_dir={folder / 'cache'}", *overrides],
    )
    return build_trainer(recipe, Console(quiet=True))


def test_there_is_a_recipe_for_every_task():
    tasks = {load_recipe(path).data.source.task for path in RECIPES}
    assert tasks == set(SYNTHETIC_TASKS)


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_recipes_follow_the_published_baseline(path):
    recipe = load_recipe(path)
    kind = SYNTHETIC_TASKS[recipe.data.source.task]
    assert recipe.data.sequence_length == kind.length
    assert recipe.rows_per_step == 128
    assert recipe.data.source.examples is None
    epochs = recipe.total_steps * 128 / (kind.examples or 12_800)
    assert epochs == 200
    assert recipe.optim.betas == (0.9, 0.98)


def test_parity_is_learnt_and_reported(tmp_path):
    trainer = build("parity", tmp_path, "train.tokens=61440", "data.source.length=8", "optim.lr=2e-2",
                    "model.mixer.gate=tanh", "eval.every=20 steps", "train.micro_batch=128")  # fmt: skip
    folder = trainer.run()
    lines = [line for line in metrics(trainer.folder) if "accuracy" in line]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert "bits_per_byte" not in lines[0]
    hits = targets = 0
    for batch in validation_batches(trainer.prepared.validation, 8, 16, trainer.recipe.eval.tokens):
        with torch.no_grad():
            likeliest = trainer.bare_model(batch["input_ids"]).logits.argmax(dim=-1)
        hits += int((likeliest == batch["labels"]).sum())
        targets += int((batch["labels"] != -100).sum())
    assert lines[-1]["accuracy"] == pytest.approx(hits / targets, abs=2 / targets)
    assert 0.7 < lines[-1]["accuracy"] <= 1
    assert json.loads((trainer.folder / "data.json").read_text())["source"]["task"] == "parity"
    model, tokenizer = load_checkpoint(folder, "cpu")
    assert model.config.vocab_size == len(tokenizer) == 2


def test_resumed_equals_undisturbed(tmp_path):
    whole = build("s3", tmp_path, "train.tokens=8192", "checkpoint.every=4 steps", "name=whole")
    straight = whole.run()
    for tokens in (4096, 8192):  # the learning rate follows the budget, so it is held constant
        parts = build("s3", tmp_path, f"train.tokens={tokens}", "checkpoint.every=4 steps", "name=parts",
                      "optim.schedule=constant")  # fmt: skip
        last = parts.run()
    constant = build("s3", tmp_path, "train.tokens=8192", "checkpoint.every=4 steps", "name=constant",
                     "optim.schedule=constant").run()  # fmt: skip
    assert fingerprint(last) == fingerprint(constant)
    assert fingerprint(straight) != fingerprint(constant)


def test_ranks_share_the_same_rows(tmp_path):
    rows = build("s4", tmp_path, "train.tokens=1024").prepared.train
    one = next(iter(TrainLoader(rows, 32, 0, 8, 8)))[0]["input_ids"]
    two = [next(iter(TrainLoader(rows, 32, 0, 8, 2, rank, 2))) for rank in range(2)]
    assert torch.equal(torch.cat([batch["input_ids"] for step in two for batch in step]), one)
    later = iter(TrainLoader(rows, 32, 0, 8, 8, position=8))
    both = iter(TrainLoader(rows, 32, 0, 8, 8, num_workers=1))
    next(both)
    assert torch.equal(next(both)[0]["input_ids"], next(later)[0]["input_ids"])


def test_a_curriculum_shortens_what_is_learnt(tmp_path):
    stages = "data.curriculum=[{length: 4, steps: 2}, {length: 8, steps: 1}]"
    trainer = build("s3", tmp_path, "train.tokens=8192", "data.source.options.start=1", stages)
    recipe, learnt = trainer.recipe, []
    steps = iter(trainer.rows.loader)
    whole = iter(TrainLoader(trainer.prepared.train, 32, recipe.seed, recipe.rows_per_step, 8))
    for _ in range(4):
        batches = next(steps)
        labels = torch.cat([batch["labels"] for batch in batches])
        learnt.append({int((row != -100).nonzero().max()) + 1 for row in labels})
        rows = torch.cat([batch["input_ids"] for batch in batches])
        assert torch.equal(rows, torch.cat([batch["input_ids"] for batch in next(whole)]))
    assert learnt == [{4}, {4}, {8}, {32}]


def test_a_curriculum_goes_on_where_it_stopped(tmp_path):
    options = ("train.tokens=6144", "checkpoint.every=2 steps", "checkpoint.keep_last=9", "name=run",
               "data.curriculum=[{length: 4, steps: 3}, {length: 8, steps: 2}]")  # fmt: skip
    straight = build("s3", tmp_path, *options).run()
    again = tmp_path / "again" / "run"
    shutil.copytree(tmp_path / "runs" / "run", again, symlinks=True)
    for step in (4, 6):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    resumed = build("s3", tmp_path, *options, f"train.runs_dir={again.parent}")
    assert resumed.position.step == 2
    assert fingerprint(resumed.run()) == fingerprint(straight)


def test_compression_trains_an_autoencoder(tmp_path):
    trainer = build("compression", tmp_path, "train.tokens=2048", "model.mixer.type=h_lru")
    assert isinstance(trainer.bare_model, LRNNForReconstruction)
    folder = trainer.run()
    again = LRNNForReconstruction.from_pretrained(folder).eval()
    x = torch.randint(0, 16, (2, 32))
    logits = again(x).logits
    assert torch.equal(logits, trainer.bare_model.eval()(x).logits)
    changed = x.clone()
    changed[:, 0] = (x[:, 0] + 1) % 16
    assert (again(changed).logits != logits).any(dim=-1).all(), "every position is written from the whole"
    with pytest.raises(ValueError, match="auto-encoder"):
        load_checkpoint(folder, "cpu")


@pytest.mark.parametrize(("name", "overrides", "message"), [
    ("parity", ["data.source.task=paritie"], "did you mean parity"),
    ("s5", ["model.vocab_size=60"], "too small for task s5, which has 120"),
    ("s5", ["data.source.options.modulus=3"], "no option"),
    ("s5", ["data.sequence_length=64"], "give one of them"),
    ("s5", ["data.source.task=null"], "needs a task"),
    ("s5", ["data.curriculum=[{length: 64, steps: 2}]"], "rows of 64 tokens"),
    ("s5", ["data.curriculum=[{length: 4, steps: 20000}]"], "no step would train on whole rows"),
    ("s5", ["data.source.options.start=1", "data.curriculum=[{length: 1, steps: 2}]"], "have no targets"),
    ("compression", ["data.curriculum=[{length: 4, steps: 2}]"], "is read whole"),
    ("parity", ["data.source.type=python-docs"], "belong to type 'synthetic'"),
    ("in-context-recall", ["data.source.length=33", "train.tokens_per_step=33", "train.tokens=33"], "even"),
])  # fmt: skip
def test_mistakes_leave_with_2(name, overrides, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["train", f"recipes/synthetic/{name}.yaml", *overrides])
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_prepare_and_info(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("prepare", "info"):
        with pytest.raises(SystemExit) as left:
            main([command, "recipes/synthetic/s5.yaml"])
        assert not left.value.code
    told = capsys.readouterr().out
    assert "120 symbols" in told
    assert "20,000" in told
