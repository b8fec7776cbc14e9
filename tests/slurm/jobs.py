"""`lrnn submit` on a real SLURM (`make test-slurm`): preempted, requeued, resumed, finished, same weights.

Not collected by `make test`. Jobs that need no help are submitted first and looked at last: most of the time
goes into starts of Python and SLURM's clock. What jobs are compared with is trained outside SLURM, in forks
of a process that has imported all.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from cluster import CannotRunError, Cluster
from rank_runs import Forked, Ranks
from tiny_run import TOKENS_PER_STEP, environment, fingerprint, losses, validations, write_recipe

pytestmark = pytest.mark.timeout(900)  # on a busy machine
STEPS = 250
LAST = f"checkpoints/step-{STEPS:08d}"
LONG = (f"train.tokens={STEPS * TOKENS_PER_STEP}", "checkpoint.every=1000 steps", "eval.every=150 steps")
SHORT = "train.tokens=1024"
# In place of Python where the script is what matters: its first start waits for a signal, its second is done.
WAITER = """#!/bin/bash
[[ -e {folder}/waited ]] && exit 0
touch {folder}/waited
trap 'mkdir -p {run}/checkpoints; ln -s step-1 {run}/checkpoints/latest; exit 85' USR1
sleep 300 & wait
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    try:
        with Cluster() as running:
            yield running
    except CannotRunError as reason:
        pytest.skip(f"no SLURM can run here: {reason}")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="session")
def recipe(folder: Path) -> Path:
    """Its runs lie below the folder that the jobs are submitted from."""
    path = write_recipe(folder, train={"runs_dir": "runs"})
    path.write_text(path.read_text() + "launch: {gpus_per_node: 0}\n")
    return path


Submit = Callable[..., str]


@pytest.fixture(scope="session")
def lrnn_submit(
    cluster: Cluster, folder: Path, recipe: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`lrnn submit tiny.yaml ..` from the recipe's folder, which it names by a relative path."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lrnn_lm.cli", "submit", recipe.name, *arguments],
            env=environment() | cluster.environment | {"OMP_NUM_THREADS": "1"},
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def submit(folder: Path, lrnn_submit: Callable[..., subprocess.CompletedProcess[str]]) -> Submit:
    """The id of the job that `lrnn submit` made of a run."""

    def run(name: str, *arguments: str) -> str:
        done = lrnn_submit(f"name={name}", *arguments)
        assert done.returncode == 0, done.stderr
        return (folder / "runs" / name / "launch/job").read_text().strip()

    return run


@pytest.fixture(scope="session")
def waiting(folder: Path, submit: Submit) -> dict[str, str]:
    """Jobs that run while others are tested: they wait for their time limit, crash or err."""
    waiter, crasher = folder / "waiter.sh", folder / "crasher.sh"
    waiter.write_text(WAITER.format(folder=folder, run=folder / "runs/limit"))
    crasher.write_text("#!/bin/bash\necho about to crash\nexit 1\n")
    for script in (waiter, crasher):
        script.chmod(0o755)
    return {
        "limit": submit("limit", "--time=3", "launch.grace=170", f"launch.python={waiter}"),
        "crash": submit("crash", "launch.attempts=2", f"launch.python={crasher}"),
        "mistake": submit("mistake", "data.source.path=nowhere.jsonl"),
    }


@pytest.fixture(scope="session")
def swept(
    lrnn_submit: Callable[..., subprocess.CompletedProcess[str]], recipe: Path, folder: Path
) -> tuple[dict[str, str], list[str]]:
    """An array of three runs, one of which is trained already: its fingerprint, and the others' jobs."""
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"seed": [1, 2, 3]}))
    trained = Forked(recipe, SHORT, f"train.runs_dir={folder}/runs", "seed=2", "name=tiny-seed_2")
    code, said = trained.finish()
    assert code == 0, said
    before = fingerprint(folder / "runs/tiny-seed_2/checkpoints/latest")
    made = lrnn_submit(SHORT, "--array=sweep.yaml", "--array-limit=1")
    assert made.returncode == 0, made.stderr
    assert "tiny-seed_2 is trained already" in made.stdout
    assert "an array of 2 runs" in made.stdout
    jobs = [(folder / f"runs/tiny-seed_{seed}/launch/job").read_text().strip() for seed in (1, 3)]
    assert [job.split("_")[1] for job in jobs] == ["0", "2"]
    again = lrnn_submit(SHORT, "--array=sweep.yaml")
    assert again.stdout.count("is in the queue already") == 2, again.stdout
    return before, jobs


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def steps(run: Path) -> int:
    return len(losses(run)) if (run / "metrics.jsonl").exists() else 0


def script_output(run: Path, job: str) -> str:
    return (run / f"logs/slurm-{job}.out").read_text()


def assert_same_end(run: Path, straight: Path) -> None:
    assert losses(run) == losses(straight)
    assert validations(run) == validations(straight)
    assert fingerprint(run / LAST) == fingerprint(straight / LAST)


def test_signalled_requeued_resumed(
    cluster: Cluster, submit: Submit, waiting: dict[str, str], swept: object, recipe: Path, folder: Path
) -> None:
    """One rank, told to stop by `scancel --signal`; the undisturbed run is one of `lrnn train`."""
    job = submit("signalled", *LONG)
    run = folder / "runs/signalled"
    wait_until(lambda: steps(run) >= 20)
    cluster.run("scancel", "--signal=USR1", job)
    undisturbed = Forked(recipe, *LONG, f"train.runs_dir={folder}/runs", "name=straight")
    record = cluster.wait_for(job, "COMPLETED")
    code, said = undisturbed.finish()
    assert code == 0, said
    assert record["Restarts"] == "1"
    told = script_output(run, job)
    assert "stopped after saving step-" in told
    assert "back into the queue" in told
    assert told.rstrip().endswith("done")
    first, second = (run / f"logs/{job}-start{start}/rank-00000.log" for start in (0, 1))
    assert "stopped by SIGUSR1 after step" in first.read_text()
    assert f"signalled is trained: {STEPS} steps" in second.read_text()
    assert_same_end(run, folder / "runs/straight")


