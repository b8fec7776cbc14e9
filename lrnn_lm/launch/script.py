"""The job script: the template slurm/job.sh with a recipe's launch section filled in."""

import re
import shlex
import sys
from pathlib import Path
from string import Template

from ..recipe import LaunchSection, resolve_path

_FIELDS = ("options", "attempts", "runs", "setup", "srun", "command")


class _JobTemplate(Template):
    """Fields are %%options, %%runs and so on, as `$` is the shell's."""

    delimiter = "%%"


def job_script(
    launch: LaunchSection,
    name: str,
    runs: list[Path],
    output: Path,
    indices: list[int] | None = None,
) -> str:
    """The whole script for sbatch.

    Args:
        launch: the recipe's section.
        name: the job's name.
        runs: run folders, absolute; their recipes are in launch/recipe.yaml. Several make an array.
        output: sbatch's pattern for the script's own output file, absolute.
        indices: which of `runs` to train, for an array.
    Raises ValueError for an invalid template, or a path that sbatch would misread.
    """
    here = Path.cwd()
    for path in (here, output.parent, *runs):
        if wrong := re.search(r"[^\w./+=@:,~-]", str(path)):
            raise ValueError(f"{path}: sbatch cannot be given a path with {wrong[0]!r} in it")
    options = _options(launch, name, here, output, indices)
    srun, command = _ranks(launch, here, runs)
    fields = {
        "options": "\n".join(f"#SBATCH {option}" for option in options),
        "attempts": str(launch.attempts),
        "runs": " ".join(shlex.quote(str(run)) for run in runs),
        "setup": "\n".join(
            [*(f"module load {shlex.quote(module)} || exit 1" for module in launch.modules), *launch.setup]
        ),
        "srun": shlex.join(srun),
        "command": shlex.join(command) + ' "$run/launch/recipe.yaml"',
    }
    return _template(launch.template).substitute(fields)


def _options(
    launch: LaunchSection, name: str, here: Path, output: Path, indices: list[int] | None
) -> list[str]:
    """The options of sbatch. A site's own come last, so they win."""
    limit = f"%{launch.array_limit}" if launch.array_limit else ""
    return [
        f"--job-name={name}",
        f"--nodes={launch.nodes}",
        f"--ntasks-per-node={launch.ranks_per_node}",
        *([f"--gres=gpu:{launch.gpus_per_node}"] if launch.gpus_per_node else []),
        *([f"--cpus-per-task={launch.cpus_per_rank}"] if launch.cpus_per_rank else []),
        f"--time={launch.time}",
        f"--signal=B:USR1@{launch.grace}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={here}",
        f"--output={output}",
        *([f"--array={_ranges(indices)}{limit}"] if indices is not None else []),
        *([f"--partition={launch.partition}"] if launch.partition else []),
        *([f"--account={launch.account}"] if launch.account else []),
        *([f"--qos={launch.qos}"] if launch.qos else []),
        *launch.sbatch,
    ]


def _ranks(launch: LaunchSection, here: Path, runs: list[Path]) -> tuple[list[str], list[str]]:
    """Further options of srun, and the command of a rank without its recipe."""
    srun = [f"--cpus-per-task={launch.cpus_per_rank}"] if launch.cpus_per_rank else []
    python = launch.python or ("python" if launch.container else sys.executable)
    command = [python, "-m", "lrnn_lm.train"]
    if launch.container is None:
        return srun, command
    outside = {run.parent for run in runs if not run.is_relative_to(here)}
    folders = [str(here), *sorted(map(str, outside))]
    if launch.container_runtime == "pyxis":
        mounts = ",".join(f"{folder}:{folder}" for folder in folders)
        image = [f"--container-image={launch.container}", f"--container-mounts={mounts}"]
        return [*srun, *image, f"--container-workdir={here}", *launch.container_options], command
    gpu = ["--nv"] if launch.gpus_per_node else []
    runtime = ["apptainer", "exec", *gpu, "--bind", ",".join(folders), "--pwd", str(here)]
    return srun, [*runtime, *launch.container_options, launch.container, *command]


def _ranges(indices: list[int]) -> str:
    """Indices in sbatch's notation: [0, 1, 2, 5] -> `0-2,5`."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], index]
        else:
            parts.append([index])
    return ",".join("-".join(map(str, part)) for part in parts)


def _template(name: str) -> _JobTemplate:
    path = resolve_path(name)
    if not path.is_file():
        raise ValueError(f"launch.template: {name}: no such file")
    template = _JobTemplate(path.read_text(encoding="utf-8"))
    found = set(template.get_identifiers()) if template.is_valid() else set()
    if found != set(_FIELDS):
        odd = ", ".join(f"%%{field}" for field in sorted(found ^ set(_FIELDS)))
        raise ValueError(f"launch.template: {name}: lacks or does not know {odd}")
    return template
