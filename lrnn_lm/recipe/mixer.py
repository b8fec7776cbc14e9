"""The mixer section of a recipe: the mixer's type and the options of that type.

An option is declared once, in the mixer's `__init__`: name, type, default. Recipes are also checked where
importing torch is slow or fails (a login node). So the declarations are read from the source of the classes
that `lrnn_lm/mixers/__init__.py` registers; no mixer is imported.
"""

import ast
from collections.abc import Iterable
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)

from .section import Section

MIXERS_FOLDER = Path(__file__).parents[1] / "mixers"
DEFAULT_TYPE = "bd_lru"
# Annotation in a mixer's `__init__` -> the type that a recipe checks. `| None` may follow each.
GateName = Literal["softmax", "sigmoid", "relu", "silu", "tanh", "identity", "none"]
OPTION_TYPES: dict[str, Any] = {
    "int": Annotated[int, Field(ge=1, lt=2**24)],  # a size
    "float": Annotated[float, Field(gt=0)],  # a factor
    "bool": bool,
    "str": str,
    "BlockSize": Annotated[int, Field(ge=1, le=64)],
    "Reach": Annotated[int, Field(ge=2)],
    "GateName": GateName,
    "HalfLives": tuple[float, float],
}


class Option(NamedTuple):
    """An option declared in a mixer's `__init__`. annotation: source text of its type."""

    annotation: str
    default: Any

    @property
    def may_be_none(self) -> bool:
        return self.annotation.endswith("| None")


def read_options() -> dict[str, dict[str, Option]]:
    """{mixer type: {option name: Option}} for the types in MIXERS."""
    tree = _parsed("__init__")
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    modules = {alias.name: node.module for node in imports for alias in node.names}
    assignments = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
    registry = next(node.value for node in assignments if ast.unparse(node.target) == "MIXERS")
    return {
        name.value: _options_of(modules[cls.id], cls.id)
        for name, cls in zip(registry.keys, registry.values, strict=True)
    }


def _options_of(module: str, class_name: str) -> dict[str, Option]:
    """The arguments after `hidden_size` of a class's `__init__`, or of that of its base in the same file.

    Raises TypeError for a declaration that a recipe cannot check.
    """
    called = f"mixers/{module}.py: {class_name}"
    classes = [node for node in _parsed(module).body if isinstance(node, ast.ClassDef)]
    found = next(node for node in classes if node.name == class_name)
    init = next((n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        base = ast.unparse(found.bases[0])
        if any(node.name == base for node in classes):
            return _options_of(module, base)
        raise TypeError(f"{called} needs an __init__ of its own, where a recipe reads its options")
    _, _, *arguments = init.args.args
    if len(init.args.defaults) != len(arguments):
        raise TypeError(f"{called}: each option needs a default, and hidden_size none")
    options = {}
    for argument, default in zip(arguments, init.args.defaults, strict=True):
        annotation = "" if argument.annotation is None else ast.unparse(argument.annotation)
        if annotation.removesuffix(" | None") not in OPTION_TYPES:
            raise TypeError(
                f"{called}: option {argument.arg} has a type that a recipe cannot check, "
                f"{annotation or 'none'}; known: {', '.join(OPTION_TYPES)}, each also with `| None`"
            )
        options[argument.arg] = Option(annotation, ast.literal_eval(default))
    return options


def _parsed(module: str) -> ast.Module:
    return ast.parse((MIXERS_FOLDER / f"{module}.py").read_text(encoding="utf-8"))


MIXER_OPTIONS = read_options()


def _fields() -> dict[str, Any]:
    """pydantic fields for all options of all types. What any type allows for an option is allowed."""
    annotations: dict[str, dict[str, Any]] = {}
    for options in MIXER_OPTIONS.values():
        for name, (text, _) in options.items():
            kind = OPTION_TYPES[text.removesuffix(" | None")]
            annotations.setdefault(name, {})[text] = kind | None if text.endswith(" | None") else kind
    return {name: (reduce(or_, kinds.values()), None) for name, kinds in annotations.items()}


class _Mixer(Section):
    """A sequence mixer. Written out: the options of its type, and those given for other mixers of a pattern.

    An option that the type does not have is None.
    """

    model_config = ConfigDict(validate_default=False)

    @model_validator(mode="after")
    def _fill(self) -> "_Mixer":
        """Fill in the defaults of the type. `model_fields_set` keeps only what was given."""
        defaults = {name: option.default for name, option in MIXER_OPTIONS[self.type].items()}
        self.__dict__.update({k: value for k, value in defaults.items() if k not in self.model_fields_set})
        return self

    @model_serializer(mode="wrap")
    def _write(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        shown = {"type", *MIXER_OPTIONS[self.type], *self.model_fields_set}
        return {key: value for key, value in write(self).items() if key in shown}

    def filled(self, base: "_Mixer") -> "_Mixer":
        """This entry of a pattern, completed from `mixer` with the options that its type has.

        `model_fields_set` keeps only what the entry itself gives.
        """
        kind = self.type if "type" in self.model_fields_set else base.type
        values = dict.fromkeys(type(self).model_fields) | {"type": kind}
        for name, option in MIXER_OPTIONS[kind].items():
            value = getattr(base, name)
            given = name in base.model_fields_set and (value is not None or option.may_be_none)
            values[name] = value if given else option.default
        values |= {name: getattr(self, name) for name in self.model_fields_set}
        return type(self).model_construct(_fields_set=set(self.model_fields_set), **values)

    def written(self, base: "_Mixer") -> dict[str, Any]:
        """What was given, and what would be filled in otherwise if all options of `base` were given."""
        kept, theirs = set(self.model_fields_set), MIXER_OPTIONS[base.type].keys() - base.model_fields_set
        kept |= {n for n in theirs & MIXER_OPTIONS[self.type].keys() if getattr(base, n) != getattr(self, n)}
        return self.model_dump(mode="json", include=kept)


def make_section() -> type[_Mixer]:
    """Create the section class that takes any mixer type and any of their options."""
    kind = Literal[tuple(MIXER_OPTIONS)]
    fields = {"type": (kind, DEFAULT_TYPE), **_fields()}
    return create_model("MixerSection", __base__=_Mixer, __module__=__name__, **fields)


MixerSection = make_section()


def check_options(where: str, mixer: _Mixer, types: Iterable[str]) -> None:
    """Raise ValueError, naming the types that have it, for a given option that none of `types` has."""
    types = list(dict.fromkeys(types))
    known = {option for kind in types for option in MIXER_OPTIONS[kind]}
    for option in sorted(mixer.model_fields_set - known - {"type"}):
        owners = [kind for kind, options in MIXER_OPTIONS.items() if option in options]
        raise ValueError(
            f"{where}.{option} is an option of {', '.join(owners)}, not of {' or '.join(types)}; take it "
            f"out, or change the type (known here: {', '.join(sorted(known))})"
        )
    for name, option in MIXER_OPTIONS[mixer.type].items():
        if getattr(mixer, name) is None and not option.may_be_none:
            raise ValueError(f"{where}.{name}: {mixer.type} needs a value; leave it out for {option.default}")
