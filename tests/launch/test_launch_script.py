"""The job script, run as it is, with small programs in place of srun and scontrol: what becomes of the job.

The same with SLURM itself: `make test-slurm`.
"""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lrnn_lm.launch.script import job_script
from lrnn_lm.recipe import load_recipe

# One task after the other; exits with the highest code, as srun does.
SRUN = """
while [[ $1 == --* ]]; do shift; done
worst=0
trap : USR1
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@"
    code=$?
    ((code > worst)) && worst=$code
done
exit $worst
"""
SLOW_SRUN = """
trap 'sleep 0.3; echo 85 > "$LRNN_LOGS/exit-0"; exit 0' USR1
touch "$SEEN.ready"
while :; do sleep 0.05; done
"""
SCONTROL = """
case "$*" in
    "show hostnames"*) printf 'node7\\nnode8\\n' ;;
    "--oneliner show node node7") echo 'NodeName=node7 Arch=x NodeAddr=10.1.2.3 NodeHostName=node7' ;;
    "show job"*)
        echo "   JobState=${STATE:-RUNNING} Reason=None"
        echo "   Requeue=1 Restarts=${RESTARTS:-${SLURM_RESTART_COUNT:-0}} BatchFlag=1" ;;
    requeue*) echo "$2" >> "$REQUEUED" ;;
esac
"""
# A rank: says where it is, and ends as rank RANK of the list CODES (`kill`: before it can say how).
RANK = """
here="rank ${RANK-none} of ${WORLD_SIZE-1} local ${LOCAL_RANK-none}"
echo "$here at $MASTER_ADDR:$MASTER_PORT: $*" >> "$SEEN"
codes=($CODES)
code=${codes[${RANK:-0}]}
[[ -z $SAVED ]] || { mkdir -p "$SAVED"; ln -sfn "$NAME" "$SAVED/latest"; }
[[ $code != kill ]] || kill -9 $PPID
exit $code
"""


@dataclass
class Done:
    code: int
    told: str
    seen: list[str]
    requeued: list[str]


class Job:
    """A job of the base recipe on two nodes of two ranks, whose script can be run again and again."""

    def __init__(self, folder: Path, python: Path, runs: int = 1):
        launch = load_recipe("base.yaml").launch.model_copy(
            update={"nodes": 2, "gpus_per_node": 2, "modules": [], "python": str(python)}
        )
        self.runs = [folder / f"runs/run{index}" for index in range(runs)]
        for run in self.runs:
            (run / "launch").mkdir(parents=True)
        self.folder = folder
        (folder / "job.sh").write_text(job_script(launch, "base", self.runs, folder / "out"))

    def environment(self, codes: str, restart: int, **more: str) -> dict[str, str]:
        fixed = {
            "SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "4", "SLURM_NNODES": "2",
            "CODES": codes, "SEEN": f"{self.folder}/seen", "REQUEUED": f"{self.folder}/requeued", "SAVED": "",
        }  # fmt: skip
        return os.environ | fixed | ({"SLURM_RESTART_COUNT": str(restart)} if restart else {}) | more

    def start(self, codes: str, restart: int = 0, **more: str) -> subprocess.Popen[str]:
        for name in ("seen", "requeued"):
            (self.folder / name).write_text("")
        return subprocess.Popen(
            ["bash", str(self.folder / "job.sh")], env=self.environment(codes, restart, **more),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str]) -> Done:
        told = process.communicate(timeout=30)[0]
        seen, requeued = ((self.folder / name).read_text().splitlines() for name in ("seen", "requeued"))
        return Done(process.returncode, told, seen, requeued)

    def run(self, codes: str, restart: int = 0, **more: str) -> Done:
        return self.finish(self.start(codes, restart, **more))


@pytest.fixture
def python(program) -> Path:
    program("srun", SRUN)
    program("scontrol", SCONTROL)
    return program("python-of-a-rank", RANK)


@pytest.fixture
def job(folder: Path, python: Path) -> Job:
    return Job(folder, python)


def test_ranks_know_each_other(job):
    done = job.run("0 0 0 0")
    where = f"at 10.1.2.3:10031: -m lrnn_lm.train {job.runs[0]}/launch/recipe.yaml"
    assert done.seen == [f"rank {rank} of 4 local {rank} {where}" for rank in range(4)]


def test_one_rank_trains_as_if_alone(job):
    done = job.run("0", SLURM_NTASKS="1", SLURM_NNODES="1")
    assert done.seen[0].startswith("rank none of 1 local none")