def test_preempted_and_killed_on_two_nodes(
    cluster: Cluster, submit: Submit, waiting: dict[str, str], recipe: Path, folder: Path
) -> None:
    """A rank on each of two nodes: a job of more priority takes them, they come back, one rank is killed."""
    job = submit("harmed", *LONG, "--nodes=2", "--gpus-per-node=1", "--partition=low")
    options = (*LONG, f"train.runs_dir={folder}/runs", "name=straight-two")
    undisturbed = Ranks(recipe, 2, *options, parallel="auto")
    run = folder / "runs/harmed"
    wait_until(lambda: steps(run) >= 20)
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
        "--time=5", "--wrap=true",
    )  # fmt: skip
    cluster.wait_for(urgent, "COMPLETED")
    first, second = (run / f"logs/{job}-start{start}" for start in (0, 1))
    assert "stopped by SIGTERM after step" in (first / "rank-00000.log").read_text()
    assert [(first / f"exit-{rank}").read_text() for rank in (0, 1)] == ["85\n", "85\n"]
    saved = int((run / "checkpoints/latest").resolve().name.removeprefix("step-"))
    wait_until(lambda: second.exists() and steps(run) >= saved + 20)
    os.kill(rank_process(job, 1), signal.SIGKILL)
    assert cluster.wait_for(job, "COMPLETED")["Restarts"] == "2"
    assert (second / "exit-1").read_text() == "137\n"
    assert f"from checkpoint step-{saved:08d}" in script_output(run, job).split("start 2")[1]
    undisturbed.expect()
    assert_same_end(run, folder / "runs/straight-two")


def rank_process(job: str, rank: int) -> int:
    """The process id of a rank's trainer."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"RANK={rank}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            around = set((process / "environ").read_bytes().split(b"\0"))
        except OSError:  # it is gone
            continue
        if words[1:3] == [b"-m", b"lrnn_lm.train"] and wanted <= around:
            return int(process.name)
    raise AssertionError(f"no rank {rank} of job {job}")


def test_an_array_leaves_out_what_is_finished(
    cluster: Cluster,
    lrnn_submit: Callable[..., subprocess.CompletedProcess[str]],
    swept: tuple[dict[str, str], list[str]],
    folder: Path,
) -> None:
    before, jobs = swept
    for seed, job in zip((1, 3), jobs, strict=True):
        assert cluster.wait_for(job, "COMPLETED")["Restarts"] == "0"
        assert (folder / f"runs/tiny-seed_{seed}/checkpoints/latest").resolve().name == "step-00000002"
        assert (folder / f"runs/tiny.sweep/slurm-{job}.out").read_text().rstrip().endswith("done")
    assert fingerprint(folder / "runs/tiny-seed_2/checkpoints/latest") == before
    assert not (folder / "runs/tiny-seed_2/logs").exists()
    third = lrnn_submit(SHORT, "--array=sweep.yaml")
    assert (third.returncode, third.stdout.count("is trained already")) == (0, 3)


def test_a_mistake_is_not_requeued(cluster: Cluster, waiting: dict[str, str], folder: Path) -> None:
    job = waiting["mistake"]
    record = cluster.wait_for(job, "FAILED", "COMPLETED")
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "2:0", "0")
    assert "nowhere.jsonl" in script_output(folder / "runs/mistake", job).splitlines()[-1]


def test_cancelled_stays_cancelled(
    cluster: Cluster,
    submit: Submit,
    lrnn_submit: Callable[..., subprocess.CompletedProcess[str]],
    folder: Path,
) -> None:
    """`scancel` saves, too, but does not requeue; while the job runs it cannot be submitted again."""
    job = submit("cancelled", *LONG)
    run = folder / "runs/cancelled"
    wait_until(lambda: steps(run) >= 5)
    again = lrnn_submit("name=cancelled", *LONG)
    assert again.returncode == 2
    assert f"cancelled is in the queue already, as job {job}" in again.stderr
    cluster.run("scancel", job)
    wait_until(lambda: "not put back into the queue" in script_output(run, job))
    assert cluster.wait_for(job, "CANCELLED")["Restarts"] == "0"
    assert (run / "checkpoints/latest").is_symlink()
    time.sleep(1)
    assert cluster.job(job)["JobState"] == "CANCELLED"


def test_a_job_that_crashes_again_and_again_ends(
    cluster: Cluster, waiting: dict[str, str], folder: Path
) -> None:
    record = cluster.wait_for(waiting["crash"], "FAILED")
    assert (record["Restarts"], record["ExitCode"]) == ("1", "1:0")
    told = script_output(folder / "runs/crash", waiting["crash"])
    assert "no new checkpoint in the last 2 starts: given up" in told


def test_told_before_the_time_limit(cluster: Cluster, waiting: dict[str, str], folder: Path) -> None:
    record = cluster.wait_for(waiting["limit"], "COMPLETED")
    assert record["Restarts"] == "1"
    assert "SIGUSR1: asked the ranks to save and stop" in script_output(
        folder / "runs/limit", waiting["limit"]
    )
