"""lm-eval's evaluator on a model in memory, without its log, its random seeds and its overflows."""

import contextlib
import copy
import functools
import io
import json
import logging
import math
import os
import pkgutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..files import random_state_kept
from ..runs.load import document_start, without_dropout
from .tasks import names as tasks
from .team import Team

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOOTSTRAP = 1000  # resamples for standard errors without a closed form


def score_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    manager: Any,
    names: list[str],
    *,
    limit: int | None,
    batch_size: int,
    num_fewshot: int | None,
    max_length: int,
    unlimited: bool,
    team: Team,
    prompt_twice: bool = False,
    bootstrap: int = BOOTSTRAP,
) -> tuple[dict[str, Any], dict[str, int]]:
    """lm-eval's results; and how requests were read, see `_reading`.

    max_length, unlimited, prompt_twice: as LiveLM takes them. bootstrap: 0 for no standard errors at all.
    Raises ValueError for what lm-eval refuses.
    """
    import lm_eval

    from .lm import LiveLM
    from .reconstruction import Reconstruction, encodes

    training, wrong = model.training, []
    try:
        with (
            refusals(names),
            random_state_kept(model.device),  # lm-eval seeds all generators
            _replaced([*_REPLACED, _labels(wrong), *([] if team.shows else [_NO_BAR])]),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            lm: Any
            if encodes(model):
                lm = Reconstruction(model, tokenizer, batch_size=batch_size, team=team)
            else:
                # lm-eval gives it a padding token, EOS for the most part.
                own = without_dropout(copy.deepcopy(tokenizer))
                lm = LiveLM(
                    model, own, batch_size=batch_size, max_length=max_length,
                    start=document_start(model, tokenizer), unlimited=unlimited, team=team,
                    prompt_twice=prompt_twice,
                )  # fmt: skip
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=names,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                limit=limit,
                bootstrap_iters=bootstrap,
                log_samples=False,
                task_manager=manager,
            )
    finally:
        model.train(training)
    reading = _reading(results, lm) | {"unanswerable": len(wrong)}
    # The results hold functions and tensors; as text, so that the caller gets what is written.
    return json.loads(json.dumps(results, default=str)), reading


