"""A strict YAML reader: no key twice, numbers such as `6e-3`, and text exactly as typed.

Whether `1.10` is a number or a text depends on the type of its key. So the loader keeps both (a Scalar), and
`settle` chooses one by the schema.
"""

import re
from dataclasses import dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel


@dataclass(frozen=True)
class Scalar:
    """A number, boolean or null, and the text as typed."""

    value: Any
    text: str


class TwiceError(yaml.YAMLError):
    """A key that is given twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """Fixes surprises of YAML 1.1: it reads `6e-3` as text, `24:00:00` as 86400, `010` as 8, and dates."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Refuse a key given twice. Checked on the nodes: merge keys (`<<`) are expanded later."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value]
                raise TwiceError(f"{key.value} is given twice, in lines {first} and {line}; make one of them")
            lines[key.tag, key.value] = line
        return node


def _keep_text(construct: Any, loader: _Loader, node: yaml.ScalarNode) -> Scalar:
    return Scalar(construct(loader, node), node.value)


_LEFT_OUT = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "timestamp", "value")}
_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in resolvers if tag not in _LEFT_OUT]
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?0b[01][01_]*|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F][0-9a-fA-F_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
for _kind in ("int", "float", "bool", "null"):
    _tag = f"tag:yaml.org,2002:{_kind}"
    _Loader.add_constructor(_tag, partial(_keep_text, yaml.SafeLoader.yaml_constructors[_tag]))


def load_yaml(text: str) -> Any:
    """Parse YAML; unquoted numbers, booleans and nulls become `Scalar`s. Raises yaml.YAMLError."""
    return _plain_keys(yaml.load(text, Loader=_Loader))


def _plain_keys(data: Any) -> Any:
    if isinstance(data, dict):
        return {k.value if isinstance(k, Scalar) else k: _plain_keys(value) for k, value in data.items()}
    return [_plain_keys(entry) for entry in data] if isinstance(data, list) else data


def load_override(text: str, annotation: Any) -> Any:
    """The value of an override for a key of this type.

    If the key takes text, the value is the text as typed, without surrounding quotes, whatever YAML would
    make of it. Else it is a list or mapping in brackets, or one value. Raises yaml.YAMLError.
    """
    text = text.strip()
    if text[:1] in ("[", "{") and not _takes_text(annotation):
        return _whole(text)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            return _whole(text)
        except yaml.YAMLError:  # quotes inside the text: take it as typed
            return text
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        if _takes_text(annotation) and tag != "tag:yaml.org,2002:null":
            return text
        return loader.construct_document(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()


def _whole(text: str) -> Any:
    """Parse one YAML value. It must cover the whole text: anything after ` #` would be lost."""
    node = yaml.compose(text, Loader=_Loader)
    if node.end_mark.index != len(text):
        raise yaml.YAMLError(f"{text[node.end_mark.index :].strip()!r} would be lost; quote what holds it")
    return load_yaml(text)


def settle(data: Any, annotation: Any) -> Any:
    """Replace every Scalar in `data`: by its text where the schema takes text, else by its value.

    annotation: a section or the type of one of its fields. Keys that the schema does not know get values.
    """
    if isinstance(data, Scalar):
        if data.value is None and (not data.text or NoneType in _alternatives(annotation)):
            return None
        return data.text if _takes_text(annotation) else data.value
    if isinstance(data, dict):
        return {key: settle(value, field_type(annotation, key)) for key, value in data.items()}
    if isinstance(data, list):
        lists = [kind for kind in _alternatives(annotation) if get_origin(kind) is list]
        inner = get_args(lists[0])[0] if lists else Any
        return [settle(entry, inner) for entry in data]
    return data


def field_type(annotation: Any, *keys: Any) -> Any:
    """Type of the field at `keys` in a section; Any if there is no such field."""
    for key in keys:
        section = section_in(annotation)
        known = section is not None and isinstance(key, str) and key in section.model_fields
        annotation = section.model_fields[key].annotation if known else Any
    return annotation


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type, also inside a list or an option; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for arg in get_args(annotation) if (s := section_in(arg)) is not None), None)


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for arg in get_args(annotation) for kind in _alternatives(arg)]
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    return [annotation]


def _takes_text(annotation: Any) -> bool:
    """Whether the type takes text: str, or a choice of names."""
    return any(kind is str or get_origin(kind) is Literal for kind in _alternatives(annotation))
