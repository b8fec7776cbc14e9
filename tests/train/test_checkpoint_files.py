"""Checkpoint folders by themselves, with small files for a model: which stay, which is best, what goes."""

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from lrnn_lm.runs import checkpoint
from lrnn_lm.runs.checkpoint import CheckpointError, Position
from lrnn_lm.runs.layout import CheckpointFolder

FILES = (*checkpoint._EXPECTED, *checkpoint._WHOLE)


def save(
    checkpoints: Path,
    step: int,
    keep_last: int = 9,
    keep_best: bool = True,
    before: str | None = None,
    **at: object,
) -> Path:
    """Publish a checkpoint of this step; `at` is more of where the run stands."""
    aside = checkpoint.aside_of(checkpoints, step)
    (aside / "trainer").mkdir(parents=True)
    for name in FILES:
        (aside / name).write_text(f"{name} of {step}")
    (aside / "trainer/state.json").write_text(json.dumps(asdict(Position(step=step, **at))))
    half = len(FILES) // 2
    checkpoint.record_facts(aside, [aside / name for name in FILES[:half]], rank=0)
    checkpoint.record_facts(aside, [aside / name for name in FILES[half:]], rank=1)
    return checkpoint.publish(checkpoints, step, keep_last, keep_best, before)


def steps(checkpoints: Path) -> list[int]:
    return [checkpoint.read_position(folder).step for folder in checkpoint.list_checkpoints(checkpoints)]


def link(checkpoints: Path, name: str) -> str | None:
    path = checkpoints / name
    return os.readlink(path) if path.is_symlink() else None


def newest(checkpoints: Path) -> tuple[str | None, list[str]]:
    """The name of the newest whole checkpoint, and what was said of those after it."""
    said: list[str] = []
    found = checkpoint.newest_valid(checkpoints, said.append)
    return found and found.name, said


def damage(folder: Path) -> None:
    (folder / "model.safetensors").write_text("model.safetensors of -")


def test_what_is_published_is_whole_and_names_every_file(tmp_path: Path) -> None:
    assert checkpoint.latest_name(tmp_path) == "none"
    folder = save(tmp_path, 3)
    assert folder == tmp_path / "step-00000003"
    assert checkpoint.latest_name(tmp_path) == folder.name
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {*FILES, "trainer/manifest.json"}
    manifest = json.loads((folder / "trainer/manifest.json").read_text())
    assert (manifest["format"], manifest["step"], list(manifest["files"])) == (2, 3, sorted(FILES))
    assert checkpoint.verify(folder) is None
    assert link(tmp_path, "latest") == folder.name


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_stay(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep)
        assert steps(tmp_path) == list(range(1, step + 1))[-keep:]
    assert link(tmp_path, "best") is None, "none was validated"


def test_the_best_stays_the_later_of_equals(tmp_path: Path) -> None:
    """Validated at its very step: a loss that is carried along counts for nothing."""
    losses = {1: 3.0, 2: 2.0, 3: 2.0, 4: 2.5, 5: 2.5}
    for step, loss in losses.items():
        save(tmp_path, step, keep_last=1, validated=step, validation_loss=loss)
    save(tmp_path, 6, keep_last=1, validated=5, validation_loss=1.0)
    save(tmp_path, 7, keep_last=1, validated=7)
    assert steps(tmp_path) == [3, 7]
    assert link(tmp_path, "best") == "step-00000003"
    save(tmp_path, 8, keep_last=1, keep_best=False)
    assert steps(tmp_path) == [8]
    assert link(tmp_path, "best") is None, "a link that leads nowhere goes"


def test_a_loss_that_is_not_a_number_is_not_the_best(tmp_path: Path) -> None:
    for step, loss in {1: math.nan, 2: 3.0, 3: math.inf, 4: math.nan}.items():
        save(tmp_path, step, validated=step, validation_loss=loss)
    assert link(tmp_path, "best") == "step-00000002"


def test_the_last_good_one_stays_behind_those_amid_bad_steps(tmp_path: Path) -> None:
    for step, bad in ((1, 0), (2, 0), (3, 1), (4, 2)):
        save(tmp_path, step, keep_last=1, bad_in_a_row=bad)
    assert steps(tmp_path) == [2, 4]
    save(tmp_path, 5, keep_last=1)
    assert steps(tmp_path) == [5]


