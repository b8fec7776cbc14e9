"""Of several ranks one is asked to stop, dies, computes nonsense or finds a mistake: all end alike."""

import os
import pty
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from forks import run_code
from rank_runs import Forked, Prank, Ranks, free_port
from safetensors.torch import load_file
from tiny_run import ROOT, environment, finish, losses, metrics, start, validations, write_recipe
from trainers import Build, main_exits, refused_before_data

from lrnn_lm.train.parallel import Plan, launch_plan

ROWS = 8
FSDP2, FSDP2_FILE = {"parallel": "fsdp2"}, ROOT / "recipes/accelerate/fsdp2.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 steps of 8 rows, saved every 2, validated every 3."""
    return write_recipe(
        tmp_path_factory.mktemp("faults"),
        model={"num_hidden_layers": 1},
        train={"tokens": 6 * 512},
        checkpoint={"every": "2 steps"},
        eval={"every": "3 steps"},
    )


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Path:
    Ranks(recipe, 2, "name=straight", **FSDP2).expect()
    return recipe.parent / "runs/straight"


def same(run: Path, straight: Path) -> None:
    assert losses(run) == losses(straight)
    assert validations(run) == validations(straight)
    last = "checkpoints/step-00000006/model.safetensors"
    ours, theirs = load_file(run / last), load_file(straight / last)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# Stopping -------------------------------------------------------------------------------------------


def test_a_signal_on_one_rank_stops_all_within_the_step(recipe: Path, straight: Path) -> None:
    """Within a step, then within a validation: the run is the undisturbed one."""
    for number, step, validating in ((signal.SIGTERM, 2, False), (signal.SIGUSR1, 3, True)):
        prank = Prank(rank=1, step=step, signal=number, validating=validating)
        said = Ranks(recipe, 2, "name=stopped", prank=prank, **FSDP2).expect(85)
        assert said.count(f"stopped by a signal on another rank after step {step} of 6; saved") == 1
        assert "Traceback" not in said
    Ranks(recipe, 2, "name=stopped", **FSDP2).expect()
    same(recipe.parent / "runs/stopped", straight)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_while_data_is_prepared(tmp_path: Path, rank: int) -> None:
    """The others wait for the first rank, and hear of it: nothing is left half made."""
    recipe = write_recipe(tmp_path, documents=4000)
    run = Ranks(recipe, 2, "train.tokens=512")
    while not list((tmp_path / "cache/data").glob(".building-*")):
        assert all(process.exitcode is None for process in run.processes), run.errors
        time.sleep(0.01)
    os.kill(run.processes[rank].pid, signal.SIGUSR1)
    said = run.expect(85)
    assert said.count("stopped by SIGUSR1") == 1
    assert "Traceback" not in said
    assert not list(tmp_path.rglob(".building-*"))


# Our launcher as the leader of a group, whose number is written down.
LEADING = """
import os, sys
from lrnn_lm.train import launch
os.setsid()
open(sys.argv[1], "w").write(str(os.getpid()))
launch.main(sys.argv[2:])
"""


def test_the_launcher_passes_signals_on_and_keeps_the_exit_code(recipe: Path, straight: Path) -> None:
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
    assert losses(run)[0] == losses(straight)[0]


@pytest.mark.parametrize("rank", [0, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (None, 1))])
def test_a_signal_before_the_ranks_have_met(tmp_path: Path, rank: int | None) -> None:
    """As torch and transformers are imported, alone or on one of two: none waits for one that has left."""
    recipe = write_recipe(tmp_path)
    met = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [met | {"RANK": r, "LOCAL_RANK": r} for r in "01"] if rank is not None else [{}]
    victim = start(recipe, **ranks.pop(rank or 0))
    others = [Forked(recipe, first=partial(stand_at, places)) for places in ranks]
    while not hears(victim.pid, signal.SIGUSR1):
        assert victim.poll() is None
        time.sleep(0.002)
    time.sleep(0.3)
    victim.send_signal(signal.SIGUSR1)
    for code, errors in (finish(victim), *(other.finish() for other in others)):
        assert code == 85, errors
        assert "Traceback" not in errors


def stand_at(places: dict[str, str]) -> None:
    os.environ.update(places)


