"""`lrnn submit`: what it writes, what it tells sbatch, and every mistake that it can be told of."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from lrnn_lm.cli import main
from lrnn_lm.recipe import load_recipe, shipped


def lrnn_submit(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exited:
        main(["submit", *map(str, arguments)])
    return exited.value.code or 0


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert lrnn_submit("base.yaml", "--dry-run", *arguments) == 0
    return capsys.readouterr().out


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def finish_run(
    folder: Path, name: str, step: int = 10, scored: int | None = None, **settings: object
) -> None:
    """Leave what a run of `step` steps leaves; settings: of its scores."""
    checkpoints = folder / "runs" / name / "checkpoints"
    (checkpoints / f"step-{step:08d}").mkdir(parents=True)
    (checkpoints / "latest").symlink_to(f"step-{step:08d}")
    if scored is not None:
        (folder / "runs" / name / "eval").mkdir()
        settings = {"tasks": ["heldout_cloze"], "limit": None} | settings
        text = json.dumps({"checkpoint": {"step": scored}, "settings": settings})
        (folder / "runs" / name / "eval/scores.json").write_text(text)


def test_dry_run_prints_the_script_and_writes_nothing(folder, no_slurm, capsys):
    script = dry_run(capsys, "--nodes=2", "--time=2-12", "--sbatch=--mem=0", "--sbatch=--partition=big")
    run = folder / "runs/base"
    assert options(script) == [
        "--job-name=base", "--nodes=2", "--ntasks-per-node=4", "--gres=gpu:4", "--time=2-12",
        "--signal=B:USR1@300", "--requeue", "--open-mode=append", f"--chdir={folder}",
        f"--output={run}/logs/slurm-%j.out", "--mem=0", "--partition=big",
    ]  # fmt: skip
    assert "\nmodule load cuda/12.4 || exit 1\n" in script
    assert f"runs=({run})" in script
    assert '-m lrnn_lm.train "$run/launch/recipe.yaml"' in script
    assert "%%" not in script
    assert [path.name for path in folder.iterdir()] == ["base.yaml"]


def test_every_key_reaches_the_script(folder, capsys):
    launch = {
        "gpus_per_node": 2, "cpus_per_rank": 12, "grace": 60, "attempts": 7, "partition": "gpu",
        "account": 4711, "qos": "long", "modules": ["a", "b c"], "setup": ["export NCCL_DEBUG=INFO"],
        "python": "/opt/py 3/python",
    }  # fmt: skip
    (folder / "base.yaml").write_text(
        yaml.safe_dump(yaml.safe_load((folder / "base.yaml").read_text()) | {"launch": launch})
    )
    script = dry_run(capsys, "--module=d")
    for option in (
        "--cpus-per-task=12",
        "--signal=B:USR1@60",
        "--partition=gpu",
        "--account=4711",
        "--qos=long",
    ):
        assert option in options(script)
    assert "module load 'b c' || exit 1\nmodule load d || exit 1\nexport NCCL_DEBUG=INFO\n" in script
    assert 'rank-%5t.log" --cpus-per-task=12 \\\n' in script
    assert "'/opt/py 3/python' -m lrnn_lm.train" in script
    assert "in 7 starts in a row" in script


def test_cpu_jobs_ask_for_no_gpus(folder, capsys):
    asked = options(dry_run(capsys, "--gpus-per-node=0"))
    assert "--ntasks-per-node=1" in asked
    assert not any(option.startswith("--g") for option in asked)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            (),
            "apptainer exec --nv --bind {here},/elsewhere --pwd {here} --quiet image.sif "
            "python -m lrnn_lm.train",
        ),
        (
            ("launch.container_runtime=pyxis",),
            "--container-image=image.sif --container-mounts={here}:{here},/elsewhere:/elsewhere "
            '--container-workdir={here} --quiet \\\n        bash -c "$rank" rank \\\n        '
            "python -m lrnn_lm.train",
        ),
    ],
)
def test_containers(folder, capsys, more, expected):
    script = dry_run(
        capsys,
        "--container=image.sif",
        "launch.container_options=[--quiet]",
        "train.runs_dir=/elsewhere",
        *more,
    )
    assert expected.format(here=folder) in script


@pytest.mark.parametrize("arguments", [(), ("--array=sweep.yaml", "launch.setup=['export A=\"1 2\"']")])
def test_the_script_is_bash(folder, capsys, arguments):
    (folder / "sweep.yaml").write_text("seed: [1, 2]\n")
    done = subprocess.run(["bash", "-n"], input=dry_run(capsys, *arguments), text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("sweep", [False, True])
def test_the_environment_does_not_win_over_the_script(folder, program, monkeypatch, sweep):
    """sbatch takes SBATCH_TIMELIMIT before the script's --time: what sites and shells set for others must not
    change what the recipe asks for. What the script leaves open is theirs, and so is which SLURM to ask."""
    program("sbatch", "env > environment; echo 7")
    theirs = {"SBATCH_NETWORK": "x", "SBATCH_QOS": "low", "SLURM_CLUSTERS": "b", "SLURM_CONF": "/etc/s"}
    wins = {
        "SBATCH_TIMELIMIT": "10", "SBATCH_NO_REQUEUE": "1", "SBATCH_REQUEUE": "0", "SBATCH_SIGNAL": "TERM@9",
        "SBATCH_OPEN_MODE": "truncate", "SBATCH_OUTPUT": "/dev/null", "SBATCH_JOB_NAME": "x",
        "SBATCH_ARRAY_INX": "0-9", "SBATCH_GRES": "gpu:1", "SBATCH_PARTITION": "cpu",
        "SBATCH_MEM_PER_NODE": "100M", "SBATCH_MEM_PER_CPU": "1M", "SBATCH_CONSTRAINT": "a100",
        "SLURM_NTASKS_PER_NODE": "9",
    }  # fmt: skip
    for name, value in (theirs | wins).items():
        monkeypatch.setenv(name, value)
    (folder / "sweep.yaml").write_text("optim.lr: [1e-3, 2e-3]\n")
    array = ["--array=sweep.yaml"] if sweep else []
    assert lrnn_submit("base.yaml", "--partition=gpu", "--sbatch=--mem=0", "--sbatch=-C h100", *array) == 0
    found = dict(
        line.split("=", 1) for line in (folder / "environment").read_text().splitlines() if "=" in line
    )
    assert {name: found.get(name) for name in theirs} == theirs
    assert not found.keys() & wins.keys()


def test_times_as_yaml_reads_them(folder, capsys):
    (folder / "base.yaml").write_text((folder / "base.yaml").read_text().replace("4,", "4, time: 12:30:00,"))
    assert "--time=12:30:00" in options(dry_run(capsys))
    assert "--time=2:00:00" in options(dry_run(capsys, "launch.time=2:00:00"))
    assert "--time=90" in options(dry_run(capsys, "launch.time=90"))
    assert "--time=0" in options(dry_run(capsys, "--time=0"))


def test_submitted(folder, program, monkeypatch, capsys):
    """sbatch gets the script in the run's folder; settings of a job around us do not reach it."""
    program("sbatch", 'echo "$@" > asked; env > environment; echo "4242;cluster"')
    program("squeue", "exit 1")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    assert lrnn_submit("base.yaml", "--nodes=2", "train.tokens=20K", "--gpus-per-node=2") == 0
    run = folder / "runs/base"
    assert f"base is job 4242; logs in {run}/logs" in capsys.readouterr().out
    assert (folder / "asked").read_text().split() == ["--parsable", f"{run}/launch/job.sh"]
    environment = (folder / "environment").read_text()
    assert "SLURM_CONF=" in environment
    assert "SLURM_CPUS_PER_TASK" not in environment
    snapshot = load_recipe(run / "launch/recipe.yaml")
    wanted = load_recipe("base.yaml", ["train.tokens=20K", "launch.nodes=2", "launch.gpus_per_node=2"])
    assert snapshot == wanted
    assert (run / "logs").is_dir()
    assert (run / "launch/job").read_text() == "4242\n"