def test_those_after_the_one_that_was_gone_on_from_are_damaged(tmp_path: Path) -> None:
    """They would have been gone on from otherwise: they make room, and are none of the last few, nor best."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step, validated=step, validation_loss=5.0 - step)
    save(tmp_path, 5, 2, before="step-00000002", validated=5, validation_loss=9.0)
    assert steps(tmp_path) == [2, 5]
    assert link(tmp_path, "best") == "step-00000002"
    save(tmp_path, 6, 2, before="step-00000099")  # unknown: all count
    assert steps(tmp_path) == [2, 5, 6]


def test_one_that_cannot_be_read_is_neither_best_nor_good(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, validated=step, validation_loss=float(step))
    (tmp_path / "step-00000001/trainer/state.json").write_text("{")
    save(tmp_path, 3, 1, bad_in_a_row=1)
    assert [folder.name for folder in checkpoint.list_checkpoints(tmp_path)] == [
        "step-00000002",
        "step-00000003",
    ]
    assert link(tmp_path, "best") == "step-00000002"


def test_a_step_is_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    again = save(tmp_path, 2)
    assert checkpoint.verify(again) is None
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000002"]


def test_the_newest_whole_one(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") == (None, [])
    first, second, third = (save(tmp_path, step) for step in (1, 2, 3))
    assert newest(tmp_path) == (third.name, [])
    for folder in (third, second):
        damage(folder)
    name, said = newest(tmp_path)
    assert name == first.name == link(tmp_path, "latest")
    what = "is damaged (model.safetensors is not as its checksum says); trying the one before"
    assert said == [f"checkpoint {folder} {what}" for folder in (third, second)]
    damage(first)
    said = []
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path} is whole"):
        checkpoint.newest_valid(tmp_path, said.append)
    assert [line.split("; ")[-1] for line in said] == ["trying the one before"] * 2 + ["there is none before"]


def test_one_that_was_renamed_is_not_newer_than_those_that_come(tmp_path: Path) -> None:
    """Taken as step 9 it would be the newest for ever: each start would go on from it, and lose the rest."""
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match="step-00000009 is the checkpoint of step 2, renamed"):
        checkpoint.newest_valid(tmp_path, print)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000009"]


@pytest.mark.parametrize("gone", ["latest", "best"])
def test_links_without_checkpoints_mean_that_they_are_gone(tmp_path: Path, gone: str) -> None:
    (tmp_path / gone).symlink_to("step-00000003")
    with pytest.raises(CheckpointError, match=f"are gone from {tmp_path}"):
        newest(tmp_path)


@pytest.mark.parametrize(("number", "reads"), [(0, False), (1, True), (2, True), (3, False)])
def test_formats(tmp_path: Path, number: int, reads: bool) -> None:
    folder = save(tmp_path, 1)
    manifest = folder / "trainer/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": number}))
    if reads:
        assert checkpoint.verify(folder) is None
        return
    with pytest.raises(CheckpointError, match=rf"\(format {number}; this one reads 1 and 2\)"):
        newest(tmp_path)


def test_a_position_of_a_newer_version(tmp_path: Path) -> None:
    """Whose count would be lost if it were left out. A key of older ones is dropped."""
    folder = save(tmp_path, 1)
    state, manifest = CheckpointFolder(folder).state, CheckpointFolder(folder).manifest
    stored = json.loads(state.read_text())
    for key in ("skips", "rewinds"):
        state.write_text(json.dumps(stored | {key: 2}))
        facts = json.loads(manifest.read_text())
        facts["files"][str(state.relative_to(folder))] = checkpoint._facts(state)
        manifest.write_text(json.dumps(facts))
        if key == "skips":
            assert newest(tmp_path)[0] == folder.name
    with pytest.raises(CheckpointError, match=r"does not know \(rewinds\); use the version that wrote it"):
        newest(tmp_path)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_every_byte_is_in_the_checksum(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    facts = {"bytes": size, "sha256": hashlib.sha256(data).hexdigest()}
    assert checkpoint._facts(tmp_path / "file") == facts


def test_what_killed_saves_left_is_cleared_and_no_more(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 1)
    kept = sorted(path for path in tmp_path.rglob("*"))
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    for place in (tmp_path / "run", folder, folder / "trainer"):
        (place / ".one.tmp").write_text("")
        (place / ".two.tmp").mkdir()
        (place / ".two.tmp/full").write_text("")
        (place / ".three.tmp").symlink_to(outside)
    checkpoint.clear_leftovers(tmp_path / "run")
    assert sorted(path for path in tmp_path.rglob("*") if outside not in (path, *path.parents)) == kept
    assert (outside / "inner").is_dir(), "what a link leads to is not ours"


@pytest.mark.parametrize("state", ["whole", "damaged", "gone", "damaged as the copy is"])
def test_a_copy_of_a_link_takes_only_the_place_of_a_lost_one(tmp_path: Path, state: str) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2, validated=2, validation_loss=1.0)
    for name in ("latest", "best"):
        (tmp_path / name).unlink()
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "mine").write_text(name)
        if "copy" in state:
            damage(tmp_path / name)
    if state == "gone":
        shutil.rmtree(folder)
    elif state != "whole":
        damage(folder)
    found, _ = newest(tmp_path)
    assert found == ("step-00000001" if "copy" in state else folder.name)
    assert (link(tmp_path, "latest"), link(tmp_path, "best")) == (found, folder.name)
    assert (folder / "mine").exists() == (state in ("damaged", "gone"))
    assert sorted(os.listdir(tmp_path)) == ["best", "latest", "step-00000001", "step-00000002"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_link_at_any_depth_is_not_followed(tmp_path: Path, depth: int) -> None:
    folder = save(tmp_path / "run", 1)
    name = "a/b/c/config.json"
    (folder / name).parent.mkdir(parents=True)
    shutil.copyfile(folder / "config.json", folder / name)
    manifest = folder / "trainer/manifest.json"
    facts = json.loads(manifest.read_text())
    facts["files"][name] = facts["files"]["config.json"]
    manifest.write_text(json.dumps(facts))
    assert checkpoint.verify(folder) is None
    part = "/".join(name.split("/")[:depth])
    (folder / part).rename(tmp_path / "elsewhere")
    (folder / part).symlink_to(tmp_path / "elsewhere")
    assert checkpoint.verify(folder) == f"{part} is a link"
