"""Checkpoints: what is in them, what happens to damaged ones, and a disk that fills up while saving."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from rank_runs import Forked
from tiny_run import LAST, fingerprint, losses
from trainers import Build, main_exits, send_at

from lrnn_lm.runs import checkpoint
from lrnn_lm.runs.checkpoint import CheckpointError
from lrnn_lm.train.stop import Stopped


def flip_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_optimizer(folder: Path) -> None:
    path = folder / "trainer/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def drop_manifest(folder: Path) -> None:
    (folder / "trainer/manifest.json").unlink()


def drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


DAMAGE = {
    "model.safetensors is not as its checksum says": flip_byte,
    "trainer/optimizer.safetensors is not as its checksum says": cut_optimizer,
    "its manifest is missing or unreadable": drop_manifest,
    "tokenizer.json is missing": drop_tokenizer,
}


@pytest.fixture
def stopped(stopped_run: Callable[..., Path], tmp_path: Path) -> Path:
    """A run stopped after step 10, with checkpoints 8 and 10."""
    run = Path(shutil.copytree(stopped_run(), tmp_path / "tiny", symlinks=True))
    names = [folder.name for folder in checkpoint.list_checkpoints(run / "checkpoints")]
    assert names == ["step-00000008", "step-00000010"]
    return run


@pytest.mark.parametrize("what", list(DAMAGE))
def test_a_damaged_newest_checkpoint_is_passed_over(
    build: Build, stopped: Path, straight: Path, what: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[what](stopped / "checkpoints/step-00000010")
    (stopped / "checkpoints/.step-00000011.tmp/trainer").mkdir(parents=True)
    main_exits(0, "train", recipe, f"train.runs_dir={stopped.parent}")
    said = " ".join(capsys.readouterr().err.split())
    assert f"step-00000010 is damaged ({what}); trying the one before" in said
    assert "resuming from step 8 of 12" in said
    assert fingerprint(stopped / LAST) == fingerprint(straight / LAST)
    assert losses(stopped) == losses(straight)
    left = sorted(p.name for p in (stopped / "checkpoints").iterdir())
    assert left == ["best", "latest", "step-00000008", "step-00000012"]  # the damaged one made room


def test_pruning_keeps_whole_checkpoints(build: Build, stopped: Path) -> None:
    """A damaged checkpoint of a later step counts for nothing when the oldest are dropped."""
    flip_byte(stopped / "checkpoints/step-00000010")
    trainer = build("checkpoint.keep_last=1")
    send_at(trainer, 9, signal.SIGTERM)
    with pytest.raises(Stopped, match="step-00000009"):
        trainer.run()
    assert [c.name for c in checkpoint.list_checkpoints(stopped / "checkpoints")] == ["step-00000009"]
    assert build().position.step == 9


def test_a_run_does_not_begin_anew_over_damaged_checkpoints(build: Build, stopped: Path) -> None:
    for folder in checkpoint.list_checkpoints(stopped / "checkpoints"):
        drop_manifest(folder)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*checkpoints is whole.*remove that folder"):
        build()
    assert len(checkpoint.list_checkpoints(stopped / "checkpoints")) == 2
    shutil.rmtree(stopped / "checkpoints")
    assert build().position.step == 0


def test_a_checkpoint_of_another_model_is_no_crash(build: Build, stopped: Path) -> None:
    recipe = stopped / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("hidden_size: 32", "hidden_size: 40"))
    with pytest.raises(CheckpointError, match="holds another model than the recipe's"):
        build("model.hidden_size=40")


CODE = {"configuration_lrnn.py", "modeling_lrnn.py", "kernels_lrnn.py"}


def code_of(folder: Path) -> set[str]:
    """The Python files of a checkpoint, which its config.json names if there are any."""
    code = {file.name for file in folder.glob("*.py")}
    assert ("auto_map" in json.loads((folder / "config.json").read_text())) == bool(code)
    return code


def test_only_the_last_checkpoint_of_a_run_carries_the_code(straight: Path) -> None:
    *before, last = checkpoint.list_checkpoints(straight / "checkpoints")
    assert before
    assert [code_of(folder) for folder in before] == [set()] * len(before)
    assert code_of(last) == CODE
    assert json.loads((last / "trainer/manifest.json").read_text())["files"].keys() > CODE


def test_whoever_may_read_a_checkpoint_may_read_its_files(straight: Path) -> None:
    """safetensors 0.8 makes files that only their maker can read, whatever the umask."""
    for folder in checkpoint.list_checkpoints(straight / "checkpoints"):
        mode = folder.stat().st_mode & 0o666
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert {file.name for file in files if file.stat().st_mode & 0o777 != mode} == set()


def test_a_run_that_ends_where_it_was_stopped_gets_the_code(
    build: Build, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever moment the process ends at while it is added: the next one completes it."""
    last = stopped / "checkpoints/step-00000010"
    before = {p.name: p.read_bytes() for p in last.iterdir() if p.is_file()}
    assert code_of(last) == set()
    rename, ended = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        """Ends the process at each rename of a checkpoint in turn."""
        if "step-" in path.name and path.name not in ended:
            ended.append(path.name)
            raise OSError("no more")
        return rename(path, target)

    for _ in range(2):
        trainer = build("train.tokens=5120")
        assert (trainer.position.step, trainer.finished) == (10, True)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", interrupted)
            with pytest.raises(CheckpointError, match="no more"):
                trainer.run()
    assert ended == ["step-00000010", ".step-00000010.tmp"]
    build("train.tokens=5120").run()
    assert code_of(last) == CODE
    assert checkpoint.verify(last) is None
    assert all((last / name).read_bytes() == data for name, data in before.items() if name != "config.json")
    once = fingerprint(last)
    build("train.tokens=5120").run()
    assert fingerprint(last) == once


