"""The launcher (`accelerate launch`): signals, exit codes, and what its file asks of a run."""

import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist
from forks import run_code
from rank_runs import Ranks
from rich.console import Console
from tiny_run import ROOT, assert_same_run, environment, losses
from trainers import refused_before_data

from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import build_trainer
from lrnn_lm.train.parallel import Plan, launch_plan

FSDP2_FILE = ROOT / "recipes/accelerate/fsdp2.yaml"

# Our launcher as the leader of a group, whose number is written down.
LEADING = """
import os, sys
from lrnn_lm.train import launch
os.setsid()
open(sys.argv[1], "w").write(str(os.getpid()))
launch.main(sys.argv[2:])
"""


# In a rank: counts its signals, and ends with the code of a run that was stopped.
STOPPED = """
import os, pathlib, signal, sys, time
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
note = pathlib.Path(sys.argv[1], "rank-" + os.environ["RANK"])
note.write_text(os.environ["ACCELERATE_USE_FSDP"] + os.environ["FSDP_VERSION"])
while not got:
    time.sleep(0.01)
sys.exit(85)
"""


def test_the_launcher_passes_a_signal_on_and_keeps_the_exit_code(tmp_path: Path) -> None:
    """To all ranks, as it alone is told; what its file says reaches them."""
    script, leader = tmp_path / "stopped.py", tmp_path / "leader"
    script.write_text(STOPPED)
    words = ["--config_file", FSDP2_FILE, "--num_processes", 2, "--main_process_port", 0, script, tmp_path]
    with ThreadPoolExecutor(1) as pool:
        launched = pool.submit(run_code, LEADING, leader, *words, env=environment(), cwd=ROOT)
        while sum(path.stat().st_size > 0 for path in tmp_path.glob("rank-*")) < 2:
            assert not launched.done(), launched.result()
            time.sleep(0.05)
        os.kill(int(leader.read_text()), signal.SIGTERM)
        done = launched.result()
    assert done.returncode == 85, done.stderr
    assert "Traceback" not in done.stderr
    assert {path.read_text() for path in tmp_path.glob("rank-*")} == {"true2"}


@pytest.mark.slow
def test_the_launcher_passes_signals_on_and_keeps_the_exit_code(recipe: Path) -> None:
    """The whole process group is told, as by a scheduler: launcher, ranks and their loader workers.

    Accelerate starts the ranks, and its file says how they share: the first loss is that of forked ranks.
    """
    run = recipe.parent / "runs/launched"
    words = [
        "--config_file", FSDP2_FILE, "--num_processes", "2", "--main_process_port", "0",
        "-m", "lrnn_lm.train", recipe, "name=launched", "train.tokens=1M", "data.num_workers=1",
    ]  # fmt: skip
    leader = recipe.parent / "leader"
    options = {"env": environment(), "cwd": ROOT, "timeout": 250}
    with ThreadPoolExecutor(1) as pool:
        launched = pool.submit(run_code, LEADING, leader, *words, **options)
        while not (run / "metrics.jsonl").exists() or not losses(run):
            assert not launched.done(), launched.result()
            time.sleep(0.1)
        os.killpg(int(leader.read_text()), signal.SIGTERM)
        done = launched.result()
    assert done.returncode == 85, done.stderr
    assert done.stderr.count("stopped by SIGTERM after step") == 1
    assert "Traceback" not in done.stderr
    assert (run / "checkpoints/latest/trainer/rng-00001.json").exists()
    Ranks(recipe, 2, "name=forked", "train.tokens=512", parallel="fsdp2").expect()
    assert losses(run)[0] == losses(recipe.parent / "runs/forked")[0]


# A rank of torchrun, which restarts them all: the second is killed once.
RESTARTED = """
import os, pathlib, signal, sys, threading, time
from lrnn_lm.cli import main
saved, attempt = pathlib.Path(sys.argv[1]), os.environ["TORCHELASTIC_RESTART_COUNT"]
def die():
    while not saved.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1" and attempt == "0":
    threading.Thread(target=die, daemon=True).start()
main(["train", *sys.argv[2:]])
"""


# A rank whose store is of the launcher, as under torchrun. The second is late.
MEETING = """
import os, sys, time, torch
from types import SimpleNamespace
from lrnn_lm.train.runtime import make_accelerator
time.sleep(int(os.environ["RANK"]))
train = SimpleNamespace(device="cpu", precision="fp32", timeout_minutes=0.1)
print(make_accelerator(train, [], ".").gather(torch.ones(1)).sum().item())
"""


def test_restarted_ranks_meet_though_their_store_has_the_addresses_of_those_before() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1",
    }  # fmt: skip
    for attempt in "012":
        each = [
            environment() | shared | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RESTART_COUNT": attempt}
            for rank in "01"
        ]
        with ThreadPoolExecutor(2) as pool:
            done = list(pool.map(lambda env: run_code(MEETING, env=env), each))
        assert [rank.stdout for rank in done] == 2 * ["2.0\n"], done[0].stderr


def test_a_process_that_a_restarted_rank_starts_is_none() -> None:
    """It has the launcher's variables, but is alone."""
    alone = MEETING.replace('os.environ["RANK"]', '"0"')
    env = environment() | {"TORCHELASTIC_RESTART_COUNT": "1", "GROUP_WORLD_SIZE": "1"}
    done = run_code(alone, env=env)
    assert done.stdout == "1.0\n", done.stderr


