"""`train.average`: the moving average of the weights is right, validated, saved, resumed and exported."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from rank_runs import Forked, Prank, Ranks
from rich.console import Console
from safetensors.torch import load_file
from test_train_resume import LAST, assert_same_run
from tiny_run import STEPS, TOKENS_PER_STEP, losses, metrics, sha256, validations
from torch import Tensor
from trainers import Build, main_exits, send_at
from transformers import AutoModelForCausalLM

from lrnn_lm import api
from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import build_trainer
from lrnn_lm.train.loop import Trainer
from lrnn_lm.train.stop import Stopped
from lrnn_lm.train.tensors import read_shards

ON = "train.average={decay: 0.9, every: 2, start: 4 steps}"
STORED = f"{LAST}/trainer/average.safetensors"


def by_hand(trainer: Trainer, every: int = 2, start: int = 4) -> list[Tensor]:
    """The average of the first parameter after each step, from its definition; filled while it trains."""
    step, averages = trainer._train_step, []
    begun = next(trainer.bare_model.parameters()).detach().clone()

    def wrapped() -> object:
        result = step()
        weight, at = next(trainer.bare_model.parameters()).detach(), trainer.position.step
        if at <= start:
            averages.append(weight.clone())
        else:
            before = averages[-1] if averages else begun
            averages.append(before if at % every else 0.9 * before + 0.1 * weight)
        return result

    trainer._train_step = wrapped
    return averages


@pytest.fixture(scope="module")
def averaged(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the undisturbed run with an average. Not to be changed."""
    runs = tmp_path_factory.mktemp("averaged")
    main_exits(0, "train", recipe, f"train.runs_dir={runs}", ON)
    return runs / "tiny"


def test_the_average_is_what_its_definition_says(build: Build, averaged: Path, straight: Path) -> None:
    trainer = build(ON)
    averages = by_hand(trainer)
    trainer.run()
    name, _ = next(trainer.bare_model.named_parameters())
    torch.testing.assert_close(trainer.average.values[name], averages[-1])
    assert sha256(trainer.folder / STORED) == sha256(averaged / STORED)
    assert losses(averaged) == losses(straight)  # it changes nothing else
    assert validations(averaged) == validations(straight)


@pytest.mark.parametrize(("every", "start"), [(1, 0), (2, 3), (3, 4), (5, 3), (20, 7)])
def test_a_start_between_two_updates(build: Build, every: int, start: int) -> None:
    """Up to `start` the average is the weights, whichever step updates it next."""
    average = f"train.average={{decay: 0.9, every: {every}, start: {start} steps}}"
    trainer = build(average, f"train.tokens={8 * TOKENS_PER_STEP}")
    averages, found = by_hand(trainer, every, start), []
    update = trainer.average.update
    name, _ = next(trainer.bare_model.named_parameters())
    trainer.average.update = lambda at: (update(at), found.append(trainer.average.values[name].clone()))
    trainer.run()
    for got, want in zip(found, averages, strict=True):
        torch.testing.assert_close(got, want)


def test_it_is_validated_beside_the_weights(averaged: Path, build: Build) -> None:
    """The last line has the loss of the averages, as a run that begins with them measures it."""
    line = [line for line in metrics(averaged) if "validation_loss" in line][-1]
    assert line["step"] == STEPS
    assert line["average_validation_loss"] > 0
    still = ("train.tokens=512", "optim.lr=1e-30", "optim.final_lr=0")
    other = build("name=other", f"model.init_from={averaged / 'average'}", *still)
    other.run()
    got = [line for line in metrics(other.folder) if "validation_loss" in line][-1]
    assert line["average_validation_loss"] == pytest.approx(got["validation_loss"], abs=1e-6)
    assert line["average_bits_per_byte"] == pytest.approx(got["bits_per_byte"], abs=1e-6)
    assert line["average_validation_loss"] != line["validation_loss"]


