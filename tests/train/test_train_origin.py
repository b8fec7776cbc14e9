"""A run that begins from other weights (`model.init_from`), or as a branch of another run (`--from`)."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from rank_runs import Ranks
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_models import small_config, small_model
from test_train_resume import LAST
from tiny_run import fingerprint, losses, metrics, validations, write_recipe
from trainers import Build, main_exits, send_at

from lrnn_lm import LRNNForCausalLM
from lrnn_lm.recipe import Recipe, load_recipe
from lrnn_lm.runs.branch import differences
from lrnn_lm.runs.checkpoint import CheckpointError
from lrnn_lm.runs.export import export
from lrnn_lm.train.build import build_trainer
from lrnn_lm.train.init_from import load_weights
from lrnn_lm.train.stop import Stopped

ONE = "train.tokens=512"


def branch(recipe: Path, runs: Path, parent: Path, *overrides: str, name: str = "branch"):
    loaded = load_recipe(recipe, [f"train.runs_dir={runs}", f"name={name}", *overrides])
    return build_trainer(loaded, Console(quiet=True), from_checkpoint=parent)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal."""
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lrnn: ")]
    assert len(lines) == 1
    assert len(lines[0]) < 600
    return lines[0]


# Weights of another model ----------------------------------------------------------------------------


def test_a_new_run_begins_with_the_weights_and_nothing_else(
    build: Build, straight: Path, tmp_path: Path
) -> None:
    """Of a checkpoint, of an export and of a link; position, optimizer and other rates are the run's own."""
    export(straight / LAST, tmp_path / "exported")
    stored = load_file(straight / LAST / "model.safetensors")
    for number, source in enumerate((straight / "checkpoints/latest", tmp_path / "exported")):
        trainer = build(f"name=n{number}", f"model.init_from={source}", "optim.lr=0.001")
        assert trainer.position.step == trainer.position.samples == 0
        assert not trainer.optimizer.state
        for name, parameter in trainer.bare_model.named_parameters():
            assert torch.equal(parameter, stored[name]), name


def test_a_run_that_resumes_does_not_read_them_again(build: Build, straight: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(straight / LAST, source)
    options = ("name=tuned", f"model.init_from={source}", ONE)
    build(*options).run()
    shutil.rmtree(source)
    again = build(*options[:2], "train.tokens=1024")
    assert again.position.step == 1
    again.run()
    assert [step for step, _ in losses(again.folder)] == [1, 2]
    with pytest.raises(ValueError, match=r"model\.init_from: was '.*source', is None"):
        build("name=tuned")


def test_a_model_in_the_hubs_cache(
    build: Build, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub/models--some--model"
    export(straight / LAST, cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    weight = build("model.init_from=some/model").bare_model.lm_head.weight
    assert torch.equal(weight, load_file(straight / LAST / "model.safetensors")["lm_head.weight"])


def llama(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def integers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 8}}))


def without_a_weight(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, folder / "model.safetensors")
    shutil.rmtree(folder / "trainer")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / "trainer")


