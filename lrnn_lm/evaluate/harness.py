"""A checkpoint's scores on lm-eval tasks, as JSON and a table."""

import contextlib
import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import finite, no_default_device
from ..runs.load import (
    CheckpointInfo,
    check_window,
    describe,
    has_window,
    load_checkpoint,
    widest_window,
)
from .scoring import quiet_lm_eval, score_tasks
from .show import (
    check_at_least,
    check_output,
    decimal,
    print_table,
    print_written,
    table_console,
    write_json,
)
from .tasks.heldout import cloze_dataset
from .tasks.names import find_tasks, hub_data, read_suite, usual_window, with_members
from .team import ALONE, Team
from .text import documents_of, in_name, other_text, stem_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS_A_STEP = 8  # upper bound for a symbol or word of a row: --lengths enlarges a suite's window by it
WHOLE_ROWS = ("state_", "mad_", "recall_", "long_")  # tasks whose answer depends on the whole row
_PACKAGES = ("lrnn-lm", "lm-eval", "torch", "transformers", "datasets")


@no_default_device()
def evaluate(
    checkpoint: str | Path,
    tasks: list[str],
    *,
    limit: int | None = None,
    output: Path | None = None,
    data: Path | None = None,
    batch_size: int = 8,
    device: str = "auto",
    suite: Path | None = None,
    model: "PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    num_fewshot: int | None = None,
    max_length: int | None = None,
    lengths: list[int] | None = None,
    prompt_twice: bool = False,
    trust_remote_code: bool = False,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Score a checkpoint on lm-eval tasks, print a table, write JSON, and return what was written.

    Args:
        tasks: names of tasks, groups or tags, of lm-eval or of eval/tasks.
        limit: documents a task.
        output: a folder (default: eval/ of the run; outside a run nothing is written).
        data: held-out documents (default: those of the run), or the folder that the offline tasks read.
        suite: a YAML file of task names, taken before `tasks`. Arguments override its settings.
        model, tokenizer: the pair, if the caller holds it in memory; `checkpoint` then only names it.
        max_length: tokens a window. Default: the suite's, or that of the shipped suite with all the tasks, up
            to the model's limit; else `context_length`. Without it, models without attention read requests
            of any length whole, except rolling ones.
        lengths: of the rows of state, mad and long tasks.
        prompt_twice: read each context, a line break and the context again (arXiv 2407.05483).
        trust_remote_code: let the checkpoint's folder run its own code.
        team: the processes that share the work and all call this; others than the main one return {}.

    The caller's random state, the model's mode and its device stay as they were. Raises ValueError for an
    unknown task, missing data, a limit below 1, or a folder without a checkpoint.

    Example:
        >>> from lrnn_lm import evaluate
        >>> scores = evaluate("runs/demo/checkpoints/latest", ["heldout_bits_per_byte"], limit=4)
        >>> scores["results"]["heldout_bits_per_byte"]["bits_per_byte,none"] > 0  # bits a byte of text
        True
    """
    names, options = _chosen(suite, tasks, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    info, asked = describe(checkpoint), {"lengths": lengths, "max_length": max_length}
    _check(names, max_length, info.results(output), **options)
    settings = asked | {"prompt_twice": prompt_twice, "data": documents_of(info, data)}

    def load() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        if model is not None:
            return model, tokenizer
        return load_checkpoint(info.path, device, autoencoder=True, trust_remote_code=trust_remote_code)

    results = _scored(info, names, suite, load, options, settings, team)
    if stored := finite(results):
        _show(results)  # before it is written: a full disk would lose hours of work
        _write(stored, info, suite, tasks, output)
    return stored


def _chosen(
    suite: Path | None, tasks: list[str], **given: int | None
) -> tuple[list[str], dict[str, int | None]]:
    """The tasks of a suite and `tasks`; and what is `given`, filled in from the suite."""
    if suite is None:
        return tasks, given
    chosen = read_suite(suite)
    own = {"limit": chosen.limit, "num_fewshot": chosen.num_fewshot}
    filled = {key: own.get(key) if value is None else value for key, value in given.items()}
    return [*chosen.tasks, *tasks], filled


def _scored(
    info: CheckpointInfo,
    names: list[str],
    suite: Path | None,
    load: "Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]",
    options: dict[str, Any],
    settings: dict[str, Any],
    team: Team,
) -> dict[str, Any]:
    """Results and what they are of; {} but on the main process. options: of `score_tasks`."""
    lengths = settings["lengths"]
    known = {"pretrained": str(info.path), "data": settings["data"], "lengths": lengths}
    with quiet_lm_eval():
        manager, names, hub = find_tasks(names, {key: value for key, value in known.items() if value})
        model, tokenizer = load()
        widest = usual_window(names) if suite is None else read_suite(suite).max_length
        if widest is not None and lengths:
            widest = max(widest, TOKENS_A_STEP * max(lengths))
        with hub_data(hub):
            results, reading = score_model(
                model, tokenizer, manager, names, info, widest, settings["max_length"], team=team,
                prompt_twice=settings["prompt_twice"], **options,
            )  # fmt: skip
    if results is None:
        return {}
    for task, config in results["configs"].items():
        if config.get("output_type") == "loglikelihood_rolling":  # lm-eval counts examples that it leaves out
            results["n-shot"][task] = 0
    results["checkpoint"] = {"path": str(info.path), "step": info.step, "tokens": info.tokens}
    results["settings"] = {
        "tasks": names, **options, **settings, **reading, "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."), "processes": team.size,
        "other_text": other_text(info, settings["data"]), "given_length": settings["max_length"],
    }  # fmt: skip
    results["software"] = _versions()
    return results


def score_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    manager: Any,
    names: list[str],
    info: CheckpointInfo,
    widest: int | None,
    max_length: int | None = None,
    **options: Any,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """lm-eval's results (None but on the main process), and how requests were read: the window, and how many
    were too long for it.

    info: what the model is called in messages, and its run. widest: the window that the tasks ask for.
    max_length: the window that the user asked for. options: of `score_tasks`.
    """
    from .reconstruction import check_kind

    check_kind(info.path, model, names)
    window = max_length or widest_window(model, info.run, widest)
    check_window(model, window)
    unlimited = max_length is None and not has_window(model)
    results, reading = score_tasks(
        model, tokenizer, manager, names, max_length=window, unlimited=unlimited, **options
    )
    _check_whole(names, reading["truncated_requests"], window)
    if results and "offline_blimp" in results["results"]:
        _add_error_of_the_mean(results["results"]["offline_blimp"])
    return results, {"max_length": window, "unlimited": unlimited, **reading}


def _add_error_of_the_mean(scores: dict[str, Any]) -> None:
    """Fill in the standard error of offline_blimp's `acc`: lm-eval computes it for its own aggregations only.

    As in lm-eval's group: sqrt(sum of squared errors) / number of paradigms. It stays "N/A" if a paradigm has
    none, such as one with a single pair.
    """
    own = "acc_stderr,none"
    errors = [scores[key] for key in scores if key.endswith("_stderr,none") and key != own]
    if errors and all(isinstance(error, float) for error in errors):
        scores[own] = math.hypot(*errors) / len(errors)


def check_tasks(names: list[str], data: Path | None = None) -> list[str]:
    """The names without wildcards and the project's tags.

    Raises ValueError for an unknown task, naming the nearest, or a cloze task that `data` cannot fill.

    data: the held-out documents that the tasks will read, if they exist already.
    """
    with quiet_lm_eval():
        tasks = with_members(find_tasks(names, {})[1])
    if data is not None and "heldout_cloze" in tasks:
        cloze_dataset(data=str(data))
    return tasks


def flatten(results: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """Rows (task, metric, value, standard error or None) of an lm-eval results dictionary, in its order.

    A metric under another filter than the default has the filter's name: `acc (strict)`.
    """
    rows = []
    for task, scores in results["results"].items():
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            rows.append((task, label, float(value), error if isinstance(error, int | float) else None))
    return rows


def variant(results: dict[str, Any], task: str | None = None, text: bool = True) -> list[str]:
    """How scores were taken where that is not the usual way; they have files and rows of their own.

    results: those of an older version lack some settings. task: the one whose way is asked for; None: of all.
    text: whether the text counts.
    """
    settings, shots = results.get("settings", {}), results.get("n-shot", {})
    few, window = settings.get("num_fewshot"), settings.get("given_length")
    if few:  # a task's own file may not take them
        few = max(shots.values(), default=few) if task is None else shots.get(task, few)
    words = [f"{few}-shot"] if few else []
    words += [f"window {window}"] if window else []
    words += ["prompt twice"] if settings.get("prompt_twice") else []
    if text and (other := settings.get("other_text") or settings.get("other_data")):
        words.append(other)
    return words


def _check(
    names: list[str],
    max_length: int | None,
    folder: Path | None,
    limit: int | None,
    batch_size: int,
    num_fewshot: int | None,
) -> None:
    if not names or not all(name.strip() for name in names):
        raise ValueError(
            "no tasks: pass --tasks, as in --tasks heldout_bits_per_byte,heldout_cloze, or --suite"
        )
    check_at_least(0, num_fewshot=num_fewshot)
    check_at_least(1, limit=limit, batch_size=batch_size)
    check_at_least(2, max_length=max_length)
    check_output(folder)


def _check_whole(names: list[str], truncated: int, window: int) -> None:
    """Raise ValueError if rows whose answer depends on their beginning have lost it."""
    whole = [name for name in names if name.startswith(WHOLE_ROWS)]
    if truncated and whole:
        raise ValueError(
            f"{truncated} rows of {', '.join(whole)} are longer than the {window} tokens of a window, and "
            "without their beginning they have no answer; pass --lengths, or a larger --max-length"
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _write(
    results: dict[str, Any], info: CheckpointInfo, suite: Path | None, tasks: list[str], output: Path | None
) -> None:
    """Write JSON, and say where; nothing outside a run without `output`.

    The file is named after checkpoint, tasks and settings, so that only a repeat replaces it.
    """
    if (folder := info.results(output)) is None:
        table_console().print("not written: outside a run, pass --output DIR")
        return
    settings = results["settings"]
    what = "+".join(settings["tasks"] if suite is None else [Path(suite).stem, *tasks])
    what = what.replace("*", "_").replace("/", "_")
    if len(what) > 80:  # a file name takes 255 bytes
        what = f"{what[:60]}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"
    what += f"-lengths{'-'.join(map(str, settings['lengths']))}" if settings["lengths"] else ""
    what += in_name(*variant(results))
    what += f"-limit{settings['limit']}" if settings["limit"] else ""
    path = folder / f"{stem_of(info, output, what)}.json"
    write_json(results, path)
    print_written([path])


def _show(results: dict[str, Any]) -> None:
    settings = results["settings"]
    limit = f", {settings['limit']} documents a task" if settings["limit"] else ""
    header = ["task", "metric", "value", "± standard error", "documents"]
    title = Path(results["checkpoint"]["path"]).name + limit
    print_table(header, _rows(results), left=2, title=title)
    console = table_console()
    scores = {(task, metric): value for task, metric, value, _ in flatten(results)}
    for (task, metric), gzip in scores.items():
        if metric == "gzip_bits_per_byte" and not settings["changed_texts"]:
            bits = scores[task, "bits_per_byte"]
            verdict = f"{1 - bits / gzip:.1%} below" if bits < gzip else "not below"
            console.print(f"bits per byte {bits:.4f}, {verdict} gzip -9 on the same bytes ({gzip:.4f})")
    if settings["changed_texts"]:
        console.print(
            f"{settings['changed_texts']} texts are not what their tokens decode to (unknown tokens, case, "
            "white space), so bits per byte and perplexities are too low"
        )
    if settings["unanswerable"]:
        console.print(
            f"{settings['unanswerable']} questions have a right answer that is none of their choices, so "
            "they count as answered wrongly: look at doc_to_target in the task's file"
        )
    if settings["undefined"]:
        console.print(
            f"{', '.join(settings['undefined'])}: no score, as log-likelihoods are NaN: the weights hold "
            "such numbers, or overflow"
        )
    if settings["truncated_requests"]:
        console.print(
            f"{settings['truncated_requests']} requests were longer than {settings['max_length']} tokens and "
            "lost the beginning of their context"
        )
    plain = [task for task, shots in results["n-shot"].items() if settings["num_fewshot"] and not shots]
    if plain:
        console.print(f"scored without solved examples (--num-fewshot), as it takes none: {', '.join(plain)}")


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """Rows of the printed table; a task and its number of documents stand on its first row only."""
    counts, last, rows = results.get("n-samples", {}), None, []
    for task, metric, value, error in flatten(results):
        count = str(counts.get(task, {}).get("effective", ""))
        name, count = (task, count) if task != last else ("", "")
        rows.append([name, metric, decimal(value), decimal(error), count])
        last = task
    return rows
