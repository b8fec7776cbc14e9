"""`lrnn info --keys`: every key of a recipe as its schema has it, a line each."""

import json
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from .mixer import MIXER_OPTIONS, MixerSection
from .quantities import Every, Span
from .reading import section_in
from .schema import Recipe

_WORDS = {NoneType: "null", str: "text", Every: "interval", Span: "part of the run"}


def key_lines() -> list[str]:
    """`train.micro_batch=8 (int): rows per rank in one forward pass`: default, type and description.

    Entries of a list are written `data.sources[].weight`. Keys of a kind of section are listed once.
    """
    return list(_lines(Recipe, "", {}))


def _lines(section: type[BaseModel], prefix: str, listed: dict[Any, str]) -> Iterator[str]:
    """listed: the first key of each kind of section."""
    for name, field in section.model_fields.items():
        key, kind, default = prefix + name, field.annotation, field.get_default(call_default_factory=True)
        below = None if (below := section_in(kind)) in _WORDS else below
        first = listed.setdefault(below, key) if below else key
        of_mixer = section is MixerSection and name != "type"
        told = [_by_type(name) if of_mixer else field.description]
        told += [f"keys as in {first}"] if first != key else []
        plain = to_jsonable_python(default, fallback=str)
        given = f"={plain if isinstance(plain, str) else json.dumps(plain)}"
        given = "" if of_mixer or default is PydanticUndefined else given
        if below is not kind:  # else only its keys
            yield f"{key}{given} ({_words(kind)}): {'; '.join(filter(None, told))}".removesuffix(": ")
        if below and first == key:
            yield from _lines(below, f"{key}[]." if _words(kind).startswith("list") else f"{key}.", listed)


def _words(kind: Any) -> str:
    """A type in the words of a recipe."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (list, dict, tuple):
        return f"{origin.__name__} of {_words(inner[-1])}"
    if origin is Annotated:
        return _words(inner[0])
    if inner:
        return " | ".join(dict.fromkeys(map(_words, inner)))
    return _WORDS.get(kind) or ("section" if issubclass(kind, BaseModel) else kind.__name__)


def _by_type(option: str) -> str:
    """The mixer types that have an option, by its default."""
    types: dict[str, list[str]] = {}
    for kind, options in MIXER_OPTIONS.items():
        if option in options:
            types.setdefault(json.dumps(options[option].default), []).append(kind)
    return "; ".join(f"{default} for {', '.join(kinds)}" for default, kinds in types.items())