def flipped(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 255
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("change", "overrides", "words"),
    [
        (None, ("model.vocab_size=400",), "vocab_size is 320 there, 400 here"),
        (None, ("model.num_hidden_layers=3",), "num_hidden_layers is 2 there, 3 here"),
        (None, ("model.hidden_size=40",), "hidden_size is 32 there, 40 here"),
        (None, ("model.mixer.block_size=4",), "layer 0's mixer.block_size is 2 there, 4 here"),
        (None, ("model.mixer.gate=silu",), "layer 0's mixer.gate is 'softmax' there, 'silu' here"),
        (None, ("model.mixer={type: h_lru}",), "layer 0's mixer is bd_lru there, h_lru here"),
        (None, ("model.rms_norm_eps=0.1", "model.repeat=2"), "rms_norm_eps is 1e-06 there, 0.1 here; repeat"),
        (None, ("model.tie_word_embeddings=true",), "tie_word_embeddings is False there, True here"),
        (llama, (), "another family (model_type 'llama')"),
        (integers, (), "are integers; take the checkpoint that it was made of"),
        (without_a_weight, (), "model.norm.weight does not fit"),
        (without_weights, (), "there are no weights (.safetensors) in it"),
        (flipped, (), "model.safetensors is not as its checksum says"),
        (shutil.rmtree, (), "it cannot be fetched from the hub"),
    ],
)
def test_weights_that_do_not_fit(
    change, overrides: tuple[str, ...], words: str, recipe: Path, straight: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = tmp_path / "source"
    shutil.copytree(straight / LAST, source)
    if change is not None:
        change(source)
    runs = tmp_path / "runs"
    main_exits(2, "train", recipe, f"train.runs_dir={runs}", f"model.init_from={source}", *overrides)
    assert words in said(capsys)
    assert not runs.exists()


def test_a_tied_weight_that_is_stored_twice(tmp_path: Path) -> None:
    """As tools that join shards do: taken if both are the same."""
    small_model("bd_lru", tie_word_embeddings=True).save_pretrained(tmp_path)
    other = LRNNForCausalLM(small_config("bd_lru", tie_word_embeddings=True))
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    load_weights(tmp_path, other)
    assert all(torch.equal(p, stored[name]) for name, p in other.named_parameters())
    stored["lm_head.weight"] += 1
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight does not fit"):
        load_weights(tmp_path, other)


def test_another_tokenizer_of_the_same_size(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, documents=300)
    main_exits(2, "train", recipe, f"model.init_from={straight / LAST}")
    assert "is not the one that made the shards" in said(capsys)


def test_every_rank_of_a_sharded_run_begins_with_them(recipe: Path, straight: Path, tmp_path: Path) -> None:
    options = (f"train.runs_dir={tmp_path}", f"model.init_from={straight / LAST}", "train.tokens=512")
    Ranks(recipe, 2, *options, parallel="fsdp2", record=tmp_path / "seen").expect()
    held = load_file(tmp_path / "seen/held-00000000.safetensors")
    for name, value in load_file(straight / LAST / "model.safetensors").items():
        assert torch.equal(held[f"model/{name}"], value), name


# A branch --------------------------------------------------------------------------------------------


@pytest.fixture
def parent(straight: Path) -> Path:
    return straight / "checkpoints/step-00000008"


def test_a_branch_of_the_same_recipe_is_the_run_itself(recipe: Path, tmp_path: Path, parent: Path) -> None:
    """Interrupted before and after its first checkpoint, and resumed with and without --from."""
    killed = branch(recipe, tmp_path, parent)
    assert killed.position.step == 8
    killed.step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        killed.run()
    loaded = load_recipe(recipe, [f"train.runs_dir={tmp_path}", "name=branch"])
    stopped = build_trainer(loaded, Console(quiet=True))
    assert stopped.position.step == 8
    send_at(stopped, 10, signal.SIGTERM)
    with pytest.raises(Stopped):
        stopped.run()
    last = branch(recipe, tmp_path, parent)
    assert last.position.step == 10
    last.run()
    straight = parent.parents[1]
    assert losses(last.folder) == losses(straight)[8:]
    assert validations(last.folder) == [line for line in validations(straight) if line[0] > 8]
    assert fingerprint(last.folder / LAST) == fingerprint(straight / LAST)
    facts = json.loads((last.folder / "parent.json").read_text())
    assert (facts["step"], facts["run"], facts["checkpoint"]) == (8, "tiny", str(parent.resolve()))


def test_a_cool_down_with_another_schedule_and_budget(recipe: Path, tmp_path: Path, parent: Path) -> None:
    main_exits(
        0, "train", recipe, "--from", parent, f"train.runs_dir={tmp_path}", "name=cool", "optim.schedule=wsd",
        "optim.warmup=0", "optim.decay=4 steps", "train.tokens=6144", "optim.final_lr=0", "optim.lr=0.02",
    )  # fmt: skip
    lines = [line for line in metrics(tmp_path / "cool") if "lr" in line]
    assert [line["step"] for line in lines] == [9, 10, 11, 12]
    assert [line["lr"] for line in lines] == pytest.approx([0.015, 0.01, 0.005, 0.0])
    card = (tmp_path / "cool/README.md").read_text()
    assert "| branch of | step 8 of tiny" in card
    assert not (tmp_path / "cool/metrics-1.jsonl").exists()


def test_a_branch_of_a_checkpoint_that_a_link_names(recipe: Path, tmp_path: Path, straight: Path) -> None:
    """The parent goes on meanwhile, and its link moves: the branch keeps what it began from."""
    run = tmp_path / "tiny"
    shutil.copytree(straight, run, symlinks=True)
    shutil.move(run / LAST, tmp_path / "later")
    latest = run / "checkpoints/latest"
    latest.unlink()
    latest.symlink_to("step-00000008")
    branch(recipe, tmp_path, latest, "train.tokens=4608").run()
    shutil.move(tmp_path / "later", run / LAST)
    latest.unlink()
    latest.symlink_to("step-00000012")
    assert branch(recipe, tmp_path, latest).position.step == 9


@pytest.mark.parametrize("saved", [False, True])
def test_a_branch_goes_on_where_it_was_moved_with_its_parent(
    saved: bool, recipe: Path, tmp_path: Path, straight: Path
) -> None:
    """To another folder or machine, where `--from` names the parent by another path."""
    (tmp_path / "old").mkdir()
    parent = shutil.copytree(straight, tmp_path / "old/tiny") / "checkpoints/step-00000008"
    begun = branch(recipe, tmp_path / "old", parent, "train.tokens=4608")
    if saved:
        begun.run()
    begun.lock.close()
    (tmp_path / "old").rename(tmp_path / "new")
    moved = tmp_path / "new/tiny/checkpoints/step-00000008"
    assert branch(recipe, tmp_path / "new", moved, "train.tokens=4608").position.step == 8 + saved


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            "[bd_lru, {type: attention, num_heads: 2, window: 4}]",
            "model.layer_pattern[1].window: was 8, is 4",
        ),
        ("[bd_lru]", "model.layer_pattern: was ['bd_lru', 'attention'], is ['bd_lru']"),
        ("null", "model.layer_pattern: was ['bd_lru', 'attention'], is None"),
    ],
)
def test_layer_patterns_differ_in_few_words(changed: str, words: str, recipe: Path) -> None:
    pattern = "[bd_lru, {type: attention, num_heads: 2, window: 8}]"
    old, new = (load_recipe(recipe, [f"model.layer_pattern={each}"]) for each in (pattern, changed))
    assert differences(old, new, step=1)[0] == words
    assert differences(new, old, step=1)[0] == re.sub("was (.*), is (.*)", r"was \2, is \1", words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.hidden_size=40",), "model.hidden_size: was 32, is 40"),
        (("seed=1",), "seed: was 0, is 1"),
        (("data.validation_fraction=0.2",), "data.validation_fraction: was 0.1, is 0.2"),
        (("train.tokens_per_step=1024",), "train.tokens_per_step: was 512, is 1024"),
        (("optim.name=muon",), "optim.name: was 'adamw', is 'muon'"),
        (("optim.betas=[0.9, 0.99]",), "optim.betas: was [0.9, 0.95], is [0.9, 0.99]"),
        (("train.tokens=4096",), "at step 8 and train.tokens pays for 8 steps"),
        (("model.init_from=other",), "--from takes the weights of"),
    ],
)
def test_a_recipe_that_cannot_go_on(
    overrides: tuple[str, ...], words: str, recipe: Path, tmp_path: Path, parent: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    runs = tmp_path / "runs"
    main_exits(2, "train", recipe, "--from", parent, f"train.runs_dir={runs}", "name=branch", *overrides)
    assert words in said(capsys)
    assert not runs.exists()


def test_a_submitted_branch_needs_no_from_in_its_job(
    recipe: Path, tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    options = (f"train.runs_dir={tmp_path}", "name=job", "train.tokens=4608")
    main_exits(0, "submit", recipe, "--from", parent, *options)
    main_exits(0, "train", tmp_path / "job/launch/recipe.yaml")
    assert [step for step, _ in losses(tmp_path / "job")] == [9]


def test_what_is_no_parent(
    recipe: Path, build: Build, tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(parent: Path, *overrides: str) -> str:
        main_exits(2, "train", recipe, "--from", parent, f"train.runs_dir={tmp_path}", *overrides)
        return said(capsys)

    assert "no such checkpoint folder" in refused(tmp_path / "none")
    assert "did you mean" in refused(straight)
    export(straight / LAST, tmp_path / "exported")
    assert "is no checkpoint in a run's folder" in refused(tmp_path / "exported")
    shutil.copytree(straight, tmp_path / "damaged", symlinks=True)
    (tmp_path / "damaged/checkpoints/step-00000008/trainer/state.json").write_text("{}")
    assert "cannot be used (trainer/state.json" in refused(tmp_path / "damaged/checkpoints/step-00000008")
    build("name=own", ONE).run()
    parent = straight / "checkpoints/step-00000008"
    assert "has begun without --from" in refused(parent, "name=own")
    branch(recipe, tmp_path, parent, "train.tokens=4608").run()
    assert "is a branch of" in refused(straight / LAST, "name=branch")
    moving = shutil.copytree(straight, tmp_path / "moving", symlinks=True) / "checkpoints/step-00000008"
    branch(recipe, tmp_path, moving, name="follows")
    shutil.rmtree(moving)
    shutil.copytree(straight / LAST, moving)  # sound, and another
    assert "has changed since this branch began" in refused(moving, "name=follows")


def test_a_branch_may_read_other_stages_after_what_was_read(recipe: Path) -> None:
    """A cool-down on other data: weights and stages are the parent's only up to the checkpoint."""
    sources = "data.sources=[{type: jsonl, path: a, name: a}, {type: jsonl, path: b, name: b, weight: 3}]"

    def staged(first: int, weights: str) -> Recipe:
        return load_recipe(recipe, [sources, f"data.stages=[{{tokens: {first}}}, {{weights: {weights}}}]"])

    old = staged(4096, "{a: 1}")
    assert differences(old, staged(4096, "{b: 1}"), 8, branch=True) == []
    assert [line.split(":")[0] for line in differences(old, staged(4096, "{b: 1}"), 9)] == ["data.stages"]
    assert [line.split(":")[0] for line in differences(old, staged(2048, "{a: 1}"), 8)] == ["data.stages"]
    old, new = staged(3072, "{b: 1}"), staged(3584, "{b: 1}")
    assert differences(old, new, 5) == []
    old.data.rows_in_order = new.data.rows_in_order = 4  # the stretches of steps 4 to 7 are drawn at step 4
    assert [line.split(":")[0] for line in differences(old, new, 5)] == ["data.stages"]