def test_not_twice(folder, program, capsys):
    program("sbatch", "echo 7")
    program("squeue", '[[ $2 == --jobs=7 ]] && echo "7 main base"')
    assert lrnn_submit("base.yaml") == 0
    assert lrnn_submit("base.yaml") == 2
    assert "base is in the queue already, as job 7" in capsys.readouterr().err


@pytest.mark.parametrize("array", [(), ("--array=sweep.yaml",)])
def test_a_copy_of_a_run_is_not_in_its_queue(folder, program, capsys, array):
    """The copy's job was that of the original: the copy could not be submitted before it was done."""
    program("sbatch", "echo 7")
    program("squeue", '[[ $2 == --jobs=7* ]] && echo "7 main base"')
    (folder / "sweep.yaml").write_text("seed: [1]\n")
    name = "base-seed_1" if array else "base"
    assert lrnn_submit("base.yaml", *array) == 0
    shutil.copytree(folder / "runs" / name, folder / "runs/copy")
    assert lrnn_submit("base.yaml", "name=copy", "seed=1") == 0
    assert "copy is job 7; logs in" in capsys.readouterr().out
    assert lrnn_submit("base.yaml", "name=copy", "seed=1") == 2, "now it has a job of its own"
    assert "copy is in the queue already, as job 7" in capsys.readouterr().err