@pytest.mark.slow
def test_ranks_that_torchrun_restarts_go_on(recipe: Path) -> None:
    """From the last checkpoint, bit for bit."""
    runs, script = recipe.parent / "runs", recipe.parent / "rank.py"
    script.write_text(RESTARTED)
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", str(script)]
    words += [str(runs / "again/checkpoints/step-00000004"), str(recipe), "name=again"]
    done = subprocess.run(
        [sys.executable, *words], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    Ranks(recipe, 2, "name=straight").expect()
    assert_same_run(runs / "again", runs / "straight")


# Counts the interrupts that it gets, for two seconds after the first.
COUNTING = """
import signal, sys, time
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(time.monotonic()))
open(sys.argv[1] + "/ready", "w").close()
while not got or time.monotonic() < got[0] + 2:
    time.sleep(0.01)
sys.exit(len(got))
"""
# Our launcher, slow to pass a signal on, so that two do not become one.
SLOWLY = """
import sys, time
from lrnn_lm.train import launch
children = launch._children
launch._children = lambda: time.sleep(0.5) or children()
launch.main(sys.argv[1:])
"""


def test_an_interrupt_at_a_terminal_comes_once(tmp_path: Path) -> None:
    """Launcher and process both hear Ctrl-C; passed on as well it would be a second, which quits at once."""
    (tmp_path / "count.py").write_text(COUNTING)
    alone = ["--cpu", "--num_processes", "1", str(tmp_path / "count.py"), str(tmp_path)]
    process, keyboard = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, "-c", SLOWLY, *alone], environment())
    while not (tmp_path / "ready").exists():
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        time.sleep(0.05)
    os.write(keyboard, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
    os.close(keyboard)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_launcher_keeps_the_code_of_a_mistake(tmp_path: Path, processes: int) -> None:
    (tmp_path / "mistaken.py").write_text("import sys; sys.exit(2)")
    options = ["--config_file", ROOT / "recipes/accelerate/ddp.yaml"] if processes > 1 else ["--cpu"]
    options += ["--num_processes", processes, "--main_process_port", "0", tmp_path / "mistaken.py"]
    done = run_code("from lrnn_lm.train.launch import main; main()", *options)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


# Its file -------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate_says(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    return monkeypatch


def test_what_accelerate_was_told(accelerate_says: pytest.MonkeyPatch) -> None:
    accelerate_says.setenv("FSDP_RESHARD_AFTER_FORWARD", "true")
    assert launch_plan("auto") == Plan("fsdp2", reshard=True)
    assert launch_plan("auto") == Plan("ddp")  # it was told once
    assert launch_plan("fsdp2", 8) == Plan("fsdp2", shard_size=8)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("FSDP_VERSION", "1", "fsdp_version: 2"), ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params")],
)
def test_kinds_of_fsdp_that_are_not_built(
    accelerate_says: pytest.MonkeyPatch, key: str, value: str, words: str
) -> None:
    accelerate_says.setenv(key, value)
    with pytest.raises(ValueError, match=words):
        launch_plan("auto")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "distributed_type: MULTI_GPU or FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "distributed_type: MULTI_GPU or FSDP"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "train.parallel"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "train.compile=true"),
    ],
)
def test_what_accelerate_would_do_by_itself(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    key: str,
    value: str,
    words: str,
) -> None:
    """DeepSpeed ended in a traceback; a dynamo backend compiled the whole model without a word."""
    monkeypatch.setenv(key, value)
    refused_before_data(recipe, (), (key, words), capsys)
    monkeypatch.setenv(key, "false" if value == "true" else "NO")  # the launcher's, where nothing is asked
    assert launch_plan("auto") == Plan("ddp")


@pytest.mark.parametrize("named", ["meta", "mps", "nonsense", "cuda", "cuda:7", "cpu:7", ""])
def test_a_device_that_accelerate_is_told_and_the_run_is_not_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, named: str
) -> None:
    """Accelerate takes it before its arguments: each ended in a traceback, `meta` after the data was read."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", named)
    refused_before_data(
        recipe, ("train.device=cpu",), (f"ACCELERATE_TORCH_DEVICE={named},", "train.device"), capsys
    )


@pytest.mark.parametrize(
    ("key", "others", "value", "decides", "settled"),
    [
        ("ACCELERATE_MIXED_PRECISION", ("", "no"), "fp16", "train.precision", None),
        ("FSDP_ACTIVATION_CHECKPOINTING", ("false",), "true", "activation_checkpointing", "true"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",), "4", "train.micro_batch", None),
    ],
)
def test_what_accelerate_is_told_in_vain(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    key: str, others: tuple[str, ...], value: str, decides: str, settled: str | None,
) -> None:  # fmt: skip
    """Each was ignored without a word. Not told: what the launcher sets by itself, what is done anyway."""

    def said(asked: str, *overrides: str) -> bool:
        monkeypatch.setenv(key, asked)
        console = Console(file=io.StringIO(), width=500)
        build_trainer(load_recipe(recipe, [f"train.runs_dir={tmp_path}", *overrides]), console)
        lines = [line for line in console.file.getvalue().splitlines() if "is not used" in line]
        assert all(f": {asked} is not used: " in line and decides in line for line in lines)
        return len(lines) == 1

    assert said(value)
    assert not any(said(other) for other in others)
    assert settled is None or not said(value, f"train.activation_checkpointing={settled}")
