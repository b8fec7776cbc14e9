"""SIGHUP: a terminal that is closed stops the run, which saves; under nohup it goes on."""

import os
import pty
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from rank_runs import Forked
from tiny_run import STEPS, fingerprint, metrics

LONG = ("train.tokens=5M", "checkpoint.every=100000 steps", "eval.every=100000 steps", "data.num_workers=1")


def wait_for_steps(run: Path, process: Forked) -> None:
    deadline = time.monotonic() + 90
    while not ((run / "metrics.jsonl").exists() and len(metrics_so_far(run)) > 3):
        assert process.runs()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def metrics_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_a_hangup_saves_and_exits_85(recipe: Path, tmp_path: Path) -> None:
    process = Forked(recipe, f"train.runs_dir={tmp_path}", *LONG)
    wait_for_steps(tmp_path / "tiny", process)
    process.send_signal(signal.SIGHUP)
    code, errors = process.finish()
    assert code == 85, errors
    assert "stopped by SIGHUP" in errors
    assert list((tmp_path / "tiny/checkpoints").glob("step-*"))


def work_at(terminal: str) -> None:
    """A session of its own, whose controlling terminal this becomes."""
    os.setsid()
    os.environ["TERM"] = "xterm"
    opened = os.open(terminal, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(opened, descriptor)
    os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", 1, closefd=False) for descriptor in (1, 2))


def test_a_closed_terminal_saves_and_exits_85(recipe: Path, tmp_path: Path) -> None:
    """With the progress bar on it: writing to what is gone must not be an error."""
    master, terminal = pty.openpty()
    process = Forked(
        recipe, f"train.runs_dir={tmp_path}", *LONG, first=partial(work_at, os.ttyname(terminal))
    )
    os.close(terminal)
    os.set_blocking(master, False)
    deadline = time.monotonic() + 90
    while not ((tmp_path / "tiny/metrics.jsonl").exists() and len(metrics_so_far(tmp_path / "tiny")) > 3):
        try:
            os.read(master, 1 << 16)
        except BlockingIOError:
            time.sleep(0.02)
        assert process.runs()
        assert time.monotonic() < deadline
    os.close(master)
    assert process.finish(60)[0] == 85
    assert list((tmp_path / "tiny/checkpoints").glob("step-*"))


def test_under_nohup_it_goes_on(recipe: Path, tmp_path: Path, straight: Path) -> None:
    ignore = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    process = Forked(recipe, f"train.runs_dir={tmp_path}", first=ignore)
    deadline = time.monotonic() + 90
    while process.runs():
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        assert time.monotonic() < deadline
    code, errors = process.finish()
    assert code == 0, errors
    last = f"checkpoints/step-{STEPS:08d}"
    assert fingerprint(tmp_path / "tiny" / last) == fingerprint(straight / last)
    assert len([line for line in metrics(tmp_path / "tiny") if "loss" in line]) == STEPS


def speak_to_nobody() -> None:
    """Output is a pipe whose reader has ended, as of `| tee log` after Ctrl-C."""
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)
    os.close(writer)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", 1, closefd=False) for descriptor in (1, 2))


def test_a_run_that_nobody_listens_to_goes_on(recipe: Path, tmp_path: Path) -> None:
    """With a cache of its own, so that it prepares its data, too."""
    own = f"train.runs_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache"
    process = Forked(recipe, *own, first=speak_to_nobody)
    assert process.finish()[0] == 0
    assert (tmp_path / f"tiny/checkpoints/step-{STEPS:08d}").exists()


def speak_to_a_full_disk(first: int) -> None:
    """Output is a log on a full disk; of the streams from `first` on."""
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor in range(first, 3):
        os.dup2(full, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", 1, closefd=False) for descriptor in (1, 2))
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr


@pytest.mark.parametrize("first", [1, 2])
def test_a_full_disk_under_the_log_ends_no_run(recipe: Path, tmp_path: Path, first: int) -> None:
    own = f"train.runs_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache"
    process = Forked(recipe, *own, first=partial(speak_to_a_full_disk, first))
    assert process.finish()[0] == 0
    assert (tmp_path / f"tiny/checkpoints/step-{STEPS:08d}").exists()


def test_a_full_disk_under_the_log_keeps_the_code_of_a_stop(recipe: Path, tmp_path: Path) -> None:
    process = Forked(recipe, f"train.runs_dir={tmp_path}", *LONG, first=partial(speak_to_a_full_disk, 1))
    wait_for_steps(tmp_path / "tiny", process)
    process.send_signal(signal.SIGTERM)
    assert process.finish()[0] == 85
