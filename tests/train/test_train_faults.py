"""Of several ranks one is asked to stop, dies, computes nonsense or finds a mistake: all end alike."""

import multiprocessing
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from forks import LIBRARIES
from rank_runs import Forked, Prank, Ranks, free_port
from safetensors.torch import load_file
from tiny_run import environment, finish, losses, metrics, start, validations, write_recipe
from trainers import Build, main_exits

from lrnn_lm.files import world_size
from lrnn_lm.runs import checkpoint
from lrnn_lm.train.exchange import StepResult
from lrnn_lm.train.loop import Trainer

ROWS, FSDP2 = 8, {"parallel": "fsdp2"}


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


@pytest.mark.parametrize("workers", [0, 1])  # with one the validation is the first to miss it
def test_text_that_is_lost_costs_no_step(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cleaned cache, say: the steps are saved whose rows were read, and the tokenizer with them."""
    recipe = write_recipe(tmp_path, data={"shard_tokens": 500})
    options = (f"data.num_workers={workers}", "checkpoint.every=100 steps")

    def cleaned(trainer: Trainer, *arguments: object) -> StepResult:
        if trainer.position.step == 4:
            shutil.rmtree(tmp_path / "cache")
        return step(trainer, *arguments)

    step = Trainer.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", cleaned)
        main_exits(2, "train", recipe, *options)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lrnn: ")]
    assert re.search(
        r"could not read the (rows of step \d+|held-out text): .*No such file or directory", said
    )
    (saved,) = checkpoint.list_checkpoints(tmp_path / "runs/tiny/checkpoints")
    assert checkpoint.read_position(saved).step == losses(tmp_path / "runs/tiny")[-1][0] >= 5
    main_exits(0, "train", recipe, *options)
    main_exits(0, "train", recipe, *options, "name=straight")
    assert losses(tmp_path / "runs/tiny") == losses(tmp_path / "runs/straight")


def test_a_killed_worker_costs_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the system does where memory is short: it ends as a stopped run, which a scheduler starts again."""
    recipe = write_recipe(tmp_path)
    options = ("data.num_workers=1", "checkpoint.every=100 steps")

    def killed(trainer: Trainer, *arguments: object) -> StepResult:
        if trainer.position.step == 6:
            for worker in multiprocessing.active_children():
                worker.kill()
        return step(trainer, *arguments)

    step = Trainer.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        main_exits(85, "train", recipe, *options)
    said = capsys.readouterr().err
    assert "DataLoader worker" in said
    assert "Traceback" not in said
    (saved,) = checkpoint.list_checkpoints(tmp_path / "runs/tiny/checkpoints")
    assert checkpoint.read_position(saved).step == losses(tmp_path / "runs/tiny")[-1][0] >= 7
    main_exits(0, "train", recipe, *options)


def test_first_rows_that_one_rank_cannot_read(recipe: Path) -> None:
    ranks = Ranks(recipe, 2, "name=first", prank=Prank(rank=1, lost=True))
    assert ranks.wait() == [2, 2]
    assert ranks.errors.count("could not read the rows of step 1") == 1
    assert "Traceback" not in ranks.errors


def test_text_that_one_rank_lost(recipe: Path, straight: Path) -> None:
    """In a step, then after a validation, which the next one finds."""
    for step, validating, text, last in ((2, False, "rows of step 3", 2), (3, True, "held-out text", 6)):
        prank = Prank(rank=1, step=step, validating=validating, lost=True)
        ranks = Ranks(recipe, 2, "name=lost", prank=prank, **FSDP2)
        assert ranks.wait() == [85, 2]
        assert f"could not read the {text}" in ranks.errors
        assert (
            f"stopped by text that another rank could not read after step {last} of 6; saved" in ranks.errors
        )
        assert "Traceback" not in ranks.errors
    Ranks(recipe, 2, "name=lost", **FSDP2).expect()
    same(recipe.parent / "runs/lost", straight)


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


# `lrnn train` where torch and transformers are imported, and nothing of this package; says its number.
TRAINING = """
import os, sys
open(sys.argv.pop(1), "w").write(str(os.getpid()))
sys.argv[1:1] = ["train"]
from lrnn_lm.cli import main
main()
"""


@pytest.mark.parametrize("rank", [0, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (None, 1))])
def test_a_signal_before_the_ranks_have_met(tmp_path: Path, rank: int | None) -> None:
    """As its imports are made, alone or on one of two: none waits for one that has left."""
    recipe, number = write_recipe(tmp_path), tmp_path / "number"
    met = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [met | {"RANK": r, "LOCAL_RANK": r} for r in "01"] if rank is not None else [{}]
    with ThreadPoolExecutor(1) as pool:
        env = environment() | ranks.pop(rank or 0)
        victim = pool.submit(LIBRARIES.run, TRAINING, number, recipe, env=env)
        others = [Forked(recipe, first=partial(stand_at, places)) for places in ranks]
        while (
            not number.exists()
            or not number.read_text()
            or not hears(int(number.read_text()), signal.SIGUSR1)
        ):
            assert not victim.done(), victim.result()
            time.sleep(0.002)
        os.kill(int(number.read_text()), signal.SIGUSR1)
        done = victim.result()
    for code, errors in ((done.returncode, done.stderr), *(other.finish() for other in others)):
        assert code == 85, errors
        assert "Traceback" not in errors


