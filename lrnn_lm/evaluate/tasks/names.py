"""Which tasks to run: names checked against lm-eval's index and the project's, suites, data from the hub."""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrnn_lm.recipe import explain, read_yaml, resolve_path, shipped

from ...files import hub_is_reachable
from ...requirements import check_extra

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_NAME = re.compile(r"""(?m)^[\s-]*(?:(?:task|group|tag)\s*:)?[\s"']*([\w.:+-]+)["']?\s*(?:#.*)?$""")

_TAG = re.compile(r"(?m)^tag: *(\w+)")


class Suite(BaseModel):
    """A named list of tasks and how to run them: one YAML file in eval/suites."""

    model_config = ConfigDict(extra="forbid")
    tasks: list[str] = Field(min_length=1)
    num_fewshot: int | None = Field(None, ge=0)
    limit: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=2, description="tokens a window, where the model has no limit")


def read_suite(file: str | Path) -> Suite:
    """A suite by its file, or by the name of one that the project ships; ValueError if it is wrong."""
    path = resolve_path(str(file))
    path = path if path.is_file() else shipped(f"eval/suites/{file}.yaml")
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in shipped("eval/suites").glob("*.yaml")))
        raise ValueError(f"{file}: no such suite file; the project ships {known}")
    try:
        return Suite.model_validate(read_yaml(path, Path(file)))
    except ValidationError as error:
        raise ValueError(
            f"{file}: " + "; ".join(explain(detail, Suite) for detail in error.errors())
        ) from None


def usual_window(names: list[str]) -> int | None:
    """max_length of the first shipped suite with all these tasks, which their rows need; None without one."""
    suites = map(read_suite, sorted(shipped("eval/suites").glob("*.yaml")))
    return next((suite.max_length for suite in suites if set(names) <= set(suite.tasks)), None)


def own_tasks_path() -> Path:
    """The project's folder of lm-eval tasks, for `--include_path` of plain lm-eval."""
    return shipped("eval/tasks")


def with_members(names: list[str]) -> list[str]:
    """The names, with those of the project's tags replaced by their tasks'."""
    members: dict[str, list[str]] = {}
    for file in sorted(own_tasks_path().rglob("*.yaml")):
        for tag in _TAG.findall(file.read_text("utf-8")):
            members.setdefault(tag, []).append(file.stem)
    return [task for name in names for task in members.get(name, [name])]


def find_tasks(names: list[str], metadata: dict[str, Any]) -> "tuple[TaskManager, list[str], bool]":
    """lm-eval's task manager, the names with wildcards expanded, and whether tasks may need the hub.

    A name is a task, a group or a tag, with `*` as a wildcard. Raises ValueError for an unknown one, naming
    the nearest. lm-eval's own index of thousands of files is read only if a name is not the project's.
    """
    check_extra("eval", "lm_eval")
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=str(own_tasks_path()), include_defaults=False, metadata=metadata)
    if all(own.match_tasks([name]) for name in names):
        return own, _expand(own, names), False
    plain = [name for name in names if not has_magic(name) and not own.match_tasks([name])]
    files = _upstream_files() if plain else []
    for name in plain:
        if not any(name in file for file in files):
            raise _unknown(name, {found for file in files for found in _NAME.findall(file)}, own.all_tasks)
    manager = TaskManager(include_path=str(own_tasks_path()), metadata=metadata)
    for name in names:
        if not manager.match_tasks([name]):
            raise _unknown(name, manager.all_tasks, own.all_tasks)
    return manager, _expand(manager, names), True


@cache
def _upstream_files() -> list[str]:
    """The files of lm-eval's tasks. A name in none of them is no task. Reading them takes a second; reading
    lm-eval's index of them takes twenty."""
    from lm_eval import tasks

    files = sorted(file for file in Path(tasks.__file__).parent.rglob("*") if file.is_file())
    return [file.read_text("utf-8", "replace") for file in files if file.suffix not in (".py", ".pyc", ".md")]


def _unknown(name: str, known: Iterable[str], own: list[str]) -> ValueError:
    """The refusal of an unknown task, with those that it may mean; or of one whose file cannot be read."""
    for file in _files_of(name):
        try:
            yaml.compose(file.read_text("utf-8"), yaml.SafeLoader)
            why = "a file that it includes may be missing"
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            why = " ".join(str(error).split())
        return ValueError(f"{file}: lm-eval cannot read this task file ({why})")
    ours = sorted((task for task in own if name.strip().lower() in task.lower()), key=len)
    near = ours[:3] or difflib.get_close_matches(name, sorted({*own, *known}), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?"
    otherwise = f"ours are in {own_tasks_path()}, and `lm_eval ls tasks` lists lm-eval's"
    return ValueError(f"unknown task {name!r}; {hint if near else otherwise}")


def _files_of(name: str) -> list[Path]:
    """The files in the project's folder of tasks that define a task or group of this name."""
    line = re.compile(rf"(?m)^(?:task|group): *[\"']?{re.escape(name)}[\"']? *(?:#.*)?$")
    found = sorted(own_tasks_path().rglob("*.yaml"))
    return [file for file in found if line.search(file.read_text("utf-8", "replace"))]


def _expand(manager: "TaskManager", names: list[str]) -> list[str]:
    """The names that are asked for; ValueError for one that two files define, as lm-eval takes the first."""
    found = list(dict.fromkeys(match for name in names for match in sorted(manager.match_tasks([name]))))
    for name in found:
        if len(files := _files_of(name)) > 1:
            raise ValueError(f"task {name!r} is in two files, {files[0]} and {files[1]}; rename one of them")
    return found


@contextmanager
def hub_data(needed: bool, cached: bool = False) -> Iterator[None]:
    """Inside, data sets of the Hugging Face hub are read; without a network, at once from the local cache.

    cached: they are in that cache; do not ask the hub.

    Raises ValueError, with what to do, for a data set that is neither reachable nor cached.
    """
    if not needed:
        yield
        return
    from datasets import config
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    offline = cached or any(before) or not hub_is_reachable()
    if offline:  # otherwise the libraries retry every file for half a minute
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    except (ConnectionError, DatasetNotFoundError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        advice = (
            "run once with a network to fill the cache, or use tasks that need none: "
            "heldout_bits_per_byte, heldout_cloze, or --suite offline --data DIR"
        )
        raise ValueError(f"a task's data set cannot be loaded: {reason}\n{advice}") from error
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before
