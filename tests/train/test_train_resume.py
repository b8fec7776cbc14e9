"""Stopped and resumed equals straight through, bit for bit; how signals end a run; finished runs."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rank_runs import Forked
from rich.console import Console
from tiny_run import LAST, STEPS, assert_same_run, fingerprint, losses, metrics, validations, write_recipe
from trainers import Build, main_exits, send_at

from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import build_trainer, prepare_data
from lrnn_lm.train.loop import Trainer
from lrnn_lm.train.stop import Stopped, StopSignal


def record_tokens(trainer: Trainer, seen: dict[int, str]) -> None:
    """sha256 of the token ids of every step."""
    original = trainer.step

    def wrapped(batches: list, *rest: object) -> object:
        seen[trainer.position.step + 1] = digest(batches)
        return original(batches, *rest)

    trainer.step = wrapped


def digest(batches: list[dict[str, torch.Tensor]]) -> str:
    return hashlib.sha256(b"".join(batch["input_ids"].numpy().tobytes() for batch in batches)).hexdigest()


def test_the_undisturbed_run(straight: Path) -> None:
    assert [step for step, _ in losses(straight)] == list(range(1, STEPS + 1))
    assert [step for step, _ in validations(straight)] == [5, 10, STEPS]
    names = sorted(p.name for p in (straight / "checkpoints").iterdir())
    assert names == ["best", "latest", "step-00000008", "step-00000012"]
    assert os.readlink(straight / "checkpoints/latest") == "step-00000012"


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_and_resumed_is_straight_through(build: Build, straight: Path, workers: int) -> None:
    whole, parts = {}, {}
    undisturbed = build("name=whole")
    for step, batches in zip(range(1, STEPS + 1), undisturbed.rows.loader, strict=False):
        whole[step] = digest(batches)
    first = build(f"data.num_workers={workers}")
    record_tokens(first, parts)
    send_at(first, 5, signal.SIGTERM)
    with pytest.raises(Stopped, match=r"SIGTERM after step 5 of 12; saved .*step-00000005"):
        first.run()
    second = build(f"data.num_workers={workers}")
    assert second.position.step == 5
    record_tokens(second, parts)
    second.run()
    assert_same_run(second.folder, straight)
    assert parts == whole


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def bf16_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where trainers are under bf16 autocast. A recipe has that on a GPU only; a CPU's stands in for it."""

    def accelerator(*_: object) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)  # a process keeps its first precision
        return Accelerator(cpu=True, mixed_precision="bf16")

    if request.param == "cpu":
        monkeypatch.setattr("lrnn_lm.train.build.make_accelerator", accelerator)
    yield request.param
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_in_bf16_and_compiled(build: Build, bf16_device: str) -> None:
    """A hybrid under autocast, its blocks compiled: what is resumed has compiled anew."""
    plain = (
        "model.layer_pattern=[bd_lru, attention]", "train.tokens=3072", "eval.every=3 steps",
        f"train.device={bf16_device}",
    )  # fmt: skip
    overrides = ("train.compile=true", *plain)
    eager = build("name=eager", *plain)
    eager.run()
    torch.compiler.reset()
    whole = build("name=whole", *overrides)
    whole.run()
    assert losses(whole.folder) != losses(eager.folder), "nothing was compiled"
    first = build(*overrides)
    send_at(first, 4, signal.SIGTERM)
    with pytest.raises(Stopped):
        first.run()
    torch.compiler.reset()
    second = build(*overrides)
    assert second.position.step == 4
    second.run()
    last = "checkpoints/step-00000006"
    assert losses(second.folder) == losses(whole.folder)
    assert validations(second.folder) == validations(whole.folder)
    assert fingerprint(second.folder / last) == fingerprint(whole.folder / last)


@pytest.mark.parametrize(
    ("number", "validating"), [(signal.SIGTERM, True), (signal.SIGUSR1, False), (signal.SIGHUP, False)]
)
def test_a_signal_saves_at_that_step_and_exits_85(
    build: Build, straight: Path, number: signal.Signals, validating: bool
) -> None:
    trainer = build()
    send_at(trainer, 10, number, validating)
    with pytest.raises(SystemExit) as stopped:
        trainer.run()
    assert stopped.value.code == 85
    assert (trainer.folder / "checkpoints/step-00000010").is_dir()
    assert signal.getsignal(number) == signal.SIG_DFL
    resumed = build()
    resumed.run()
    assert_same_run(resumed.folder, straight)


def test_a_run_that_is_at_its_end_already_does_nothing(build: Build) -> None:
    """It is neither validated nor saved again."""
    last = build("train.tokens=512").run()
    lines, before = metrics(last.parents[1]), {path: path.stat().st_ino for path in last.rglob("*")}
    build("train.tokens=512").run()
    assert metrics(last.parents[1]) == lines
    assert {path: path.stat().st_ino for path in last.rglob("*")} == before


def test_killed_after_a_validation_that_was_redone(build: Build, straight: Path) -> None:
    """Stopped within the validation of step 5, resumed, and killed right after that: no line stands twice."""
    first = build()
    send_at(first, 5, signal.SIGTERM, validating=True)
    with pytest.raises(Stopped):
        first.run()
    second = build()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    second.step = die
    with pytest.raises(KeyboardInterrupt):
        second.run()
    assert [step for step, _ in validations(second.folder)] == [5]
    third = build()
    third.run()
    assert_same_run(third.folder, straight)