def test_a_checkpoint_is_a_plain_model_folder(straight: Path, build: Build) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = straight / "checkpoints/latest"
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".pickle")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a linear recurrence keeps values", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    trainer = build(runs=straight.parent)
    trainer.bare_model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trainer.bare_model(ids).logits, rtol=0, atol=0)


def test_tied_weights_are_saved_once_and_come_back(build: Build) -> None:
    overrides = ("model.tie_word_embeddings=true", "train.tokens=2048", "checkpoint.every=2 steps")
    trainer = build(*overrides)
    send_at(trainer, 3, signal.SIGTERM)
    with pytest.raises(Stopped):
        trainer.run()
    resumed, whole = build(*overrides), build(*overrides, "name=whole")
    resumed.run()
    whole.run()
    last = "checkpoints/step-00000004"
    assert fingerprint(resumed.folder / last) == fingerprint(whole.folder / last)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1500 KiB: room for some checkpoints of this model, not for all."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_keeps_the_last_checkpoint(
    recipe: Path, small_disk: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_exits(2, "train", recipe, f"train.runs_dir={small_disk}", "checkpoint.keep_last=3")
    errors = capsys.readouterr().err
    assert "No space left on device" in errors
    assert "Traceback" not in errors
    checkpoints = small_disk / "tiny/checkpoints"
    found = checkpoint.list_checkpoints(checkpoints)
    assert found
    assert f"last good checkpoint: {found[-1].name}" in errors
    assert all(checkpoint.verify(folder) is None for folder in found)
    assert not list(checkpoints.glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    main_exits(0, "train", recipe, f"train.runs_dir={small_disk}", "checkpoint.keep_last=3")
    assert fingerprint(small_disk / "tiny" / LAST) == fingerprint(straight / LAST)
    assert losses(small_disk / "tiny") == losses(straight)


@pytest.mark.parametrize("failing", ["model", "tokenizer", "fsync"])
def test_whichever_write_finds_no_room(
    build: Build, straight: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build("checkpoint.background=false")
    full = OSError(28, "No space left on device")
    calls = 0

    def fail_later(original: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if 8 <= trainer.position.step < 12:  # written while training goes on
                raise full
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if failing == "model":
            patch.setattr(
                trainer.bare_model, "save_pretrained", fail_later(trainer.bare_model.save_pretrained)
            )
        elif failing == "tokenizer":
            patch.setattr(Path, "write_bytes", fail_later(Path.write_bytes))
        else:
            patch.setattr(checkpoint, "fsync", fail_later(checkpoint.fsync))
        with pytest.raises(
            CheckpointError, match="No space left on device; last good checkpoint: step-00000004"
        ):
            trainer.run()
    assert calls
    assert not list(trainer.checkpoints.glob(".*"))
    resumed = build()
    assert resumed.position.step == 4
    resumed.run()
    assert fingerprint(resumed.folder / LAST) == fingerprint(straight / LAST)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "Free some space"), (errno.EDQUOT, "Free some space"), (errno.EROFS, "Mend that"),
     (errno.ENOENT, "Mend that")],
)  # fmt: skip
def test_what_to_do_about_a_save_that_failed(
    build: Build, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    """Room helps a full disk, not one that is read-only, nor a run folder that was moved away."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    trainer = build("train.tokens=512")
    monkeypatch.setattr(checkpoint, "fsync", fail)
    told = f"{os.strerror(number)}; last good checkpoint: none. {advice} and run the same command again"
    with pytest.raises(CheckpointError, match=told):
        trainer.run()


def test_a_process_that_may_not_write_large_files(recipe: Path, tmp_path: Path) -> None:
    """A limit on the size of files, met by safetensors' own writing, in a process."""
    limit = (60_000, resource.RLIM_INFINITY)
    first = partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
    code, errors = Forked(recipe, f"train.runs_dir={tmp_path}", first=first).finish()
    assert code == 2, errors
    assert "could not save" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "tiny/checkpoints").iterdir())
