"""Makes docs/keys.md: every key of a recipe with its default and meaning, and the options of every mixer.

python -m benchmarks.pages.keys            print it
python -m benchmarks.pages.keys --write    put it into docs/keys.md
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lrnn_lm.mixers import MIXERS
from lrnn_lm.recipe import Recipe
from lrnn_lm.recipe.data import MixtureSource, SourceSection
from lrnn_lm.recipe.mixer import MIXER_OPTIONS, MixerSection
from lrnn_lm.recipe.reading import section_in
from lrnn_lm.recipe.section import Section

from .tree import ROOT

PAGE = ROOT / "docs" / "keys.md"
HEAD = """# Recipe keys

For whoever writes a recipe: every key with its default, made from the schema by
`python -m benchmarks.pages.keys --write`. Keys that need more words are explained in
[training.md](training.md#recipe-keys-for-training), [data.md](data.md) and [long.md](long.md). Beside them,
`extends: FILE` builds on another recipe.

A number of tokens reads `524288` or `2M`. A time between two events reads `100K` (tokens), `200 steps` or
`30 min`, a part of the run `10%`, `2M` (tokens) or `200 steps`."""
OPTIONS = """
## model.mixer

`model.mixer.type` (default `bd_lru`), and the options of that type, as `model.mixer.block_size`. An entry of
`model.layer_pattern` is a type, or a type with its options. The file of a type describes its options.

| type | options and defaults |
|---|---|"""
COLUMNS = ["", "| key | default | meaning |", "|---|---|---|"]


def page() -> str:
    """The whole page."""
    top, sections, mixers = [], [], []
    for name, field in Recipe.model_fields.items():
        section = section_in(field.annotation)
        if section is None:
            top.append(row(name, field))
        else:
            about = " ".join(section.__doc__.partition("\n\n")[0].split())
            sections += ["", f"## {name}", "", about, *COLUMNS, *rows(name, section)]
    for kind, options in MIXER_OPTIONS.items():
        told = [f"`{name}: {default(option.default)}`" for name, option in options.items()]
        file = MIXERS[kind].__module__.replace(".", "/")
        mixers.append(f"| [`{kind}`](../{file}.py) | {', '.join(told)} |")
    return "\n".join([HEAD, *COLUMNS, *top, *sections, OPTIONS, *mixers]) + "\n"


def rows(name: str, section: type[BaseModel], known: frozenset[str] = frozenset()) -> Iterator[str]:
    """A row for each key of a section but those `known`, then for those of the sections inside it."""
    for key, field in section.model_fields.items():
        inner = section_in(field.annotation)
        if key in known or inner is MixerSection:
            continue
        is_section = inner is not None and issubclass(inner, Section)
        if not is_section or field.description:
            yield row(f"{name}.{key}", field)
        if is_section and not key.startswith("validation_source"):  # whose keys are those of `source`
            shared = (
                frozenset(SourceSection.model_fields) - {"name"} if inner is MixtureSource else frozenset()
            )
            yield from rows(f"{name}.{key}" + "[]" * (get_origin(field.annotation) is list), inner, shared)


def row(key: str, field: FieldInfo) -> str:
    """A key, its default, and its meaning with the names that it takes."""
    kinds = [field.annotation, *get_args(field.annotation)]
    names = [f"`{name}`" for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    meaning = "; ".join(filter(None, [(field.description or "").replace("*", r"\*"), ", ".join(names)]))
    if field.is_required():
        told = "" if "default:" in meaning else "required"
    else:
        told = f"`{default(field.get_default(call_default_factory=True))}`"
    return f"| `{key}` | {told} | {meaning} |"


def default(value: Any) -> str:
    """A default as a recipe writes it."""
    return str(value) if isinstance(value, str | BaseModel) else json.dumps(value)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--write", action="store_true")
    if options.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