@pytest.mark.slow
def test_a_signal_while_torch_is_imported(tmp_path: Path) -> None:
    process = start(write_recipe(tmp_path))
    while not hears(process.pid, signal.SIGUSR1):
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    code, errors = finish(process)
    assert code == 85, errors
    assert "Traceback" not in errors


def stand_at(places: dict[str, str]) -> None:
    os.environ.update(places)


def hears(process: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for this signal."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("mistake", ["model.hiden_size=4", "train.precision=bf16"])
def test_a_mistake_that_every_rank_sees_is_told_once(recipe: Path, mistake: str) -> None:
    """Before the ranks have met, by the first one."""
    if mistake.endswith("bf16") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    said = Ranks(recipe, 2, "name=all-see", mistake).expect(2)
    assert said.count("lrnn:") == 1
    assert len(said.splitlines()) <= 2
    assert mistake.split("=")[0] in said


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
    assert "ask for heldout_bits_per_byte alone" in said
    assert "Traceback" not in said


def test_more_ranks_than_rows(recipe: Path) -> None:
    said = Ranks(recipe, 3, "train.tokens_per_step=128", "train.tokens=512", "name=few").expect(2)
    assert "a step of 2 rows does not split over 3 ranks" in said
    assert said.count("lrnn:") == 1


def test_a_checkpoint_of_another_version(build: Build, recipe: Path, tmp_path: Path, capsys) -> None:
    build("train.tokens=512").run()
    manifest = tmp_path / "tiny/checkpoints/latest/trainer/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 7'))
    capsys.readouterr()  # progress, if this test is the first to prepare the data
    main_exits(2, "train", recipe.parent / "tiny.yaml", f"train.runs_dir={tmp_path}")
    errors = capsys.readouterr().err
    assert "written by another version of lrnn-lm (format 7; this one reads 1 and 2)" in errors
    assert len(errors.splitlines()) == 1


RANKS = [
    {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": local} for rank in ("2", "-1", "x") for local in "01"
]


@pytest.mark.parametrize(
    "places", [*RANKS, {"RANK": "1", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "none"}], ids=str
)
def test_a_rank_that_is_none_of_those_that_meet(
    recipe: Path, places: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It waited for ever, deaf to signals. Told by whichever rank it is, as others may be right."""
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    main_exits(2, "train", recipe, "name=no-rank")
    rank, size = places.get("RANK", "0"), places.get("WORLD_SIZE", "1")
    errors = capsys.readouterr().err
    assert errors.startswith(f"lrnn: the environment has RANK={rank} and WORLD_SIZE={size}: ranks count")
    assert len(errors.splitlines()) == 1
    assert not (recipe.parent / "runs/no-rank").exists()


def test_a_rank_without_others_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in jobs whose script sets RANK for programs of its own."""
    monkeypatch.setenv("RANK", "3")
    assert world_size() == 1


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
