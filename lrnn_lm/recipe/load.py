"""Reads recipes from YAML: `extends`, dotted overrides, errors that name the key and the nearest one."""

import copy
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..files import user_path
from .data import FILE_KEYS, SOURCE_KEYS
from .explain import REMOVED, explain
from .mixer import DEFAULT_TYPE, MIXER_OPTIONS
from .reading import TwiceError, field_type, load_override, load_yaml, takes_text
from .schema import Recipe

# Keys by which a source that a run stored is known.
_STORED_SOURCE = {"path", "name", "split", "text_field", "limit", "examples", "options"}
_STORED_OPTIONS = {"block_size", "order", "rope_theta", "width", "state_size", "num_householder"}


class RecipeError(ValueError):
    """A recipe that cannot be used; the message says where and what to do."""


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, apply `section.key=value` overrides, and check it.

    Relative paths in it stay as written; `resolve_path` finds them. An override replaces everything at its
    key. If `extends` or an override changes the mixer's type, inherited options that the new type does not
    have are dropped; options given together with the new type must be its own.
    Raises RecipeError, which lists every mistake.
    """

    _check_kept(overrides or [])

    def override(below: dict[str, Any]) -> dict[str, Any]:
        data = copy.deepcopy(below)
        for text in overrides or []:
            _apply(data, text)
        return data

    own, below = _read(Path(path), ())
    data = _on_top(below, override)
    data.setdefault("name", Path(path).stem)
    recipe = recipe_from_dict(data, where=str(path))
    given = override({})
    if "layer_pattern" not in _section(given, "model"):  # else entries may well repeat what `mixer` says
        if "layer_pattern" not in _section(own, "model"):
            _check_reach(own, data, f"{path}: ")
        _check_reach(given, data, "override ")
    return recipe


def _check_reach(given: dict[str, Any], whole: dict[str, Any], where: str) -> None:
    """Raise RecipeError for a type or option of `mixer` in `given` that no layer of the pattern takes."""
    pattern = _section(whole, "model").get("layer_pattern")
    if not isinstance(pattern, list):
        return
    default = _section(whole, "model", "mixer").get("type", DEFAULT_TYPE)
    entries = [{"type": default} | e if isinstance(e, dict) else {"type": e} for e in pattern]
    for key, value in _section(given, "model", "mixer").items():
        if key == "type":
            reaches = any(entry[key] == value for entry in entries)
            why, what = f"no layer of model.layer_pattern is a {value}", f" (null: {value} in all layers)"
        else:
            having = [entry for entry in entries if key in MIXER_OPTIONS.get(str(entry["type"]), ())]
            reaches = not having or any(key not in entry for entry in having)
            why, what = f"the layers of model.layer_pattern that have {key} set it themselves", ""
        if not reaches:
            raise RecipeError(
                f"{where}model.mixer.{key} changes nothing: {why}; change model.layer_pattern{what}"
            )


def recipe_from_dict(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check plain data against the schema. RecipeError lists every mistake."""
    try:
        return Recipe.model_validate(_without_removed(data))
    except ValidationError as error:
        lines = [explain(detail) for detail in error.errors()]
        raise RecipeError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None


def _without_removed(data: dict[str, Any]) -> dict[str, Any]:
    """`data` without removed keys whose value changes nothing, so that runs of older versions can resume."""
    for dotted, (harmless, _) in REMOVED.items():
        name, key = dotted.split(".")
        section = _section(data, name)
        if str(section.get(key)).lower() in harmless:
            data = {**data, name: {other: value for other, value in section.items() if other != key}}
    return data


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML with every default: what a run stores as recipe.yaml.

    The layer pattern stays as written, so that overrides act on it as on the original recipe.
    """
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as {dotted key: value}, with the keys that overrides use.

    With a layer pattern, its entries hold all options that they use, and `model.mixer` is left out.
    """
    data = recipe.model_dump(mode="json")
    if recipe.model.layer_pattern is not None:
        data["model"]["layer_pattern"] = [m.model_dump(mode="json") for m in recipe.model.layer_pattern]
        del data["model"]["mixer"]
    data["data"]["sources"] = {source["name"]: source for source in data["data"]["sources"]}
    return _flatten(data, "")


