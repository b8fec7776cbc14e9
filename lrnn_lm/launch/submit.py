"""`lrnn submit`: a recipe, or a sweep over one, as a SLURM job that restarts until it is trained.

runs/NAME/launch/recipe.yaml    the resolved recipe of the job: the original may be edited meanwhile
runs/NAME/launch/job.sh         the script that sbatch got
runs/NAME/launch/job            the id of the job, or `ID_INDEX` in an array
runs/NAME/logs/                 output of the job, and for each start a folder with a file a rank
runs/NAME.sweep/                of an array: job.sh, and the output of each element
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..files import user_path
from ..recipe import Recipe, dump_recipe, load_recipe, read_yaml, recipe_from_dict
from ..recipe.optim import check_optimizer
from ..runs.branch import find_parent
from ..runs.layout import RunFolder, latest_checkpoint, step_of
from .script import job_script
from .sweep import base_name, read_sweep


def submit(
    recipe: Path,
    overrides: list[str] | None = None,
    launch: dict[str, Any] | None = None,
    sweep: Path | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
    from_checkpoint: Path | None = None,
) -> str | None:
    """Write the job script of a recipe and give it to sbatch; returns the job's id.

    Args:
        recipe: a recipe file; its relative paths start at the current folder, in the job too.
        overrides: `section.key=value`.
        launch: values of the launch section in place of the recipe's; a list is added to the recipe's.
        sweep: a file of `read_sweep`: an array with a job a run, without runs that are finished or queued.
        dry_run: print the script and write nothing.
        from_checkpoint: each run is a branch of this checkpoint.
    Returns None if nothing was submitted: a dry run, or everything is finished or queued.
    Raises ValueError if the recipe, the sweep or the launch section cannot be used, there is no sbatch, it
        refuses the job, or the run is queued already.
    """
    recipes = read_sweep(sweep, recipe, overrides or []) if sweep else [load_recipe(recipe, overrides)]
    recipes = [_with_launch(made, launch or {}) for made in recipes]
    for made in recipes:
        check_optimizer(made.optim.name)
        made.check_ranks(made.launch.ranks, made.train.parallel)  # before hours in the queue
    runs = [(user_path(made.train.runs_dir) / made.name).absolute() for made in recipes]
    if not dry_run and shutil.which("sbatch") is None:
        raise ValueError(
            "there is no sbatch here: `lrnn submit` runs where SLURM's commands are, on a login node; "
            "--dry-run prints the script"
        )
    parents = [find_parent(made, run, from_checkpoint) for made, run in zip(recipes, runs, strict=True)]
    todo = _unfinished(recipes, runs, sweep is not None, dry_run, say)
    if not todo:
        return None
    if sweep is None:
        run = RunFolder(runs[0])
        name, folder, output = recipes[0].name, run.launch, run.logs / "slurm-%j.out"
    else:
        name = base_name(sweep, recipe, overrides or [])
        folder = runs[0].parent / f"{name}.sweep"
        output = folder / "slurm-%A_%a.out"
    script = job_script(recipes[0].launch, name, runs, output, todo if sweep else None)
    if dry_run:
        say(script.removesuffix("\n"))
        return None
    for index in todo:
        _write(RunFolder(runs[index]).launch / "recipe.yaml", dump_recipe(recipes[index]))
        if parents[index] is not None:  # the job's `lrnn train` finds it there
            _write(RunFolder(runs[index]).parent, json.dumps(parents[index], indent=1) + "\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(folder / "job.sh", script)
    job = _sbatch(folder / "job.sh")
    for index in todo:
        _write(RunFolder(runs[index]).job, f"{job}_{index}\n" if sweep else f"{job}\n")
    where = output.parent if sweep else RunFolder(runs[0]).logs
    say(f"{name} is job {job}" + (f", an array of {len(todo)} runs" if sweep else "") + f"; logs in {where}")
    return job


def _with_launch(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with other launch keys; RecipeError if they are wrong."""
    data = recipe.model_dump(mode="json")
    for key, value in changes.items():
        data["launch"][key] = [*data["launch"][key], *value] if isinstance(value, list) else value
    return recipe_from_dict(data, where="command line")


