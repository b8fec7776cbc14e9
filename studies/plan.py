"""The plan of the language-model study (lm.yaml): sizes, contenders, and waves of runs."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from lrnn_lm.recipe import explain, read_yaml
from lrnn_lm.recipe.quantities import TokenCount
from lrnn_lm.recipe.section import Section


class Size(Section):
    """What every model of a size shares."""

    parameters: TokenCount
    model: dict[str, Any]


class Contender(Section):
    """A model: `pattern` is its layer_pattern, `model` other keys of its own, `set` overrides."""

    mixer: dict[str, Any]
    pattern: list[dict[str, Any]] = Field([])
    model: dict[str, Any] = Field({})
    set: list[str] = Field([])


class Wave(Section):
    """Runs of a size, one for each contender, rate and seed."""

    name: str
    contenders: list[str]
    size: str
    tokens: TokenCount = Field(gt=0)
    rates: list[float]
    seeds: list[int] = Field([0])
    set: list[str] = Field([])


class Plan(Section):
    """The plan's file."""

    recipe: str
    sizes: dict[str, Size]
    contenders: dict[str, Contender]
    waves: list[Wave]


def read_plan(path: Path) -> Plan:
    """The plan. ValueError if it cannot be read, has a key that means nothing, or names what is not there."""
    read_yaml(path)  # for its errors: it reads numbers as text
    try:
        plan = Plan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        told = dict.fromkeys(explain(detail, Plan) for detail in error.errors())
        raise ValueError(f"{path}: {'; '.join(told)}") from None
    for wave in plan.waves:
        for kind, names, known in (
            ("contenders", wave.contenders, plan.contenders),
            ("sizes", [wave.size], plan.sizes),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"{path}: wave {wave.name!r} names {name!r}; known {kind}: {', '.join(known)}"
                    )
    return plan


def waves_of(plan: Plan, only: str | None) -> list[Wave]:
    """The plan's waves, or those that `only` names, with commas. ValueError for a name of none."""
    if only is None:
        return plan.waves
    names = {name.strip() for name in only.split(",")}
    known = dict.fromkeys(wave.name for wave in plan.waves)
    if unknown := sorted(names - set(known)):
        raise ValueError(f"--only: there is no wave {unknown[0]!r}; known: {', '.join(known)}")
    return [wave for wave in plan.waves if wave.name in names]
