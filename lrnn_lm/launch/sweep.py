"""Sweeps: one recipe, many runs. A YAML file has the overrides; every run gets its own name.

All combinations of some values:                   Or the runs one by one, with names or without:

    optim.lr: [3e-3, 6e-3]                             - {name: wide, model.hidden_size: 1024}
    model.mixer.block_size: [1, 4]                     - {optim.lr: 1e-2, seed: 1}
"""

import itertools
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ..recipe import Recipe, RecipeError, is_text, load_recipe, read_yaml

MOST_RUNS = 10_000
_LONGEST_NAME = 200  # bytes of a folder's name: the limit is 255, and names derived from it are longer
_LONGEST_VALUE = 40


def read_sweep(sweep: Path, recipe: Path, overrides: list[str]) -> list[Recipe]:
    """The recipes of a sweep over `recipe`, in the order of the file (the last key varies fastest).

    Raises RecipeError, naming the sweep, for a malformed file, a key that is unknown or of the whole job, an
    invalid combination, or two runs of one name.
    """
    combinations = _combinations(sweep)
    keys = list(dict.fromkeys(key for run in combinations for key in run))
    for key in keys:
        if key.split(".")[0] == "launch":
            raise RecipeError(
                f"{sweep}: {key} is one for the whole array; give it to the recipe or the command"
            )
    base, labels = base_name(sweep, recipe, overrides), _labels(keys)
    recipes: dict[str, Recipe] = {}
    for number, run in enumerate(combinations, 1):
        name = run.get("name") or _name(sweep, base, run, labels)
        made = _load(sweep, number, recipe, [*overrides, *_changes(run), f"name={_as_yaml(name)}"])
        if made.name in recipes:
            raise RecipeError(
                f"{sweep}: two runs have the name {made.name}; list them with a name: of their own"
            )
        recipes[made.name] = made
    return list(recipes.values())


def base_name(sweep: Path, recipe: Path, overrides: list[str]) -> str:
    """Name of the recipe that a sweep is over: read with the keys of the first run, as it may be no valid
    recipe without them."""
    return _load(sweep, 1, recipe, [*overrides, *_changes(_combinations(sweep)[0])]).name


def _load(sweep: Path, number: int, recipe: Path, overrides: list[str]) -> Recipe:
    try:
        return load_recipe(recipe, overrides)
    except RecipeError as error:
        raise RecipeError(f"{sweep}, run {number}: {error}") from None


def _changes(run: dict[str, Any]) -> list[str]:
    """A run's keys as overrides, without its name."""
    return [f"{key}={_as_yaml(value)}" for key, value in run.items() if key != "name"]


def _combinations(sweep: Path) -> list[dict[str, Any]]:
    """Dotted keys and values of each run."""
    if not sweep.is_file():
        raise RecipeError(f"{sweep}: no such sweep file")
    data = read_yaml(sweep)
    if isinstance(data, list):
        wrong = next((entry for entry in data if not isinstance(entry, dict)), None)
        if wrong is not None or not data:
            what = "none" if wrong is None else repr(wrong)
            raise RecipeError(
                f"{sweep}: a list of runs holds mappings such as {{optim.lr: 1e-3}}, not {what}"
            )
        runs = data
    elif isinstance(data, dict):
        for key, values in data.items():
            if not isinstance(values, list) or not values:
                raise RecipeError(f"{sweep}: {key} takes a list of values, as in [1, 2], not {values!r}")
        if "name" in data:
            raise RecipeError(f"{sweep}: the runs of a grid name themselves; a list of runs may hold name:")
        if math.prod(map(len, data.values())) > MOST_RUNS:
            raise RecipeError(f"{sweep}: more than {MOST_RUNS:,} combinations")
        runs = [dict(zip(data, values, strict=True)) for values in itertools.product(*data.values())]
    else:
        raise RecipeError(f"{sweep}: a sweep maps keys to lists of values, or lists runs; not {data!r}")
    return runs


def _labels(keys: list[str]) -> dict[str, str]:
    """The last words of each key, as few as make it unique."""
    labels = {}
    for key in keys:
        words = key.split(".")
        for count in range(1, len(words) + 1):
            label = ".".join(words[-count:])
            if sum(other == label or other.endswith("." + label) for other in keys) == 1:
                break
        labels[key] = label
    return labels


def _name(sweep: Path, base: str, run: dict[str, Any], labels: dict[str, str]) -> str:
    """`demo-lr_0.003-block_size_4`; RecipeError if it would be too long."""
    parts = []
    for key, value in run.items():
        text = _word(key, value)
        if len(text) > _LONGEST_VALUE:
            raise RecipeError(
                f"{sweep}: {key} makes too long a name; list the runs with a name: of their own"
            )
        parts.append(f"{labels[key]}_{text}")
    name = "-".join([base, *parts])
    if len(name) > _LONGEST_NAME:
        raise RecipeError(
            f"{sweep}: {name[:60]}.. is too long a name; list the runs with a name: of their own"
        )
    return name


def _word(key: str, value: Any) -> str:
    """A value as part of a name: a number in one form, 0.001 for 1e-3; else letters, digits and points."""
    if isinstance(value, str) and not is_text(key):
        for number in (int, float):
            with suppress(ValueError):
                return _as_yaml(number(value)).replace("+", "")  # 1.0e+20
    return re.sub(r"[^A-Za-z0-9.]+", "-", _as_yaml(value)).strip("-.")


def _as_yaml(value: Any) -> str:
    """A value on one line, as in an override."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")
