"""`checkpoint.copy_to`: a run's copy elsewhere is whole or not used; machines without the run go on with it.

`tests/export/test_s3.py` trains with a copy in an S3 store; sharded ranks with one: `test_train_average.py`.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from tiny_run import STEPS, assert_same_run, metrics
from trainers import Build, main_exits, refused_before_data, send_at

from lrnn_lm.recipe import load_recipe
from lrnn_lm.runs.checkpoint import CheckpointError, list_checkpoints, verify
from lrnn_lm.runs.remote_copy import RunCopy, main
from lrnn_lm.train.stop import Stopped

STORE = fsspec.filesystem("memory")
OLD, NEW = "step-00000008", f"step-{STEPS:08d}"  # the checkpoints of the undisturbed run


@pytest.fixture(autouse=True)
def _empty_store() -> Iterator[None]:
    yield
    STORE.store.clear()
    STORE.pseudo_dirs[:] = [""]


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    """The undisturbed run, to be changed."""
    return Path(shutil.copytree(straight, tmp_path / "here/tiny", symlinks=True))


def fetch(place: str, folder: Path, said: list[str] | None = None) -> str | None:
    """Fetch the run `tiny` into an empty folder of runs."""
    return RunCopy(folder / "tiny", place).fetch(
        lambda recipe, step: None, [].append if said is None else said.append
    )


def names(place: str) -> list[str]:
    return sorted(RunCopy(Path("elsewhere/tiny"), place).newer())


# The copy, in a store in memory ----------------------------------------------------------------------


def test_there_and_back(run: Path, tmp_path: Path) -> None:
    place = "memory://bucket/runs"
    for name in (OLD, NEW):
        RunCopy(run, place).write(name)
    assert names(place) == [OLD, NEW]
    assert fetch(place, tmp_path / "new") == NEW
    back = tmp_path / "new/tiny"
    for file in ("recipe.yaml", "metrics.jsonl"):
        assert (back / file).read_bytes() == (run / file).read_bytes()
    assert [folder.name for folder in list_checkpoints(back / "checkpoints")] == [NEW]
    assert verify(back / "checkpoints" / NEW) is None
    assert fetch(place, tmp_path / "new") is None  # it is not newer


def test_a_newer_checkpoint_there_is_fetched_beside_older_ones(run: Path) -> None:
    RunCopy(run, "memory://bucket/runs").write(NEW)
    shutil.rmtree(run / "checkpoints" / NEW)
    assert fetch("memory://bucket/runs", run.parent) == NEW
    assert len(list_checkpoints(run / "checkpoints")) == 2


def test_the_manifest_comes_last(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, order = type(STORE).put_file, []

    def recording(self: object, source: str, target: str, **options: object) -> None:
        order.append(target)
        put(self, source, target, **options)

    monkeypatch.setattr(type(STORE), "put_file", recording)
    RunCopy(run, "memory://bucket/runs").write(NEW)
    assert order[-1].endswith(f"{NEW}/trainer/manifest.json")
    assert [target for target in order if target.endswith("metrics.jsonl")]
    order.clear()
    RunCopy(run, "memory://bucket/runs").write(NEW)
    assert [target for target in order if "checkpoints" in target] == []  # it is there


def test_what_is_gone_here_goes_there(run: Path) -> None:
    place = "memory://bucket/runs"
    for name in (OLD, NEW):
        RunCopy(run, place).write(name)
    shutil.rmtree(run / "checkpoints" / OLD)
    RunCopy(run, place).write(NEW)
    assert names(place) == [NEW]
    shutil.copytree(run / "checkpoints" / NEW, run / "checkpoints" / OLD)
    shutil.rmtree(run / "checkpoints" / NEW)
    RunCopy(run, place).write(OLD)  # as a process does that has outlived its trainer
    assert names(place) == [OLD, NEW]


@pytest.mark.parametrize("harm", ["absent", "cut", "manifest"])
def test_a_damaged_copy_is_told_and_the_one_before_used(run: Path, tmp_path: Path, harm: str) -> None:
    place, said = "memory://bucket/runs", []
    for name in (OLD, NEW):
        RunCopy(run, place).write(name)
    there = f"/bucket/runs/tiny/checkpoints/{NEW}"
    match harm:
        case "absent":
            STORE.rm(f"{there}/model.safetensors")
        case "cut":
            STORE.pipe_file(f"{there}/model.safetensors", b"x")
        case "manifest":
            STORE.pipe_file(f"{there}/trainer/manifest.json", b'{"files": 1}')
    assert fetch(place, tmp_path / "new", said) == OLD
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint {place}/tiny/checkpoints/{NEW} is damaged (")
    STORE.rm(f"/bucket/runs/tiny/checkpoints/{OLD}/trainer/state.json")
    with pytest.raises(CheckpointError, match=r"^no checkpoint in memory://bucket/runs/tiny is whole"):
        fetch(place, tmp_path / "other")


def test_names_that_lead_out_of_the_folder(run: Path, tmp_path: Path) -> None:
    RunCopy(run, "memory://bucket/runs").write(NEW)
    manifest = f"/bucket/runs/tiny/checkpoints/{NEW}/trainer/manifest.json"
    facts = json.loads(STORE.cat_file(manifest))
    facts["files"]["../../../../owned"] = {"bytes": 1, "sha256": "0"}
    STORE.pipe_file(manifest, json.dumps(facts).encode())
    STORE.store[f"/bucket/runs/tiny/checkpoints/{NEW}/../../../../owned"] = STORE.store[manifest]
    STORE.pipe_file("/bucket/runs/tiny/checkpoints/latest/x", b"")  # a store's own tool may follow the link
    with pytest.raises(CheckpointError):
        fetch("memory://bucket/runs", tmp_path / "new")
    assert not list(tmp_path.rglob("owned"))


def test_killed_within_a_copy_at_every_file(run: Path, tmp_path: Path) -> None:
    """The older checkpoint is used until the last file of the newer one is there."""
    place, count = str(tmp_path / "there"), 0
    RunCopy(run, place).write(OLD)
    while _killed(run, place, count):
        assert fetch(place, tmp_path / f"new{count}") == OLD
        count += 1
    assert count > 10
    assert fetch(place, tmp_path / "new") == NEW
    assert not list(Path(place).rglob("*.tmp"))


def _killed(run: Path, place: str, after: int) -> bool:
    """Copy in a process that is killed half through file number `after`; whether it came to that."""
    if not (child := os.fork()):
        put, done = LocalFileSystem.put_file, 0

        def deadly(self: object, source: str, target: str, **options: object) -> None:
            nonlocal done
            if done == after:
                Path(target).write_bytes(Path(source).read_bytes()[:-1])
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            put(self, source, target, **options)

        LocalFileSystem.put_file = deadly
        main([str(run), place, NEW])
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


# Training ---------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "there"


def test_another_machine_goes_on_bit_for_bit(
    build: Build, straight: Path, tmp_path: Path, place: Path, capsys: pytest.CaptureFixture
) -> None:
    options = (f"checkpoint.copy_to={place}",)
    trainer = build(*options)
    send_at(trainer, 10, signal.SIGTERM)
    with pytest.raises(Stopped):
        trainer.run()
    assert names(str(place))[-1] == "step-00000010"
    shutil.rmtree(trainer.folder)
    again = build(*options, runs=tmp_path / "new")
    assert again.position.step == 10
    again.run()
    again.saver.copy_rest()
    assert_same_run(again.folder, straight)
    assert_same_run(place / "tiny", straight)
    everything = {path.name for path in (place / "tiny").iterdir()}
    assert everything == {"recipe.yaml", "metrics.jsonl", "data.json", "heldout.jsonl", "checkpoints"}
    assert len(list_checkpoints(again.folder / "checkpoints")) == 2


def test_a_copy_that_fails_is_told_and_made_up_for(
    recipe: Path, straight: Path, tmp_path: Path, place: Path, capsys: pytest.CaptureFixture
) -> None:
    in_the_way = place / "tiny/checkpoints"
    place.joinpath("tiny").mkdir(parents=True)
    in_the_way.write_text("")
    command = ("train", recipe, f"train.runs_dir={tmp_path}/runs", f"checkpoint.copy_to={place}")
    main_exits(2, *command)
    said = capsys.readouterr().err
    assert f"could not copy {NEW} to {place}: {place}/tiny: cannot be read or written" in said
    assert "the run is trained, but not copied" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert_same_run(tmp_path / "runs/tiny", straight)
    in_the_way.unlink()
    main_exits(0, *command)
    assert_same_run(place / "tiny", straight)
    assert (place / "tiny/README.md").is_file()


def test_the_next_save_makes_up_for_a_failed_copy(build: Build, place: Path) -> None:
    """Here the store is away until step 6; the checkpoint of step 8 is copied."""
    trainer = build(f"checkpoint.copy_to={place}", "checkpoint.background=false")
    (place / "tiny/checkpoints").write_text("")
    step = trainer.step

    def repaired(batches: list, *rest: object) -> object:
        if trainer.position.step == 6:
            trainer.saver._copier._process.wait()
            (place / "tiny/checkpoints").unlink()
        if trainer.position.step == 9:
            trainer.saver._copier._process.wait()
            assert names(str(place)) == [OLD]
        return step(batches, *rest)

    trainer.step = repaired
    trainer.run()
    assert names(str(place)) == [OLD, NEW]


def test_a_checkpoint_stays_while_it_is_copied(build: Build, tmp_path: Path) -> None:
    """The copying is stopped here until the run has saved three times more; one checkpoint is kept."""
    trainer = build("checkpoint.every=2 steps", "checkpoint.keep_last=1", "checkpoint.keep_best=false",
                    "checkpoint.background=false", f"checkpoint.copy_to={tmp_path}/there")  # fmt: skip
    step, copier = trainer.step, trainer.saver._copier

    def watched(batches: list, *rest: object) -> object:
        if trainer.position.step == 2:
            os.kill(copier._process.pid, signal.SIGSTOP)
        here = [folder.name for folder in list_checkpoints(trainer.checkpoints)]
        if trainer.position.step == 9:
            assert here == ["step-00000002", "step-00000008"]
            assert not copier.wait(time.monotonic())
            os.kill(copier._process.pid, signal.SIGCONT)
        return step(batches, *rest)

    trainer.step = watched
    trainer.run()
    assert [folder.name for folder in list_checkpoints(trainer.checkpoints)] == [NEW]
    assert names(f"{tmp_path}/there") == [NEW]


# Mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nothing://bucket/runs", ("nothing://bucket/runs/tiny: ", "Protocol not known")),
        ("oss://bucket/runs", ("oss://bucket/runs/tiny: ", "ossfs")),
        ("memory://bucket/runs", ("checkpoint.copy_to", "give a place that outlives it")),
        ("/dev/null/runs", ("/dev/null/runs/tiny: cannot be read or written",)),
    ],
)
def test_a_place_that_takes_nothing(
    recipe: Path, place: str, words: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    refused_before_data(recipe, ("name=tiny", f"checkpoint.copy_to={place}"), words, capsys)


def test_a_place_without_rights(
    recipe: Path, place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, path: str, data: bytes, **options: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(LocalFileSystem, "pipe_file", refuse)
    words = (f"{place}/tiny: no access (Access Denied)",)
    refused_before_data(recipe, (f"checkpoint.copy_to={place}",), words, capsys)


@pytest.mark.parametrize("inside", ["", "/tiny/backup", "/elsewhere"])
def test_the_place_of_the_run_itself(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture, inside: str
) -> None:
    """Within it, and through a link, each copy would hold the copies before."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "tiny")
    overrides = (f"train.runs_dir={tmp_path}", f"checkpoint.copy_to=file://{tmp_path}{inside}")
    refused_before_data(recipe, overrides, ("is where the run is written",), capsys)


def test_a_copy_of_another_recipe(
    run: Path, recipe: Path, place: Path, capsys: pytest.CaptureFixture
) -> None:
    RunCopy(run, str(place)).write(NEW)
    new = place / "runs"
    overrides = (f"checkpoint.copy_to={place}", f"train.runs_dir={new}", "seed=5")
    words = (f"{place}/tiny holds checkpoints of another recipe (seed: was 0, is 5)", "checkpoint.copy_to")
    refused_before_data(recipe, overrides, words, capsys)
    assert [path.name for path in (new / "tiny").rglob("*")] == [".lock"]
    loaded = load_recipe(recipe, list(overrides))
    assert loaded.checkpoint.copy_to == str(place)
    assert metrics(place / "tiny")