def _unfinished(
    recipes: list[Recipe], runs: list[Path], sweep: bool, dry_run: bool, say: Callable[[str], None]
) -> list[int]:
    """Indices of the runs that are neither queued nor finished; ValueError for one that is queued alone."""
    todo = []
    for index, (recipe, run) in enumerate(zip(recipes, runs, strict=True)):
        if not dry_run and (job := _queued(run)):
            queued = f"{recipe.name} is in the queue already, as job {job}"
            if not sweep:
                raise ValueError(queued)
            say(queued)
        elif _finished(recipe, run):
            comment = "# " if dry_run else ""  # a dry run prints a script
            say(f"{comment}{recipe.name} is trained already: {run}")
        else:
            todo.append(index)
    return todo


def _queued(run: Path) -> str | None:
    """The job that a run waits or trains in, if there is one."""
    file, submitted = RunFolder(run).job, RunFolder(run).launch / "recipe.yaml"
    if not file.is_file():
        return None
    if submitted.is_file() and read_yaml(submitted).get("name") != run.name:  # a copy, or a new name: the job
        return None  # trains in the folder that it was submitted for
    job = file.read_text().strip()
    asked = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True, check=False
    )
    return job if asked.returncode == 0 and asked.stdout.strip() else None  # squeue fails for an old job


def _finished(recipe: Recipe, run: Path) -> bool:
    """Whether the newest checkpoint is the last of the budget, and scored on the recipe's tasks."""
    newest = latest_checkpoint(RunFolder(run).checkpoints)
    step = step_of(newest) if newest is not None else None
    if step is None or step < recipe.total_steps:
        return False
    files = RunFolder(run).scores.glob("*.json")
    scored = [name for file in files for name in _scored(file, step, recipe.eval.limit)]
    return all(any(fnmatchcase(name, task) for name in scored) for task in recipe.eval.tasks)


# Settings of `lrnn eval` that a run's own scoring does not have.
_BY_HAND = ("num_fewshot", "given_length", "prompt_twice", "other_text", "lengths")


def _scored(file: Path, step: int, limit: int | None) -> list[str]:
    """The tasks that a step was scored on, by at least as many documents; of a probe's file none."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        settings = facts["settings"]
        whole = settings["limit"] is None or (limit is not None and settings["limit"] >= limit)
        whole = whole and not any(settings.get(key) for key in _BY_HAND)
        return settings["tasks"] if whole and facts["checkpoint"]["step"] == step else []
    except (ValueError, KeyError, TypeError):  # of another program
        return []


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# sbatch's variables whose names are not those of their options.
_VARIABLES = {
    "time": ["TIMELIMIT"], "requeue": ["REQUEUE", "NO_REQUEUE"],
    **{f"mem{per}": ["MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"] for per in ("", "-per-cpu", "-per-gpu")},
}  # fmt: skip
_SHORT = {  # of the options that have a variable
    "-A": "account", "-C": "constraint", "-J": "job-name", "-e": "error", "-o": "output", "-p": "partition",
    "-q": "qos", "-t": "time",
}  # fmt: skip


def _environment(script: str) -> dict[str, str]:
    """What sbatch gets: without the settings of a job around us, which it would give to the new one, and
    without the variables that would win over the script's own options, as SBATCH_TIMELIMIT over --time."""
    given = re.findall(r"(?m)^#SBATCH +(?:--([a-z-]+)|(-[A-Za-z]))", script)
    given = [long or _SHORT.get(short, short) for long, short in given]
    names = {name for option in given for name in _VARIABLES.get(option, [option.replace("-", "_").upper()])}
    over = {f"SBATCH_{name}" for name in (*names, "ARRAY_INX")}
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # which SLURM to ask
    return {
        key: value
        for key, value in os.environ.items()
        if key in kept or not (key.startswith("SLURM_") or key in over)
    }


def _sbatch(script: Path) -> str:
    """Submit; returns the job's id. ValueError with sbatch's message if it refuses."""
    environment = _environment(script.read_text(encoding="utf-8"))
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        said = [line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(f"sbatch refuses {script}: {'; '.join(said[-2:]) or f'exit code {done.returncode}'}")
    return done.stdout.strip().splitlines()[-1].split(";")[0]