def _flatten(data: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def resolve_path(path: str) -> Path:
    """Find a recipe's path on disk: as given, else among the files that the project ships.

    If nothing is found, returns the path as given, so that the caller's message shows what the user wrote.
    """
    here = user_path(path)
    return shipped(path) if shipped(path).exists() and not here.exists() else here


def shipped(name: str) -> Path:
    """Path of what the project ships (recipes, tokenizers, eval, slurm), in a clone or a wheel."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "share" / name
    return installed if installed.exists() else package.parent / name


def read_yaml(file: Path, called: Path | None = None) -> Any:
    """Contents of a YAML file, values as text. RecipeError names the file as `called`."""
    called = called or file
    try:
        data = load_yaml(file.read_text(encoding="utf-8"))
    except TwiceError as error:
        raise RecipeError(f"{called}: {error}") from None
    except RecursionError:
        raise RecipeError(f"{called}: not valid YAML: it holds itself, or is too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8
        told = " ".join(str(error).replace('in "<unicode string>",', "at").split()).rstrip(" ^:")
        raise RecipeError(f"{called}: not valid YAML: {told}") from None
    except OSError as error:
        raise RecipeError(f"{called}: cannot be read: {error.strerror}") from None
    if data is None:
        raise RecipeError(f"{called}: is empty")
    return data


def is_text(key: str) -> bool:
    """Whether a dotted key of the recipe takes text."""
    return takes_text(field_type(Recipe, *key.split(".")))


_NO_TEXT = "; text to train on is given as data.source.path"


def _nearest(path: Path) -> str:
    """`; did you mean recipes/demo.yaml?`: the recipe of a run's or checkpoint's folder, or a shipped one."""
    if path.is_dir():
        own = (folder / "recipe.yaml" for folder in (path, path.parent.parent))
        return next(
            (f"; did you mean {file}?" for file in own if file.is_file()), f", but a folder{_NO_TEXT}"
        )
    recipes = shipped("recipes")
    known = {found.stem: found.relative_to(recipes.parent) for found in sorted(recipes.rglob("*.yaml"))}
    near = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.75)
    return f"; did you mean {known[near[0]].as_posix()}?" if near else ""


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a recipe file holds beyond the one that it extends, and both together."""
    found = resolve_path(str(path))
    found = found if found.exists() else resolve_path(f"recipes/{path}")
    if found.is_dir() or not found.exists():
        raise RecipeError(f"{path}: no such recipe file{_nearest(path)}")
    if found.resolve() in chain:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(p.name for p in chain)}")
    other = "" if found.suffix in (".yaml", ".yml") else _NO_TEXT
    try:
        data = read_yaml(found, path)
    except RecipeError as error:
        raise RecipeError(f"{error}{other}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, not {type(data).__name__}{other}")
    parent = data.pop("extends", None)
    _upgrade(data.get("model"))
    for name, source in _sources(data).items():
        if source.keys() >= _STORED_SOURCE:  # a version that stored it may have kept keys without a use
            data["data"][name] = _read_by_type(source, source.get("type"))
    if parent is None:
        return {}, data
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: extends takes one file name, not {parent!r}")
    beside = (folder / parent for folder in (found.parent, found.resolve().parent))  # which may be a link
    _, below = _read(next(filter(Path.exists, beside), Path(parent)), (*chain, found.resolve()))
    return data, _on_top(below, lambda below: _merge(below, data))