@pytest.mark.parametrize(
    ("codes", "ends", "requeued", "words"),
    [
        ("0 0 0 0", 0, False, "done"),
        ("85 85 85 85", 0, True, "stopped after saving"),
        ("2 1 1 1", 2, False, "a mistake in what was asked: "),
        ("kill 2 kill kill", 2, False, "a mistake in what was asked: "),
        ("1 1 1 1", 0, True, "exit code 1;"),
        ("0 1 0 0", 0, False, "done"),  # the first rank had scored the trained model
        ("kill 3 kill kill", 0, True, "exit code 3;"),
        ("kill kill kill kill", 0, True, "exit code 137;"),
        ("85 kill 85 85", 0, True, "stopped after saving"),
    ],
)
def test_what_becomes_of_the_job(job, codes, ends, requeued, words):
    done = job.run(codes)
    assert words in done.told
    assert (done.code, done.requeued) == (ends, ["31"] if requeued else [])


def test_starts_without_a_new_checkpoint_are_counted(job):
    assert [job.run("1 1 1 1", restart).requeued for restart in range(2)] == [["31"]] * 2
    saved = {"SAVED": f"{job.runs[0]}/checkpoints", "NAME": "step-1"}
    assert job.run("1 1 1 1", 2, **saved).requeued == ["31"]
    assert [job.run("85 85 85 85", restart).requeued for restart in (3, 4)] == [["31"]] * 2
    last = job.run("85 85 85 85", 5)
    assert (last.code, last.requeued) == (85, [])
    assert "no new checkpoint in the last 3 starts: given up" in last.told
    assert job.run("1 1 1 1", 0).requeued == ["31"]  # submitted anew


def test_starts_that_slurm_cut_short_count_too(job):
    """A node that dies takes the script with it, before it can judge."""
    for restart in range(3):
        (job.runs[0] / "launch/starts").write_text(f"none {restart}\n")
        assert ("given up" in job.run("0 0 0 0", restart + 1).told) == (restart == 2)


def test_requeued_before_its_script_ever_ran(job):
    """A node that dies as the job is being started: SLURM counts a restart, of which nothing is left."""
    done = job.run("0 0 0 0", 1)
    assert (done.code, len(done.seen)) == (0, 4)
    assert (job.runs[0] / "launch/starts").read_text() == "none 0\n"


def test_nothing_starts_uncounted(job):
    """Where the count cannot be written, as on a full disk, the job ends rather than go on for ever."""
    (job.runs[0] / "launch/starts").mkdir()
    done = job.run("1 1 1 1")
    assert (done.code, done.seen, done.requeued) == (1, [], [])
    done = job.run("1 1 1 1", 1)
    assert (done.code, done.seen, done.requeued) == (1, [], [])


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_cancelled(job, state):
    done = job.run("85 85 85 85", STATE=state)
    assert (done.code, done.requeued) == (85, [])
    assert "SLURM is ending this job itself: not put back into the queue" in done.told


def test_a_start_that_slurm_has_given_up(job):
    """The script of a node that was taken for dead must not touch the job, which runs elsewhere by now."""
    done = job.run("1 1 1 1", RESTARTS="1")
    assert (done.code, done.requeued) == (1, [])
    assert "started anew meanwhile" in done.told


def test_elements_of_an_array(folder, python):
    """An element's run, and its name for scontrol: by its job id the last one would requeue them all."""
    job = Job(folder, python, runs=3)
    done = job.run("85 85 85 85", SLURM_ARRAY_JOB_ID="31", SLURM_ARRAY_TASK_ID="2")
    assert done.requeued == ["31_2"]
    assert f"{job.runs[2]}/launch/recipe.yaml" in done.seen[0]
    assert (job.runs[2] / "logs/31_2-start0/exit-0").read_text() == "85\n"
    done = job.run("0", SLURM_ARRAY_JOB_ID="31", SLURM_ARRAY_TASK_ID="3")
    assert (done.code, done.seen) == (1, [])


def test_setup_that_fails_ends_the_job(folder, python):
    job = Job(folder, python)
    script = folder / "job.sh"
    script.write_text(
        script.read_text().replace("export MASTER_ADDR", "module load cuda/0 || exit 1\nexport MASTER_ADDR")
    )
    done = job.run("0 0 0 0")
    assert (done.code, done.seen, done.requeued) == (1, [], [])


def test_a_signal_is_passed_on_and_waited_for(folder, program, python):
    """SIGUSR1 reaches the step; the script waits for its end, and requeues though SLURM ends the job."""
    program("srun", SLOW_SRUN)
    job = Job(folder, python)
    process = job.start("", STATE="COMPLETING")
    ready, end = folder / "seen.ready", time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    done = job.finish(process)
    assert "SIGUSR1: asked the ranks to save and stop" in done.told
    assert "stopped after saving" in done.told
    assert done.requeued == ["31"]