def test_an_array(folder, program, capsys):
    program("sbatch", "echo 7")
    program("squeue", '[[ $2 == --jobs=7_3 ]] && echo "7_3 main base"')
    (folder / "sweep.yaml").write_text("optim.lr: [1e-3, 3e-3]\nseed: [1, 2, 3]\n")
    finish_run(folder, "base-lr_0.001-seed_3")
    (folder / "runs/base-lr_0.003-seed_1/launch").mkdir(parents=True)
    (folder / "runs/base-lr_0.003-seed_1/launch/job").write_text("7_3\n")
    assert lrnn_submit("base.yaml", "--array=sweep.yaml", "--array-limit=2") == 0
    told = capsys.readouterr().out
    assert "base-lr_0.001-seed_3 is trained already" in told
    assert "base-lr_0.003-seed_1 is in the queue already, as job 7_3" in told
    assert "base is job 7, an array of 4 runs" in told
    script = (folder / "runs/base.sweep/job.sh").read_text()
    assert "--array=0-1,4-5%2" in options(script)
    assert f"--output={folder}/runs/base.sweep/slurm-%A_%a.out" in options(script)
    for index, name in ((1, "base-lr_0.001-seed_2"), (5, "base-lr_0.003-seed_3")):
        launch = folder / "runs" / name / "launch"
        assert (launch / "job").read_text() == f"7_{index}\n"
        made = load_recipe(launch / "recipe.yaml")
        assert (made.name, made.optim.lr, made.seed) == (name, float(name[8:13]), int(name[-1]))
    assert not (folder / "runs/base-lr_0.001-seed_3/launch").exists()


@pytest.mark.parametrize(
    ("step", "tasks", "scored", "needed"),
    [(10, "[]", None, False), (9, "[]", None, True), (10, "[heldout_cloze]", None, True),
     (10, "[heldout_cloze]", 10, False), (10, "['heldout_c*']", 10, False), (10, "[heldout_cloze]", 5, True),
     (10, "[heldout_cloze, heldout_bits_per_byte]", 10, True)],
)  # fmt: skip
def test_finished_runs(folder, program, capsys, step, tasks, scored, needed):
    program("sbatch", "echo 7")
    finish_run(folder, "base", step, scored)
    (folder / "runs/base/eval").mkdir(exist_ok=True)
    (folder / "runs/base/eval/other.json").write_text("[1]")
    (folder / "runs/base/eval/length.json").write_text(json.dumps({"checkpoint": {"step": step}}))  # a probe
    assert lrnn_submit("base.yaml", f"eval.tasks={tasks}") == 0
    assert (folder / "runs/base/launch/job").exists() == needed
    assert ("is trained already" in capsys.readouterr().out) != needed


@pytest.mark.parametrize("setting", [{"given_length": 512}, {"prompt_twice": True}, {"other_text": "in x"}])
def test_scores_taken_another_way_do_not_finish_a_run(folder, program, setting):
    program("sbatch", "echo 7")
    finish_run(folder, "base", scored=10, **setting)
    assert lrnn_submit("base.yaml", "eval.tasks=[heldout_cloze]") == 0
    assert (folder / "runs/base/launch/job").exists()


