"""Run folders that were copied, purged or lie where there are no links; manifests that say too little."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import LAST, STEPS, fingerprint, losses, metrics
from trainers import Build, main_exits, send_at

from lrnn_lm.evaluate.reporting.runs import read_run
from lrnn_lm.launch.submit import _finished
from lrnn_lm.recipe import load_recipe
from lrnn_lm.runs import checkpoint
from lrnn_lm.runs.checkpoint import CheckpointError
from lrnn_lm.runs.layout import checkpoint_folder, latest_checkpoint
from lrnn_lm.runs.load import describe
from lrnn_lm.train.build import build_trainer
from lrnn_lm.train.stop import Stopped

LINKS = ("latest", "best")


@pytest.fixture
def stopped(stopped_run: Callable[..., Path], tmp_path: Path) -> Path:
    """A run stopped after step 10, with checkpoints 8 and 10."""
    return Path(shutil.copytree(stopped_run("eval.every=2 steps"), tmp_path / "tiny", symlinks=True))


def follow_links(run: Path) -> None:
    """What `cp -rL` makes of it."""
    for link in LINKS:
        path = run / "checkpoints" / link
        target = path.resolve()
        path.unlink()
        shutil.copytree(target, path)


def step_names(run: Path) -> list[str]:
    return [folder.name for folder in checkpoint.list_checkpoints(run / "checkpoints")]


def test_a_run_without_its_recipe_does_not_go_on(build: Build, stopped: Path) -> None:
    """Nothing else tells its seed and which rows it has read."""
    stored = stopped / "recipe.yaml"
    kept = stored.read_text()
    stored.unlink()
    with pytest.raises(ValueError, match="is gone, so nothing tells"):
        build("seed=5")
    stored.write_text(kept)
    torn = stopped / "metrics.jsonl"
    torn.write_bytes(torn.read_bytes() + b"\xff\xfe\0")
    build("eval.every=2 steps").run()


# Copies -----------------------------------------------------------------------------------------------


def test_a_copy_that_followed_the_links_goes_on(build: Build, stopped: Path, straight: Path) -> None:
    follow_links(stopped)
    resumed = build()
    assert resumed.position.step == 10
    assert all((stopped / "checkpoints" / link).is_symlink() for link in LINKS)
    resumed.run()
    assert fingerprint(stopped / LAST) == fingerprint(straight / LAST)
    assert losses(stopped) == losses(straight)
    assert not list((stopped / "checkpoints").glob(".*.tmp"))


def test_text_and_tokenizer_at_another_path(
    recipe: Path, build: Build, stopped: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine, or spelled otherwise: what was read is known by its hash."""
    stored = stopped / "recipe.yaml"
    kept = stored.read_text()
    stored.write_text(kept.replace(str(recipe.parent), "/where/it/was"))
    for name in ("text.jsonl", "tokenizer.yaml"):
        shutil.copy(recipe.parent / name, tmp_path)
    monkeypatch.setenv("WHERE", str(tmp_path))
    here = ("data.source.path=$WHERE/text.jsonl", "data.tokenizer=${WHERE}/tokenizer.yaml")
    with (tmp_path / "other.jsonl").open("w") as other:
        other.write((tmp_path / "text.jsonl").read_text().replace("a", "i"))
    with pytest.raises(ValueError, match="was trained on other text"):
        build(f"data.source.path={tmp_path}/other.jsonl", here[1])
    build(*here).run()
    assert fingerprint(stopped / LAST) == fingerprint(straight / LAST)
    assert losses(stopped) == losses(straight)

    more = ("train.tokens=1M", "optim.schedule=constant")
    monkeypatch.chdir(tmp_path)
    build(*more, "data.source.path=./text.jsonl", f"data.tokenizer={tmp_path}/./tokenizer.yaml")
    with pytest.raises(ValueError, match=r"data\.source\.path: was './text\.jsonl', is .*/text\.jsonl"):
        build(*more)


