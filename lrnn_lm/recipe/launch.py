"""The `launch` section of a recipe: its SLURM job."""

import re
import shlex
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from .quantities import TimeLimit, parse_time_limit
from .section import Section

_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,:+-]*$")]
# Options that `lrnn submit` sets itself, because its job script relies on them.
_OWN_OPTIONS = (
    "--array", "--chdir", "--job-name", "--no-requeue", "--nodes", "--ntasks", "--ntasks-per-node",
    "--open-mode", "--output", "--requeue", "--signal", "--time", "--wrap",
)  # fmt: skip
_SHORT = {
    "D": "--chdir", "J": "--job-name", "N": "--nodes", "a": "--array", "n": "--ntasks", "o": "--output",
    "t": "--time",
}  # fmt: skip
_FLAGS = "HIOQVWhksv"  # short options of sbatch without a value: more letters may follow, as in -QN4


class LaunchSection(Section):
    """The SLURM job of a run, read by `lrnn submit`. slurm/README.md explains what a site needs."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # an account may be a number

    nodes: int = Field(1, ge=1, description="number of machines")
    gpus_per_node: int = Field(1, ge=0, description="one rank per GPU; 0: one rank per node, on its CPUs")
    cpus_per_rank: int | None = Field(
        None, ge=1, description="CPU cores per rank; default: what the site gives"
    )
    time: TimeLimit = Field("24:00:00", description="time limit of the job, in SLURM's notation")
    grace: int = Field(
        300, ge=1, le=65_535, description="the job is told to save this many seconds before its time limit"
    )
    attempts: int = Field(
        3, ge=1, description="consecutive starts without a new checkpoint after which the job gives up"
    )
    array_limit: int | None = Field(
        None, ge=1, description="maximum number of array runs at once; default: all"
    )
    partition: _Word | None = Field(None, description="SLURM partition")
    account: _Word | None = Field(None, description="SLURM account to charge")
    qos: _Word | None = Field(None, description="SLURM quality of service")
    sbatch: list[str] = Field(default_factory=list, description="other sbatch options, as in --mem=0")
    modules: list[str] = Field(default_factory=list, description="environment modules to load")
    setup: list[str] = Field(default_factory=list, description="shell lines to run before the ranks start")
    python: str | None = Field(
        None,
        description="path of Python on the nodes; default: that of `lrnn submit`, or `python` in a container",
    )
    container: str | None = Field(None, description="container image for the ranks")
    container_runtime: Literal["apptainer", "pyxis"] = "apptainer"
    container_options: list[str] = Field(
        default_factory=list, description="other options of the container runtime"
    )
    template: str = Field("slurm/job.sh", description="job script template that this section fills in")

    @field_validator("sbatch")
    @classmethod
    def _check_sbatch(cls, options: list[str]) -> list[str]:
        for option in options:
            if not re.fullmatch(r"-{1,2}[A-Za-z].*", option):
                raise ValueError(f"expected an option of sbatch such as --mem=0, not {option!r}")
            if (own := _own_option(option)) is not None:
                raise ValueError(
                    f"{option!r}: {own} is set by `lrnn submit` itself (nodes, time, grace, .., or --array)"
                )
        return options

    @model_validator(mode="after")
    def _check(self) -> "LaunchSection":
        limit = parse_time_limit(self.time)
        if limit is not None and limit <= self.grace:
            raise ValueError(
                f"time {self.time} is over before the job is told to save, {self.grace} seconds before its "
                "end; lower launch.grace or raise launch.time"
            )
        for key in ("sbatch", "modules", "setup", "container_options"):
            if broken := [line for line in getattr(self, key) if "\n" in line or not line.strip()]:
                raise ValueError(f"{key}: one line each, not {broken[0]!r}")
        return self

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        """Processes that train together, over all nodes."""
        return self.nodes * self.ranks_per_node


def _own_option(line: str) -> str | None:
    """The option in a line that `lrnn submit` sets itself, in any spelling that sbatch accepts; else None.

    Spellings: a shortened long option, a value attached to a short option, several short options in one word.
    Raises ValueError for a line that sbatch could not split.
    """
    for word in shlex.split(line, comments=True):
        if word.startswith("--"):
            name = word.partition("=")[0]
            if len(name) > 2 and (found := [own for own in _OWN_OPTIONS if own.startswith(name)]):
                return name if name in found else found[0]
        elif word.startswith("-"):
            for letter in word[1:]:
                if letter in _SHORT:
                    return _SHORT[letter]
                if letter not in _FLAGS:
                    break  # the rest is its value
    return None
