"""Recipes from YAML: `extends`, dotted overrides, and errors that name the key and its nearest neighbour."""

import difflib
import re
import textwrap
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .schema import Recipe


class RecipeError(ValueError):
    """A recipe that cannot be used; the message says where and what to do."""


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, apply `section.key=value` overrides, and check it.

    Relative paths inside are left as written; `resolve_path` finds them.
    Raises RecipeError with one line for each mistake.
    """
    data = _read(Path(path), ())
    for override in overrides or []:
        _apply(data, override)
    data.setdefault("name", Path(path).stem)
    return recipe_from_dict(data, where=str(path))


def recipe_from_dict(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check plain data against the schema; RecipeError lists what is wrong."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise RecipeError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, every default written out: what a run stores as recipe.yaml."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as dotted keys and values, as `load_recipe`'s overrides name them."""
    return _flatten(recipe.model_dump(mode="json"), "")


def _flatten(data: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def resolve_path(path: str, base: Path | None = None) -> Path:
    """A path of a recipe on disk: as given, else below `base`, else among the files that the project ships.

    Returns the path as given if nothing is found, so that the caller's message names what the user wrote.
    """
    here = Path(path).expanduser()
    candidates = [here] if here.is_absolute() else [here, *([base / here] if base else []), shipped(path)]
    return next((c for c in candidates if c.exists()), here)


def shipped(name: str) -> Path:
    """A file or folder that the project ships (recipes, tokenizers, eval, slurm), in a checkout or wheel."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "share" / name
    return installed if installed.exists() else package.parent / name


def read_yaml(file: Path, called: Path | None = None) -> Any:
    """What a YAML file holds, numbers read as people mean them; RecipeError names it as `called`."""
    called = called or file
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date with 13 months
        raise RecipeError(f"{called}: not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise RecipeError(f"{called}: cannot be read: {error.strerror}") from None
    if data is None:
        raise RecipeError(f"{called}: is empty")
    return data


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    found = resolve_path(str(path))
    found = found if found.exists() else resolve_path(f"recipes/{path}")
    if found.is_dir() or not found.exists():
        raise RecipeError(f"{path}: no such recipe file")
    if found.resolve() in chain:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(p.name for p in chain)}")
    data = read_yaml(found, path)
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, not {type(data).__name__}")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: extends takes one file name, not {parent!r}")
    return _merge(_read(_beside(found, parent), (*chain, found.resolve())), data)


def _beside(recipe: Path, parent: str) -> Path:
    """`extends` is looked up beside the recipe first."""
    beside = recipe.parent / parent
    return beside if beside.exists() else Path(parent)


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
        raise RecipeError(f"override {override!r}: write section.key=value, as in train.tokens=2M")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        raise RecipeError(f"override {override!r}: the value is not valid YAML") from None
    for depth, key in enumerate(keys[:-1]):
        child = data.get(key)
        if child is None:
            child = data[key] = {}
        if not isinstance(child, dict):
            raise RecipeError(
                f"override {override!r}: {'.'.join(keys[: depth + 1])} holds a value, not a section"
            )
        data = child
    data[keys[-1]] = value


def _explain(detail: Any) -> str:
    """One pydantic error as a person would put it."""
    where = ".".join(str(part) for part in detail["loc"]) or "recipe"
    if detail["type"] == "extra_forbidden":
        key = str(detail["loc"][-1])
        known = _known_keys(detail["loc"][:-1])
        near = _elsewhere(key, Recipe) or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        told = textwrap.shorten(", ".join(known), 200, placeholder=" ..")
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {told}"
        return f"{where}: unknown key; {hint}"
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        known = re.findall(r"'([^']+)'", detail["ctx"]["expected"])
        near = difflib.get_close_matches(detail["input"], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{where}: {detail['input']!r} is not known; {hint}"
    if detail["type"] == "missing":
        return f"{where}: is missing"
    if detail["type"] == "model_type":
        return f"{where}: takes keys and values, not {detail['input']!r}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower() + message[1:]}" + (
        f" (got {detail['input']!r})" if isinstance(detail["input"], str | int | float | None) else ""
    )


def _known_keys(loc: tuple[str | int, ...]) -> list[str]:
    """The field names of the section at `loc`, walking through optional and list types."""
    model: type[BaseModel] = Recipe
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            found = _section_in(model.model_fields[part].annotation)
            model = found if found is not None else model
    return list(model.model_fields)


def _elsewhere(key: str, section: type[BaseModel], prefix: str = "") -> list[str]:
    """Where another section holds a key of this very name, as in `train.lr`: the first, in dots."""
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is not None and key in inner.model_fields:
            return [f"{prefix}{name}.{key}"]
        if inner is not None and (found := _elsewhere(key, inner, f"{prefix}{name}.")):
            return found
    return []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for arg in get_args(annotation) if (s := _section_in(arg)) is not None), None)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `6e-3` as text, where people mean a number, and `24:00:00` as the number 86400."""


_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?0b[0-1_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
