"""The `launch` section: what a recipe says of its SLURM job."""

import re
import shlex
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from .quantities import TimeLimit, parse_time_limit
from .section import Section

_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,:+-]*$")]
# What `lrnn submit` says itself, and its script relies on.
_OWN_OPTIONS = (
    "--array", "--chdir", "--job-name", "--no-requeue", "--nodes", "--ntasks", "--ntasks-per-node",
    "--open-mode", "--output", "--requeue", "--signal", "--time", "--wrap",
)  # fmt: skip
_SHORT = {
    "D": "--chdir", "J": "--job-name", "N": "--nodes", "a": "--array", "n": "--ntasks", "o": "--output",
    "t": "--time",
}  # fmt: skip
_FLAGS = "HIOQVWhksv"  # short options of sbatch that take no value of their own: more may follow, as in -QN4


class LaunchSection(Section):
    """The SLURM job of a run, read by `lrnn submit`; slurm/README.md says which of these a site needs."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # an account may be a number

    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(1, ge=0, description="one rank each; 0: one rank a node, on its CPUs")
    cpus_per_rank: int | None = Field(None, ge=1, description="none: as many as the site gives")
    time: TimeLimit = Field("24:00:00", description="the job's limit, as SLURM writes times")
    grace: int = Field(
        300, ge=1, le=65_535, description="seconds before the limit at which the job is told to save"
    )
    attempts: int = Field(
        3, ge=1, description="starts in a row that leave no new checkpoint after which a job gives up"
    )
    array_limit: int | None = Field(None, ge=1, description="runs of an array at one time; none: all")
    partition: _Word | None = None
    account: _Word | None = None
    qos: _Word | None = None
    sbatch: list[str] = Field(default_factory=list, description="more options of sbatch, as in --mem=0")
    modules: list[str] = Field(default_factory=list, description="what `module load` loads")
    setup: list[str] = Field(default_factory=list, description="lines of shell before the ranks are started")
    python: str | None = Field(
        None, description="none: the Python of `lrnn submit`, or `python` in a container"
    )
    container: str | None = Field(None, description="the image that ranks run in")
    container_runtime: Literal["apptainer", "pyxis"] = "apptainer"
    container_options: list[str] = Field(default_factory=list, description="more options of the runtime")
    template: str = Field("slurm/job.sh", description="the job script that all of this is put into")

    @field_validator("sbatch")
    @classmethod
    def _check_sbatch(cls, options: list[str]) -> list[str]:
        for option in options:
            if not re.fullmatch(r"-{1,2}[A-Za-z].*", option):
                raise ValueError(f"an option of sbatch such as --mem=0 is wanted, not {option!r}")
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
    """The option of ours that a line says, however sbatch reads it: shortened, attached, one of many.

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