def hears(process: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for this signal."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


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


@pytest.mark.parametrize("mistake", ["model.hiden_size=4", "train.precision=bf16"])
def test_a_mistake_that_every_rank_sees_is_told_once(recipe: Path, mistake: str) -> None:
    """Before the ranks have met, by the first one."""
    if mistake.endswith("bf16") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    said = Ranks(recipe, 2, "name=all-see", mistake).expect(2)
    assert said.count("lrnn:") == 1
    assert len(said.splitlines()) <= 2
    assert mistake.split("=")[0] in said


@pytest.mark.parametrize("processes", [1, 2])
def test_the_launcher_keeps_the_code_of_a_mistake(tmp_path: Path, processes: int) -> None:
    (tmp_path / "mistaken.py").write_text("import sys; sys.exit(2)")
    options = ["--config_file", ROOT / "recipes/accelerate/ddp.yaml"] if processes > 1 else ["--cpu"]
    options += ["--num_processes", processes, "--main_process_port", "0", tmp_path / "mistaken.py"]
    done = run_code("from lrnn_lm.train.launch import main; main()", *options)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_a_step_that_does_not_split_over_ranks(recipe: Path) -> None:
    said = Ranks(recipe, 2, "train.tokens_per_step=192", "train.tokens=384", "name=mistake").expect(2)
    assert [line for line in said.splitlines() if line.startswith("lrnn: ")] == [
        "lrnn: a step of 3 rows does not split over 2 ranks; make train.tokens_per_step a multiple of 128"
    ]


# Nonsense and death ---------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_one_rank_without_a_finite_loss_skips_the_step_for_all(recipe: Path, parallel: str) -> None:
    """Too many such steps end every rank: told once, with the checkpoint that a run goes on from."""
    name, bad = f"nan-{parallel}", Prank(rank=1, nan_samples=(ROWS, 4 * ROWS, 5 * ROWS))
    options = ("train.max_bad_steps=2", f"name={name}")
    said = " ".join(Ranks(recipe, 2, *options, prank=bad, parallel=parallel).expect(2).split())
    assert said.count("not finite for 2 steps in a row, up to step 6; lower optim.lr") == 1
    assert "step-00000004" in said
    assert "Traceback" not in said
    run = recipe.parent / "runs" / name
    assert [step for step, loss in losses(run) if loss is None] == [2, 5, 6]
    Ranks(recipe, 2, *options, parallel=parallel).expect()
    assert [step for step, loss in losses(run) if loss is None] == [2]
    assert [line["skipped"] for line in metrics(run) if "loss" in line] == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_dead_rank_ends_the_others_with_a_traceback(recipe: Path, parallel: str) -> None:
    run = Ranks(
        recipe, 2, f"name=dead-{parallel}", "train.tokens=1M", parallel=parallel,
        prank=Prank(rank=1, step=3, signal=signal.SIGKILL),
    )  # fmt: skip
    began = time.monotonic()
    assert run.wait(60) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 60
    assert "Traceback" in run.errors


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_full_gpu_of_one_rank(recipe: Path, parallel: str) -> None:
    """That rank says so and ends; the others do not wait for it."""
    run = Ranks(
        recipe, 2, f"name=full-{parallel}", "train.tokens=1M", parallel=parallel,
        prank=Prank(rank=1, step=3, full=True),
    )  # fmt: skip
    assert run.wait(60) == [1, 2]
    assert run.errors.count("lrnn: no room on the GPU for 2.50 GiB more") == 1
    assert run.errors.count("lrnn: lower train.micro_batch") == 1


def test_a_rank_that_hangs_is_waited_for_as_long_as_the_recipe_says(recipe: Path) -> None:
    run = Ranks(
        recipe, 2, "name=hung", "train.timeout_minutes=0.05", "train.stall_minutes=0.02", "train.tokens=1M",
        prank=Prank(rank=1, step=3, sleep=6),
    )  # fmt: skip
    codes = run.wait(60)
    assert codes[0] == 1
    assert "Timeout (0:00:01" in run.errors  # the stacks of the step that hangs
    assert "Traceback" in run.errors


# Mistakes -------------------------------------------------------------------------------------------


def test_a_mistake_that_only_the_first_rank_sees(recipe: Path, straight: Path) -> None:
    said = Ranks(recipe, 2, "name=straight", "seed=3", **FSDP2).expect(2)
    assert [line for line in said.splitlines() if "lrnn:" in line] == [
        f"lrnn: {straight} holds checkpoints of another recipe (seed: was 0, is 3). "
        "Give this run another name=.., or remove that folder."
    ]
    assert "Traceback" not in said


def test_tasks_that_the_text_cannot_fill(recipe: Path) -> None:
    said = Ranks(recipe, 2, "name=tasks", "eval.tasks=[heldout_cloze]").expect(2)
    assert said.count("lrnn:") == 1
    assert "leave heldout_cloze out" in said
    assert "Traceback" not in said


def test_more_ranks_than_rows(recipe: Path) -> None:
    said = Ranks(recipe, 3, "train.tokens_per_step=128", "train.tokens=512", "name=few").expect(2)
    assert "a step of 2 rows does not split over 3 ranks" in said
    assert said.count("lrnn:") == 1


def test_a_checkpoint_of_another_version(build: Build, recipe: Path, tmp_path: Path, capsys) -> None:
    build("train.tokens=512").run()
    manifest = tmp_path / "tiny/checkpoints/latest/trainer/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 7'))
    main_exits(2, "train", recipe.parent / "tiny.yaml", f"train.runs_dir={tmp_path}")
    errors = capsys.readouterr().err
    assert "written by another version of lrnn-lm (format 7; this one reads 1 and 2)" in errors
    assert len(errors.splitlines()) == 1


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


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_ranks_on_a_cpu_without_gloo(
    recipe: Path, parallel: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before the ranks try to meet, which would be a traceback."""
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    main_exits(2, "train", recipe, f"train.parallel={parallel}", "name=no-gloo")
    assert capsys.readouterr().err.startswith("lrnn: several ranks meet by gloo, which this build of torch")
    assert not (recipe.parent / "runs/no-gloo").exists()