def test_the_case_as_it_was_reported(
    recipe: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run, copied with `cp -rL`, and trained for longer."""
    run = Path(shutil.copytree(straight, tmp_path / "moved/tiny"))
    assert not (run / "checkpoints/latest").is_symlink()
    more = ("train.tokens=7168", f"train.runs_dir={run.parent}")
    main_exits(0, "train", recipe, *more)
    assert "resuming from step 12 of 14" in capsys.readouterr().err
    assert os.readlink(run / "checkpoints/latest") == "step-00000014"


@pytest.mark.parametrize("lost", ["gone", "damaged"])
def test_a_copy_takes_the_place_of_its_lost_checkpoint(build: Build, stopped: Path, lost: str) -> None:
    follow_links(stopped)
    for folder in checkpoint.list_checkpoints(stopped / "checkpoints"):
        if lost == "gone":
            shutil.rmtree(folder)
        else:
            (folder / "trainer/state.json").unlink()
    assert build().position.step == 10
    assert os.readlink(stopped / "checkpoints/latest") == "step-00000010"
    assert checkpoint.verify(stopped / "checkpoints/step-00000010") is None


def test_a_damaged_copy_is_dropped(build: Build, stopped: Path) -> None:
    follow_links(stopped)
    for link in LINKS:
        shutil.rmtree(stopped / "checkpoints" / link / "trainer")
    assert build().position.step == 10
    assert (stopped / "checkpoints/latest").is_symlink()


def test_a_copy_is_read_before_it_is_trained(stopped: Path) -> None:
    follow_links(stopped)
    assert latest_checkpoint(stopped / "checkpoints").name == "step-00000010"
    assert describe(stopped / "checkpoints/latest").run == stopped.resolve()
    assert read_run(stopped).parameters


# No links ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(os, "symlink", refuse)


@pytest.mark.usefixtures("no_links")
def test_a_file_system_without_links(build: Build, straight: Path) -> None:
    trainer = build()
    send_at(trainer, 10, signal.SIGTERM)
    with pytest.raises(Stopped, match=r"saved .*step-00000010"):
        trainer.run()
    names = sorted(path.name for path in trainer.checkpoints.iterdir())
    assert names == ["step-00000008", "step-00000010"]
    resumed = build()
    assert resumed.position.step == 10
    resumed.run()
    assert fingerprint(resumed.folder / LAST) == fingerprint(straight / LAST)
    newest = resumed.checkpoints / "latest"
    assert checkpoint_folder(newest).name == describe(newest).path.name == f"step-{STEPS:08d}"
    assert read_run(resumed.folder).parameters
    assert _finished(resumed.recipe, resumed.folder)


@pytest.mark.usefixtures("no_links")
def test_a_damaged_checkpoint_makes_room_without_links(build: Build) -> None:
    trainer = build()
    send_at(trainer, 10, signal.SIGTERM)
    with pytest.raises(Stopped):
        trainer.run()
    (trainer.checkpoints / "step-00000010/trainer/state.json").unlink()
    resumed = build("checkpoint.keep_last=1", "checkpoint.keep_best=false", "checkpoint.every=9 steps")
    assert resumed.position.step == 8
    send_at(resumed, 9, signal.SIGTERM)
    with pytest.raises(Stopped):
        resumed.run()
    assert step_names(resumed.folder) == ["step-00000009"]


def test_a_link_that_cannot_be_renewed_does_not_lead_elsewhere(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build("train.tokens=2048")
    trainer.run()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    build("train.tokens=4096").run()
    assert not (trainer.checkpoints / "latest").is_symlink()
    assert latest_checkpoint(trainer.checkpoints).name == "step-00000008"


# Purged -----------------------------------------------------------------------------------------------


def test_purged_checkpoints_stop_the_run(
    recipe: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (stopped / "metrics.jsonl").read_bytes()
    for folder in checkpoint.list_checkpoints(stopped / "checkpoints"):
        shutil.rmtree(folder)
    main_exits(2, "train", recipe, f"train.runs_dir={stopped.parent}")
    told = capsys.readouterr().err
    assert f"the checkpoints of this run are gone from {stopped}/checkpoints. Put them back" in told
    assert "Traceback" not in told
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_files_purged_and_folders_left(build: Build, stopped: Path) -> None:
    for path in (stopped / "checkpoints").rglob("*"):
        if path.is_file() or path.is_symlink():
            path.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        build()


def test_a_run_that_begins_anew_keeps_the_old_lines(stopped: Path, recipe: Path, straight: Path) -> None:
    """The folder of checkpoints was removed, as the message says; twice."""
    before = (stopped / "metrics.jsonl").read_bytes()
    for number in (1, 2):
        shutil.rmtree(stopped / "checkpoints")
        with (stopped / "said").open("w") as file:
            loaded = load_recipe(recipe, [f"train.runs_dir={stopped.parent}"])
            trainer = build_trainer(loaded, Console(file=file, width=300))
            assert trainer.position.step == 0
            trainer.run()
        assert (stopped / f"metrics-{number}.jsonl").read_bytes() == before
        assert f"metrics-{number}.jsonl" in (stopped / "said").read_text()
        assert losses(stopped) == losses(straight)
        before = (stopped / "metrics.jsonl").read_bytes()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(build: Build, straight: Path) -> None:
    first = build("checkpoint.every=100 steps")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    train_step = first._train_step
    first._train_step = lambda: die() if first.position.step == 3 else train_step()
    with pytest.raises(KeyboardInterrupt):
        first.run()
    again = build()
    again.run()
    assert losses(again.folder) == losses(straight)
    assert [line["step"] for line in map(json.loads, (again.folder / "metrics-1.jsonl").open())] == [1, 2, 3]


def test_a_resumed_run_puts_nothing_away(build: Build, stopped: Path) -> None:
    build().run()
    assert [path.name for path in stopped.glob("metrics*")] == ["metrics.jsonl"]
    assert len([line for line in metrics(stopped) if "loss" in line]) == STEPS


# Manifests --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight / LAST, tmp_path / "checkpoints" / Path(LAST).name))


def change_manifest(folder: Path, files: object) -> None:
    path = folder / "trainer/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files}))


def files_of(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "trainer/manifest.json").read_text())["files"]


def test_an_empty_manifest_is_not_whole(folder: Path) -> None:
    assert checkpoint.verify(folder) is None
    change_manifest(folder, {})
    assert checkpoint.verify(folder) == "its manifest lacks config.json"


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "trainer/optimizer.safetensors", "trainer/state.json",
     "trainer/rng-00000.json", "trainer/rng-00000.safetensors"],
)  # fmt: skip
def test_what_a_run_goes_on_from_must_be_named(folder: Path, name: str) -> None:
    files = files_of(folder)
    del files[name]
    change_manifest(folder, files)
    assert checkpoint.verify(folder) == f"its manifest lacks {name}"


def test_shards_must_be_named(folder: Path) -> None:
    (folder / "trainer/shards").mkdir()
    assert checkpoint.verify(folder) == "its manifest lacks trainer/shards"


@pytest.mark.parametrize("files", [[], None, "x", 3])
def test_no_table_of_files(folder: Path, files: object) -> None:
    change_manifest(folder, files)
    assert checkpoint.verify(folder) == "its manifest is missing or unreadable"


def test_what_cannot_be_read_is_damage(folder: Path) -> None:
    """So that the run goes on from the checkpoint before: no traceback, nor an end."""
    change_manifest(folder, files_of(folder) | {"x" * 300: files_of(folder)["config.json"]})
    assert checkpoint.verify(folder) == "a file cannot be read: File name too long"
    (folder / "trainer/manifest.json").write_text("[" * 100_000)
    assert checkpoint.verify(folder) == "its manifest is missing or unreadable"


@pytest.mark.parametrize("facts", [{}, [], None, {"bytes": "3"}, {"sha256": ""}])
def test_no_facts_of_a_file(folder: Path, facts: object) -> None:
    change_manifest(folder, files_of(folder) | {"config.json": facts})
    assert checkpoint.verify(folder) == "config.json is not as its checksum says"


@pytest.mark.parametrize("name", ["../secret", "trainer/../../secret", "/etc/hostname", "..", "", "."])
def test_names_that_lead_out_are_not_read(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = folder.parent / "secret"
    outside.write_text("secret")
    facts = checkpoint._facts(outside)
    change_manifest(folder, files_of(folder) | {name: facts})
    monkeypatch.setattr(checkpoint, "_facts", lambda path: pytest.fail(f"{path} was read"))
    assert checkpoint.verify(folder) == f"its manifest names {name!r}, which is not in it"


@pytest.mark.parametrize("name", ["\ud800", "a" * 5000, "a\0b"])
def test_names_that_no_file_can_have(folder: Path, name: str) -> None:
    """A checkpoint like this is damaged, so the one before it is used."""
    change_manifest(folder, files_of(folder) | {name: {"bytes": 1, "sha256": "0" * 64}})
    assert checkpoint.verify(folder) is not None


@pytest.mark.parametrize("link", ["config.json", "trainer", "trainer/state.json"])
def test_links_are_not_read(folder: Path, link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / link
    outside = path.rename(folder.parent / "elsewhere")
    path.symlink_to(outside)
    monkeypatch.setattr(checkpoint, "_facts", lambda path: pytest.fail(f"{path} was read"))
    assert checkpoint.verify(folder) == f"{link} is a link"
