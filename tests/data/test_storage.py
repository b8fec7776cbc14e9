"""A prepared folder is whole or absent, whatever line a signal hits, and has the mode of any new folder."""

import fcntl
import importlib
import os
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType, ModuleType

import pytest

from lrnn_lm.data import DataError, DataSpec, SourceSpec, prepare, prepare_all, tokenize
from lrnn_lm.data.storage import build_folder, clear_leftovers
from lrnn_lm.runs.export import new_folder


def fill(folder: Path) -> None:
    (folder / "file").write_text("x")


def export_into(target: Path, build: Callable[[Path], None]) -> None:
    with new_folder(target) as aside:
        aside.mkdir()
        build(aside)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_prepared_folder_has_the_mode_of_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    before = os.umask(umask)
    try:
        monkeypatch.setattr(os, "umask", lambda value: pytest.fail("another thread would see it"))
        build_folder(tmp_path / "made", fill)
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o777 & ~umask
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["made"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("make", [build_folder, export_into], ids=["data", "export"])
def test_a_signal_leaves_nothing_half_made(tmp_path: Path, make, number: signal.Signals) -> None:
    """A terminal that closes, a job that is cancelled. What it does elsewhere stays as it was."""

    def stopped(folder: Path) -> None:
        fill(folder)
        signal.raise_signal(number)

    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as left:
            make(tmp_path / "made", stopped)
        assert left.value.code == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
        assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        make(tmp_path / "made", stopped)
        assert (tmp_path / "made" / "file").is_file()
    finally:
        signal.signal(number, before)


def build_with_exit_at(line_event: int, final: Path) -> bool:
    """Build `final` with SystemExit raised as build_folder's `line_event`th line begins; whether it was."""
    events = 0

    def trace(frame: FrameType, event: str, argument: object) -> object:
        nonlocal events
        if frame.f_code is not build_folder.__code__:
            return None
        events += event == "line"
        if events == line_event + 1 and event == "line":
            raise SystemExit
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        build_folder(final, fill)
    except SystemExit:
        return True
    finally:
        sys.settrace(old)
    return False


def test_a_signal_between_any_two_lines_leaves_nothing_half_made(tmp_path: Path) -> None:
    stopped = 0
    while build_with_exit_at(stopped, tmp_path / f"{stopped}" / "made"):
        parent = tmp_path / f"{stopped}"
        assert not list(parent.glob(".building-*")), f"at line event {stopped}"
        if (parent / "made").exists():
            assert (parent / "made/file").read_text() == "x"
        stopped += 1
    assert stopped > 10  # each line once, and the build that no line stopped


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that everybody may write to, as a user who is not root."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are one user's alone
    folder.chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)


def test_locks_of_another_user_keep_nobody_out(shared: Path) -> None:
    """A cache that several people share: whoever built left a lock file that only he may write to."""
    for name in ("same", "other"):
        lock = shared / f".{name}.lock"
        lock.touch()
        lock.chmod(0o444)
        with pytest.raises(PermissionError):
            lock.open("w")
    (shared / ".building-other-deadbeef").mkdir()  # what he was stopped at
    clear_leftovers(shared)
    assert not (shared / ".building-other-deadbeef").exists()
    build_folder(shared / "same", fill)
    assert (shared / "same/file").read_text() == "x"
    with (shared / ".third.lock").open("w") as held:  # it is a lock still: what is being built stays
        fcntl.flock(held, fcntl.LOCK_EX)
        (shared / ".third.lock").chmod(0o444)
        (shared / ".building-third-deadbeef").mkdir()
        clear_leftovers(shared)
        assert (shared / ".building-third-deadbeef").exists()


@pytest.mark.parametrize("gone", ["data/*/manifest.json", "data/*/tokenizer/*", "tokenizers/*/*"])
def test_files_that_a_cleaning_took_can_be_made_again(spec: DataSpec, gone: str) -> None:
    """As clusters do on scratch disks, whose folders stay. The message names the folder to remove."""
    prepare(spec, progress=False)
    for file in Path(spec.cache_dir).glob(gone):
        file.unlink()
    spec = replace(spec, shard_tokens=999) if gone.startswith("tok") else spec
    with pytest.raises(DataError, match=r"remove the folder \S+ and run `lrnn prepare` again") as told:
        prepare(spec, progress=False)
    shutil.rmtree(str(told.value).split("remove the folder ")[1].split()[0])
    prepare(spec, progress=False)


@pytest.mark.parametrize("change", ["grows", "shrinks", "ends", "of another source"])
def test_text_that_changes_while_it_is_read_is_not_kept(
    spec: DataSpec, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """As while it is being copied: prepared, it would be of no text that a later start finds."""
    path = Path(spec.source.path)
    whole = path.read_text()
    others = Path(shutil.copy(path, path.with_name("others.jsonl")))
    texts = {"grows": whole + '{"text": "late"}\n', "shrinks": whole.splitlines()[0], "ends": whole[:-9]}

    def changed(module: ModuleType, name: str) -> None:
        old = getattr(module, name)

        def then(*given: object) -> object:
            (others if change == "of another source" else path).write_text(texts.get(change, whole[:999]))
            return old(*given)

        monkeypatch.setattr(module, name, then)

    specs = [spec, replace(spec, source=SourceSpec(type="jsonl", path=str(others)))]
    module = importlib.import_module("lrnn_lm.data.prepare")
    for place, name in ((tokenize, "train"), (module, "_write_texts")):
        changed(place, name)
        with pytest.raises(DataError, match=r"jsonl: the files changed while they were read; run again once"):
            prepare_all(specs, progress=False)
        monkeypatch.undo()
        kept = {kind: len([*Path(spec.cache_dir, kind).glob("[!.]*")]) for kind in ("tokenizers", "data")}
        at_rows = name == "_write_texts"  # the tokenizer is made, and a source that has not changed
        assert kept == {"tokenizers": at_rows, "data": at_rows and change == "of another source"}
        path.write_text(whole)
        others.write_text(whole)