def _section(data: Any, *keys: str) -> dict[str, Any]:
    """The mapping at these keys of unchecked data; an empty one if there is none."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _on_top(below: dict[str, Any], put: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Apply `put` to `below`, without what that gives to mixer and source types that are gone afterwards."""
    top, below = put({}), copy.deepcopy(below)
    others = {"source": ("sources", "stages"), "sources": ("source", "validation_source")}
    given = _section(top, "data")  # one source, or a mixture
    for key in {key for name, keys in others.items() if given.get(name) for key in keys} - given.keys():
        _section(below, "data").pop(key, None)
    changed = put(below)
    for name, source in _sources(below).items():
        now = _sources(changed).get(name, {}).get("type")
        if now != source.get("type"):
            below["data"][name] = _read_by_type(source, now)
    gone = _options_read(below) - _options_read(changed)
    if mixer := _section(below, "model", "mixer"):  # a new one: an anchor may be an entry of the pattern too
        below["model"]["mixer"] = {key: value for key, value in mixer.items() if key not in gone}
    return put(below)


def _sources(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sources in unchecked data, by the name of their section."""
    section = _section(data, "data")
    return {name: s for name, s in section.items() if name.endswith("source") and isinstance(s, dict)}


def _read_by_type(source: dict[str, Any], kind: Any) -> dict[str, Any]:
    """A source without the keys of files that a source of type `kind` does not read."""
    unread = FILE_KEYS - SOURCE_KEYS.get(kind, FILE_KEYS) if isinstance(kind, str) else set()
    return {key: value for key, value in source.items() if key not in unread}


def _options_read(data: dict[str, Any]) -> set[str]:
    """The options that the mixer types of unchecked data have."""
    default = _section(data, "model", "mixer").get("type", DEFAULT_TYPE)
    pattern = _section(data, "model").get("layer_pattern")
    entries = pattern if isinstance(pattern, list) else []
    types = [default, *(e.get("type", default) if isinstance(e, dict) else e for e in entries)]
    return {option for kind in types if isinstance(kind, str) for option in MIXER_OPTIONS.get(kind, ())}


def _upgrade(model: Any) -> None:
    """Clean a recipe stored by an older version, which stored every option of every type in every entry.

    Keeps the options that the types have. Values that an entry shares with `mixer` are removed from the
    entry, so that overrides of `mixer` reach it.
    """
    mixer = _section(model, "mixer")
    if not mixer.keys() >= _STORED_OPTIONS:
        return
    pattern = model.get("layer_pattern")
    read = _options_read({"model": model})
    if isinstance(pattern, list):
        model["layer_pattern"] = [
            {key: value for key, value in entry.items() if key == "type" or value != mixer.get(key)}
            for entry in pattern
        ]
    model["mixer"] = {key: value for key, value in mixer.items() if key == "type" or key in read}


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"override {override!r}: write section.key=value, as in train.tokens=2M or 'eval.every=200 steps'"
        )
    try:
        value = load_override(text, field_type(Recipe, *keys))
    except TwiceError as error:
        raise RecipeError(f"override {override!r}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: thousands of digits
        lost = f" ({error})" if "would be lost" in str(error) else ""
        raise RecipeError(f"override {override!r}: the value is not valid YAML{lost}") from None
    for depth, key in enumerate(keys[:-1]):
        child = data.get(key)
        if child is None:
            child = data[key] = {}
        if not isinstance(child, dict):
            held = ".".join(keys[: depth + 1])
            what = "holds a value, not a section"
            if isinstance(child, list):  # its entries have no names: the whole list is what can be given
                what = f"is a list; write it whole, as in '{held}=[..]'"
            raise RecipeError(f"override {override!r}: {held} {what}")
        data = child
    data[keys[-1]] = value


def _check_kept(overrides: list[str]) -> None:
    """Raise RecipeError for an override of a whole section after one of a key in it, which would be lost."""
    for place, after in enumerate(overrides):
        section = f"{after.partition('=')[0].strip()}."
        if lost := [before for before in overrides[:place] if before.strip().startswith(section)]:
            raise RecipeError(
                f"override {after!r} replaces the whole section, and {lost[0]!r} before it would be lost; "
                "put it after"
            )
