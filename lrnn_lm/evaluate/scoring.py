"""lm-eval's evaluator on a model in memory, without its log, its random seeds and its overflows."""

import contextlib
import functools
import io
import json
import logging
import math
import os
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..files import random_state_kept
from ..runs.load import document_start
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
) -> tuple[dict[str, Any], int]:
    """lm-eval's results, and the number of requests that lost the beginning of their context.

    max_length, unlimited, prompt_twice: as LiveLM takes them. bootstrap: 0 for no standard errors at all.
    Raises ValueError for what lm-eval refuses.
    """
    import lm_eval

    from .lm import LiveLM
    from .reconstruction import Reconstruction, encodes

    training = model.training
    try:
        with (
            refusals(names),
            random_state_kept(model.device),  # lm-eval seeds all generators
            _overflow_is_infinite(),
            _bars(team.shows),
            _described_once(),
            _no_commit(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            lm: Any
            if encodes(model):
                lm = Reconstruction(model, tokenizer, batch_size=batch_size, team=team)
            else:
                lm = LiveLM(
                    model, tokenizer, batch_size=batch_size, max_length=max_length,
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
    # The results hold functions and tensors; as text, so that the caller gets what is written.
    return json.loads(json.dumps(results, default=str)), lm.truncated


@contextlib.contextmanager
def refusals(names: list[str]) -> Iterator[None]:
    """Inside, what lm-eval cannot load or refuses is a ValueError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"a task needs the package {error.name!r}, which is not installed") from error
    except AssertionError as error:  # lm-eval reports mistakes in a task's file by assertions
        place = traceback.extract_tb(error.__traceback__)[-1]
        if "lm_eval" not in place.filename.replace("\\", "/").split("/"):
            raise
        reason = " ".join(str(error).split()) or place.line
        raise ValueError(f"lm-eval refuses a task of {', '.join(names)}: {reason}") from error


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


@contextlib.contextmanager
def _bars(shows: bool) -> Iterator[None]:
    """Whether lm-eval shows a progress bar for the contexts that it builds; it has no option for it."""
    from lm_eval.api import task

    bar = task.tqdm
    task.tqdm = bar if shows else lambda rows, **_: rows
    try:
        yield
    finally:
        task.tqdm = bar


@contextlib.contextmanager
def _no_commit() -> Iterator[None]:
    """lm-eval asks git for the commit of the current folder, and outside a clone git prints `fatal:`."""
    from lm_eval import evaluator

    commit = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = commit


@functools.cache
def described(describe: Callable[[], str]) -> str:
    return describe()


@contextlib.contextmanager
def _described_once() -> Iterator[None]:
    """Let lm-eval describe the machine once a process: it starts pip and compilers, which takes a second.

    A run that scores tasks while it trains would wait for that each time.
    """
    from torch.utils import collect_env

    describe = collect_env.get_pretty_env_info
    collect_env.get_pretty_env_info = lambda: described(describe)
    try:
        yield
    finally:
        collect_env.get_pretty_env_info = describe


@contextlib.contextmanager
def _overflow_is_infinite() -> Iterator[None]:
    """Make lm-eval's perplexities infinite where it would end with an OverflowError.

    exp() overflows for an answer above 709 nats, and the standard error where squared perplexities do.
    """
    from lm_eval.api import metrics

    def or_infinity(function: Callable[[Any], float]) -> Callable[[Any], float]:
        def bounded(x: Any) -> float:
            try:
                return function(x)
            except OverflowError:
                return math.inf

        return bounded

    deviation = metrics.sample_stddev
    metrics.math = SimpleNamespace(**{**vars(math), "exp": or_infinity(math.exp)})
    metrics.sample_stddev = or_infinity(deviation)
    try:
        yield
    finally:
        metrics.math, metrics.sample_stddev = math, deviation