@pytest.mark.parametrize("validating", [False, True])
def test_stopped_and_resumed_is_straight_through(build: Build, averaged: Path, validating: bool) -> None:
    """Also within the validation of the averages: what is saved are the weights."""
    first = build(ON)
    if validating:
        measure = first.validator._measure
        calls = []

        def wrapped(between: object) -> object:
            calls.append(first.position.step)
            if len(calls) == 2:  # of the averages, after step 5
                signal.raise_signal(signal.SIGTERM)
            return measure(between)

        first.validator._measure = wrapped
    else:
        send_at(first, 6, signal.SIGTERM)
    with pytest.raises(Stopped):
        first.run()
    second = build(ON)
    assert second.position.step == (5 if validating else 6)
    second.run()
    assert_same_run(second.folder, averaged)
    assert sha256(second.folder / STORED) == sha256(averaged / STORED)


def test_two_sharded_ranks(recipe: Path, tmp_path: Path, averaged: Path, build: Build) -> None:
    """Under FSDP2: stopped, resumed from a copy elsewhere, exported; the averages of one process. A new run
    begins with the weights of its shards, or goes on from them, in one process."""
    there = tmp_path / "there"
    options = (f"train.runs_dir={tmp_path}", ON, "name=sharded", f"checkpoint.copy_to={there}")
    prank = Prank(rank=1, step=6, signal=signal.SIGTERM)
    Ranks(recipe, 2, *options, parallel="fsdp2", prank=prank).expect(85)
    run, out = tmp_path / "sharded", tmp_path / "out"
    shutil.rmtree(run)
    said = Ranks(recipe, 2, *options, parallel="fsdp2").expect()
    assert f"fetched {there}/sharded/checkpoints/step-00000006" in said
    assert [step for step, _ in losses(run)] == [*range(1, STEPS + 1)]
    assert (there / "sharded/README.md").is_file()
    main_exits(0, "export", run / "checkpoints/latest", out, "--average")
    want = load_file(averaged / "average/model.safetensors")
    got = load_file(out / "model.safetensors")
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=2e-3), name
    assert sha256(out / "model.safetensors") == sha256(run / "average/model.safetensors")
    saved = run / "checkpoints/step-00000008"
    fresh, stored = build("name=fresh", f"model.init_from={saved}"), read_shards(saved)
    loaded = load_recipe(recipe, [f"train.runs_dir={tmp_path}", ON, "name=branch"])
    branch = build_trainer(loaded, Console(quiet=True), from_checkpoint=saved)
    assert (fresh.position.step, branch.position.step) == (0, 8)
    for trainer in (fresh, branch):
        for name, parameter in trainer.bare_model.named_parameters():
            assert torch.equal(parameter, stored[name]), name
    for name, value in read_shards(saved, "average").items():
        assert torch.equal(branch.average.values[name], value), name
    of_one, of_two = (
        [x["average_validation_loss"] for x in metrics(f) if "average_validation_loss" in x]
        for f in (averaged, run)
    )
    assert of_two == pytest.approx(of_one, abs=1e-4)


def test_exported_on_request_and_at_the_end(averaged: Path, straight: Path, tmp_path: Path) -> None:
    main_exits(0, "export", averaged / LAST, tmp_path / "out", "--average")
    stored = load_file(averaged / STORED)
    for folder in (tmp_path / "out", averaged / "average"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, stored[name]), name
    main_exits(2, "export", straight / LAST, tmp_path / "none", "--average")
    assert not (tmp_path / "none").exists()


def test_a_longer_run_that_was_stopped_in_its_last_step_replaces_that_of_the_shorter(recipe: Path) -> None:
    """What a job does that is requeued between the end of training and its export."""
    options = ("name=longer", "train.average={decay: 0.9}")
    Ranks(recipe, 1, *options, "train.tokens=1024").expect()
    options = (*options, "train.tokens=2048")
    Ranks(recipe, 1, *options, prank=Prank(step=4, signal=signal.SIGTERM)).expect(85)
    Ranks(recipe, 1, *options).expect()
    run = recipe.parent / "runs/longer"
    stored = load_file(run / "checkpoints/step-00000004/trainer/average.safetensors")
    exported = load_file(run / "average/model.safetensors")
    assert all(torch.equal(stored[name], exported[name]) for name in exported)