@contextlib.contextmanager
def refusals(names: list[str]) -> Iterator[None]:
    """Inside, what lm-eval cannot load or refuses, as a mistake in a task's file, is a ValueError."""
    import datasets
    import jinja2
    import lm_eval

    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"a task needs the package {error.name!r}, which is not installed") from error
    except (*_FAULTS, jinja2.TemplateError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        file = Path(place.filename)
        own = file.is_relative_to(tasks.own_tasks_path())
        readers = [Path(package.__file__).parent for package in (datasets, jinja2, lm_eval)]
        reads = place.filename in _TEMPLATES or any(file.is_relative_to(reader) for reader in readers)
        if not (own or reads) or file.is_relative_to(readers[-1] / "models"):
            raise
        reason = " ".join(str(error).split()) or place.line
        if not isinstance(error, AssertionError):  # by which lm-eval reports mistakes in a task's file
            reason = f"{type(error).__name__}: {reason}" + f" ({file}:{place.lineno})" * own
        raise ValueError(f"lm-eval refuses a task of {', '.join(names)}: {reason}") from error


# What mistakes in a task's file become: a field, a split, a metric or a function that is not there, an answer
# beyond the choices, a text without a word.
_FAULTS = (
    AssertionError, AttributeError, FileNotFoundError, ImportError, LookupError, TypeError, ZeroDivisionError,
)  # fmt: skip
_TEMPLATES = ("<template>", "<unknown>")  # Jinja's names for the file of a text of a task


def _reading(results: dict[str, Any] | None, lm: Any) -> dict[str, Any]:
    """How many requests lost the beginning of their context, how many rolling texts their tokens do not
    spell, and the tasks with log-likelihoods of NaN, as the results' settings name them.

    To lm-eval NaN is the likeliest answer: the scores of these tasks and their groups become NaN.
    """
    results = results or {}
    groups, undefined = results.get("group_subtasks", {}), {*lm.undefined}
    while more := {name for name, inside in groups.items() if undefined & {*inside}} - undefined:
        undefined |= more  # and the groups of these groups
    tables = [results.get("results", {}), results.get("groups", {})]  # a group is in both
    for scores in [table[name] for table in tables for name in undefined & {*table}]:
        floats = [key for key, value in scores.items() if "," in key and isinstance(value, float)]
        scores |= dict.fromkeys(floats, math.nan)
    return {
        "truncated_requests": lm.truncated, "changed_texts": lm.changed, "undefined": sorted(lm.undefined)
    }  # fmt: skip


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval below errors; keep its bootstrap in this process, as forking with threads is unsafe."""
    logger = logging.getLogger("lm_eval")
    level, pool = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        if pool is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = pool


def _or_infinity(function: Callable[[Any], float]) -> Callable[[Any], float]:
    """Infinite where `function` would end with an OverflowError."""

    def bounded(x: Any) -> float:
        try:
            return function(x)
        except OverflowError:
            return math.inf

    return bounded


_EXP = {"exp": _or_infinity(math.exp)}


@functools.cache
def described(describe: Callable[[], str]) -> str:
    return describe()


def _of_others(context: Callable[..., Any]) -> Callable[..., Any]:
    """`context`, lm-eval's prompt of a question, with solved examples that are never the question itself.

    lm-eval leaves it out only where a task's `fewshot_split` is its test split. It draws from what it asks in
    tasks with a test split alone, too, and in those whose `fewshot_split` is the validation split they ask.
    """

    def of_others(task: Any, doc: Any, num_fewshot: int, *args: Any, **options: Any) -> Any:
        config, few = task.config, task.fewshot_cfg
        named, asked = few.split, config.test_split or config.validation_split
        drawn = named or config.training_split or config.validation_split or config.test_split
        if drawn == asked and (named or few.samples is None):  # a split goes before samples
            few.split = config.test_split  # lm-eval then takes one more, and leaves the question out
        try:
            return context(task, doc, num_fewshot, *args, **options)
        except ValueError as error:
            if "larger than population" not in str(error):
                raise
            raise ValueError(
                f"task {config.task}: it has fewer than {num_fewshot} solved examples beside the question "
                "(num_fewshot)"
            ) from None
        finally:
            few.split = named

    return of_others


def _labels(found: list[Any]) -> tuple[str, str, Callable[[Any], Any]]:
    """A row as below. Collects lm-eval's warnings of right answers that are none of a document's choices."""

    def warning(own: Callable[..., None]) -> Callable[..., None]:
        return lambda text, *more: found.append(text) if "Label index" in str(text) else own(text, *more)

    return ("lm_eval.api.task:eval_logger", "warning", warning)


# What is replaced while lm-eval runs, as it has no option for it: module or class, name, and the replacement
# as a function of the original. A row may go once the oldest lm-eval of pyproject.toml does the same itself.
_REPLACED: list[tuple[str, str, Callable[[Any], Any]]] = [
    # It asks git for the commit of the current folder, and outside a clone git prints `fatal:`.
    ("lm_eval.evaluator", "get_git_commit_hash", lambda _: lambda: None),
    # It starts pip and compilers to describe the machine, for 1 s: with each scoring of a run that trains.
    ("torch.utils.collect_env", "get_pretty_env_info", lambda own: lambda: described(own)),
    # exp() overflows for an answer above 709 nats, and the standard error where squared perplexities do.
    ("lm_eval.api.metrics", "math", lambda own: SimpleNamespace(**vars(own) | _EXP)),
    ("lm_eval.api.metrics", "sample_stddev", _or_infinity),
    ("lm_eval.api.task:ConfigurableTask", "fewshot_context", _of_others),
]
# The bar over the contexts that it builds, where none is to be shown.
_NO_BAR = ("lm_eval.api.task", "tqdm", lambda _: lambda rows, **_options: rows)


@contextlib.contextmanager
def _replaced(rows: list[tuple[str, str, Callable[[Any], Any]]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for place, name, replacement in rows:
            owner = pkgutil.resolve_name(place)
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement(getattr(owner, name)))
        yield