def test_a_torn_line_and_lines_of_the_future_are_cut(build: Build, straight: Path) -> None:
    trainer = build()
    send_at(trainer, 6, signal.SIGTERM)
    with pytest.raises(Stopped):
        trainer.run()
    with (trainer.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    resumed = build()
    resumed.run()
    assert_same_run(resumed.folder, straight)


def test_a_finished_run_is_left_as_it_is(
    build: Build, recipe: Path, tmp_path: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(straight, tmp_path / "tiny", symlinks=True)
    before = fingerprint(tmp_path / "tiny" / LAST), metrics(tmp_path / "tiny")
    main_exits(0, "train", recipe, f"train.runs_dir={tmp_path}")
    said = capsys.readouterr()
    assert "tiny was trained already: 12 steps" in said.out
    assert "settings" not in said.out
    main_exits(0, "train", recipe, f"train.runs_dir={tmp_path}", "optim.lr=0.02", "train.micro_batch=4")
    told = "with other settings (optim.lr: was 0.01, is 0.02): give this run another name=.."
    assert told in capsys.readouterr().out, "else someone takes the old numbers for those of the new rate"
    assert (fingerprint(tmp_path / "tiny" / LAST), metrics(tmp_path / "tiny")) == before


def test_a_larger_budget_goes_on(build: Build, tmp_path: Path) -> None:
    build("train.tokens=2048", "optim.schedule=constant").run()
    longer = build("train.tokens=4096", "optim.schedule=constant")
    assert longer.position.step == 4
    longer.run()
    whole = build("train.tokens=4096", "optim.schedule=constant", "name=whole")
    whole.run()
    assert losses(longer.folder) == losses(whole.folder)
    model = "checkpoints/step-00000008/model.safetensors"
    assert (longer.folder / model).read_bytes() == (whole.folder / model).read_bytes()


@pytest.mark.parametrize("more", ["one more document", "quite other words, zebra xylophone " * 400])
def test_a_text_that_changed_under_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str
) -> None:
    """Told as such also where the tokenizer that is trained on it has changed with it."""
    recipe = write_recipe(tmp_path)
    main_exits(0, "train", recipe, "train.tokens=512")
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write(json.dumps({"text": more}) + "\n")
    capsys.readouterr()
    main_exits(2, "train", recipe, "train.tokens=1024")
    said = capsys.readouterr().err
    assert "text.jsonl or" in said
    assert "has changed since. Give this run another name=.., or put the text back." in said


def test_other_shards_are_told_as_such(build: Build) -> None:
    """Their hashes are others; it was told that the text had changed."""
    build("train.tokens=512").run()
    with pytest.raises(ValueError, match=r"data\.shard_tokens: was '100M', is '2K'"):
        build("train.tokens=1024", "data.shard_tokens=2K")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_in_data_preparation_leaves_nothing_half_made(
    tmp_path: Path, number: signal.Signals
) -> None:
    recipe = write_recipe(tmp_path, documents=4000)
    process = Forked(recipe, "train.tokens=512")
    while not list((tmp_path / "cache/data").glob(".building-*")):
        assert process.runs()
        time.sleep(0.01)
    process.send_signal(number)
    code, errors = process.finish()
    assert code == 85, errors
    assert errors.splitlines()[-1] == f"stopped by {number.name}; run the same command again to resume"
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob(".building-*"))


class Finalised:
    """Gets a signal where Python drops every exception."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_python_drops_is_not_lost(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*arguments: object, **options: object) -> object:
        prepared = prepare_data(*arguments, **options)
        Finalised()
        return prepared

    monkeypatch.setattr("lrnn_lm.train.build.prepare_data", prepare)
    loaded = load_recipe(recipe, [f"train.runs_dir={tmp_path}"])
    with StopSignal() as stop, pytest.raises(Stopped, match="stopped by SIGTERM"):
        build_trainer(loaded, Console(quiet=True), stop)


def test_two_processes_do_not_train_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    process = Forked(recipe, "train.tokens=10M")
    while not (tmp_path / "runs/tiny/metrics.jsonl").exists():
        assert process.runs()
        time.sleep(0.05)
    main_exits(2, "train", recipe, "train.tokens=10M")
    assert "another process is training" in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    assert process.finish()[0] == -signal.SIGKILL
    main_exits(0, "train", recipe, "train.tokens=512")


def test_a_second_interrupt_quits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class QuitError(Exception):
        pass

    def quit_now(code: int) -> None:
        assert code == 130
        raise QuitError

    monkeypatch.setattr(os, "_exit", quit_now)
    with StopSignal() as stop, stop.held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(QuitError):
            signal.raise_signal(signal.SIGINT)


def test_muon_stopped_and_resumed_is_straight_through(build: Build) -> None:
    straight = build("optim.name=muon", "name=straight")
    straight.run()
    first = build("optim.name=muon", "name=parts")
    send_at(first, 5, signal.SIGTERM)
    with pytest.raises(Stopped):
        first.run()
    build("optim.name=muon", "name=parts").run()
    runs = straight.folder.parent
    assert losses(runs / "parts") == losses(runs / "straight")
    assert fingerprint(runs / "parts" / LAST) == fingerprint(runs / "straight" / LAST)


def test_random_numbers_go_on_where_they_were(build: Build) -> None:
    """Nothing in training draws any, so equal runs do not show it."""
    short = ("train.tokens=512", "optim.schedule=constant")
    first = build(*short)
    torch.rand(3), np.random.rand(), random.random()
    first.run()
    want = [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]
    build(*short)
    assert [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()] == want