def test_a_longer_run_without_it_keeps_nothing_of_the_shorter(recipe: Path, tmp_path: Path) -> None:
    """Nor what an export left that was killed."""
    options = (f"train.runs_dir={tmp_path}", "eval.tasks=[]")
    main_exits(0, "train", recipe, *options, "train.average={decay: 0.9}", "train.tokens=512")
    assert (tmp_path / "tiny/average/model.safetensors").exists()
    (tmp_path / "tiny/.average.4711.tmp").mkdir()
    main_exits(0, "train", recipe, *options, "train.tokens=1024")
    assert [path for path in (tmp_path / "tiny").iterdir() if "average" in path.name] == []


def test_no_other_process_trains_a_run_that_is_being_exported(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or scored: it might remove the checkpoint under it."""
    options = (f"train.runs_dir={tmp_path}", "train.average={decay: 0.9}", "train.tokens=512")
    others = []
    monkeypatch.setattr(
        api, "export_checkpoint", lambda *_, **__: others.append(Forked(recipe, *options).finish())
    )
    main_exits(0, "train", recipe, *options)
    ((code, said),) = others
    assert (code, "another process is training" in said) == (2, True)
    assert Forked(recipe, *options).finish()[0] == 0


def test_turned_on_for_a_run_that_is_trained(recipe: Path, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "tiny", symlinks=True)
    main_exits(0, "train", recipe, f"train.runs_dir={tmp_path}", ON)
    assert not (tmp_path / "tiny/average").exists()


def test_turned_on_by_sharded_ranks_that_resume(recipe: Path, tmp_path: Path, build: Build) -> None:
    """They begin at the weights of the checkpoint, as one process does."""
    parts = ("optim.schedule=constant", "eval.every=2 steps")
    build("train.tokens=1024", *parts).run()
    shutil.copytree(tmp_path / "tiny", tmp_path / "ranks/tiny", symlinks=True)
    on = (*parts, "train.tokens=2048", "train.average={decay: 0.5, start: 3 steps}")
    build(*on).run()
    Ranks(recipe, 2, f"train.runs_dir={tmp_path / 'ranks'}", *on, parallel="fsdp2").expect()
    one, two = (metrics(folder / "tiny")[-1] for folder in (tmp_path, tmp_path / "ranks"))
    assert two["average_validation_loss"] == pytest.approx(one["average_validation_loss"], abs=1e-4)


def test_turned_on_and_off_by_a_run_that_resumes(build: Build) -> None:
    build("train.tokens=1024", "optim.schedule=constant").run()
    on = build("train.tokens=2048", "optim.schedule=constant", "train.average={decay: 0.5}")
    for name, parameter in on.bare_model.named_parameters():
        assert torch.equal(on.average.values[name], parameter), name  # it begins at the weights
    on.run()
    assert not torch.equal(next(iter(on.average.values.values())), next(on.bare_model.parameters()))
    off = build("train.tokens=3072", "optim.schedule=constant")
    off.run()
    assert not (off.folder / "checkpoints/step-00000006/trainer/average.safetensors").exists()


def test_a_run_of_an_older_version_without_an_update_goes_on(build: Build, monkeypatch) -> None:
    """What ends with its initial weights as the average is refused only where a run begins."""
    with monkeypatch.context() as older:
        older.setattr("lrnn_lm.train.build.check_updated", lambda recipe: None)
        build("train.average={every: 3}", "train.tokens=1024", "optim.schedule=constant").run()
    assert build("train.average={every: 3}", "train.tokens=1024", "optim.schedule=constant").finished
    more = build("train.average={every: 3}", "train.tokens=2048", "optim.schedule=constant")
    assert (more.first_step, more.recipe.total_steps) == (2, 4)