@pytest.mark.parametrize(
    ("asked", "limit", "needed"), [("null", 9, True), (9, 5, True), (9, 9, False), (9, None, False)]
)
def test_scores_of_a_few_documents_do_not_finish_a_run(folder, program, asked, limit, needed):
    """As of a quick look by hand."""
    program("sbatch", "echo 7")
    finish_run(folder, "base", scored=10, limit=limit, given_length=None, prompt_twice=False)
    assert lrnn_submit("base.yaml", "eval.tasks=[heldout_cloze]", f"eval.limit={asked}") == 0
    assert (folder / "runs/base/launch/job").exists() == needed


MISTAKES = [
    (("base.yaml", "--nodes=0"), "launch.nodes: input should be greater than or equal to 1"),
    (("base.yaml", "--gpus-per-node=-1"), "launch.gpus_per_node"),
    (("base.yaml", "--time=soon"), "launch.time: expected a time such as 90 (minutes), 24:00:00"),
    (("base.yaml", "--time=1:00:75"), "launch.time"),
    (("base.yaml", "--time=5"), "time 5 is over before the job is told to save"),
    (("base.yaml", "--partition=two words"), "launch.partition"),
    (("base.yaml", "--account="), "launch.account"),
    (("base.yaml", "--sbatch=mem=0"), "expected an option of sbatch such as --mem=0, not 'mem=0'"),
    (("base.yaml", "--sbatch=--array=1-4"), "--array is set by `lrnn submit` itself"),
    (("base.yaml", "--sbatch=-N4"), "'-N4': --nodes is set by `lrnn submit` itself"),
    (("base.yaml", "--sbatch=--mem=0\n#SBATCH --wrap=x"), "an option of sbatch such as"),
    (("base.yaml", "--module="), "one line each"),
    (("base.yaml", "--array-limit=0"), "launch.array_limit"),
    (("base.yaml", "--array-limit=2"), "--array-limit is for the runs of an array: give --array SWEEP"),
    (("base.yaml", "--nodes=3"), "a step of 16 rows does not split over 12 ranks"),
    (("base.yaml", "optim.name=muonn"), "optim.name: 'muonn' is not known; did you mean 'muon'"),
    (("base.yaml", "train.shard_size=3"), "train.shard_size 3 does not divide"),
    (("base.yaml", "launch.node=3"), "launch.node: unknown key; did you mean 'nodes'?"),
    (("base.yaml", "launch.template=none.sh"), "launch.template: none.sh: no such file"),
    (("base.yaml", "launch.template=base.yaml"), "base.yaml: lacks or does not know %%attempts, %%command"),
    (("base.yaml", "name=a b"), "name: takes letters a to z, digits"),
    (("base.yaml", "train.runs_dir=my runs"), "sbatch cannot be given a path with ' ' in it"),
    (("base.yaml", "train.runs_dir=100%"), "sbatch cannot be given a path with '%' in it"),
    (("nowhere.yaml",), "nowhere.yaml: no such recipe file"),
    (("broken.yaml",), "broken.yaml: not valid YAML"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_mistakes(folder, program, capsys, arguments, words):
    program("sbatch", "touch submitted; echo 1")
    (folder / "broken.yaml").write_text("a: [\n")
    assert lrnn_submit(*arguments) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.startswith("lrnn: ")
    assert len(told.splitlines()) <= 2
    assert sorted(path.name for path in folder.iterdir()) == ["base.yaml", "broken.yaml"]


def test_no_sbatch(folder, no_slurm, capsys):
    assert lrnn_submit("base.yaml") == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_sbatch_refuses(folder, program, capsys):
    program("sbatch", "echo 'sbatch: error: invalid partition specified: moon' >&2; exit 1")
    assert lrnn_submit("base.yaml") == 2
    assert "job.sh: invalid partition specified: moon" in capsys.readouterr().err
    assert not (folder / "runs/base/launch/job").exists()


def test_a_template_of_ones_own(folder, capsys):
    text = shipped("slurm/job.sh").read_text().replace("#!/bin/bash", "#!/bin/bash -l")
    (folder / "mine.sh").write_text(text)
    assert dry_run(capsys, "launch.template=mine.sh").startswith("#!/bin/bash -l\n#SBATCH")
