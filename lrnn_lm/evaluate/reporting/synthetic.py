"""Runs on synthetic tasks as one table: a row a model, a column a task, held-out accuracy.

Runs that differ only in the seed are one entry, mean ± standard deviation. Of runs that differ in training
settings (learning rate, weight decay) the best counts, as in the published benchmark.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from ...runs.layout import RunFolder
from .runs import Run, mixer_in_words

# Keys of `train` that say how a run is carried out, and do not change what a step computes.
_HOW = frozenset({
    "micro_batch", "device", "parallel", "shard_size", "segment", "sequence_parallel", "compile",
    "activation_checkpointing", "loss_chunk", "profile", "average", "max_bad_steps", "timeout_minutes",
    "stall_minutes", "log_every", "inspect_every", "runs_dir",
})  # fmt: skip
_SHOWN = ("learn_initial_state", "tie_word_embeddings", "init_from")  # of `model`, beside its sizes


def synthetic_table(runs: list[Run]) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows; None if fewer than two of the runs are on synthetic tasks."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    count = 0
    for run in runs:
        recipe, accuracy = _recipe(run.path), run.last("accuracy")
        if recipe is None or accuracy is None:
            continue
        trials = found.setdefault((_model(recipe), _task(recipe)), {})
        trials.setdefault(_but_the_seed(recipe), []).append(accuracy)
        count += 1
    if count < 2:
        return None
    models = list(dict.fromkeys(model for model, _ in found))
    tasks = list(dict.fromkeys(task for _, task in found))
    rows = [[model, *(_best(found.get((model, task), {})) for task in tasks)] for model in models]
    return ["model", *tasks], rows


def _best(trials: dict[str, list[float]]) -> str:
    if not trials:
        return ""
    seeds = max(trials.values(), key=statistics.fmean)
    spread = f" ± {statistics.stdev(seeds):.4f}" if len(seeds) > 1 else ""
    return f"{statistics.fmean(seeds):.4f}{spread}"


def _but_the_seed(recipe: dict[str, Any]) -> str:
    """A key that is equal for runs that differ only in the seed, and in how they run.

    Keys without a value are left out: recipes of older versions lack some.
    """
    train = {key: value for key, value in recipe["train"].items() if value and key not in _HOW}
    data = [recipe["data"]["source"], recipe["data"].get("curriculum", [])]
    return json.dumps([recipe["model"], data, recipe["optim"], train], sort_keys=True)


def _recipe(run: Path) -> dict[str, Any] | None:
    """The run's recipe, if its source is a synthetic task. ValueError for a file that is damaged."""
    file = RunFolder(run).recipe
    if not file.is_file():
        return None
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        return recipe if recipe["data"]["source"]["type"] == "synthetic" else None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
        raise ValueError(f"{file}: not a run's recipe (damaged?)") from None


def _task(recipe: dict[str, Any]) -> str:
    """`s5 x 64 (start 1)`: the task, its length, and options that were given."""
    source = recipe["data"]["source"]
    options = [f"{key} {value}" for key, value in source["options"].items()]
    options += [f"{source['examples']} rows"] if source["examples"] else []
    return f"{source['task']} x {recipe['data']['sequence_length']}" + (
        f" ({', '.join(options)})" if options else ""
    )


def _model(recipe: dict[str, Any]) -> str:
    """The mixers with their options, and the model's size."""
    from ...model.config import LRNNConfig

    section = recipe["model"]
    config = LRNNConfig(mixer=section["mixer"], layer_pattern=section["layer_pattern"])
    mixers = config.layer_pattern or [config.mixer]
    size = f"{section['num_hidden_layers']} x {section['hidden_size']}, SwiGLU {section['intermediate_size']}"
    more = [f"repeat {section['repeat']}"] if section.get("repeat", 1) > 1 else []
    more += [key.replace("_", " ") for key in _SHOWN if section.get(key)]
    return ", ".join([" + ".join(dict.fromkeys(map(mixer_in_words, mixers))), size, *more])
