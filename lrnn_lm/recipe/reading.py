"""YAML as people mean it: a key once, numbers such as `6e-3`, and the text of every value as it was typed.

Whether `1.10` is a number or a name depends on the key that it stands at. So the loader keeps both, and
`settle` takes one of them by the schema.
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
    """A number, a truth value or null, and how it was typed."""

    value: Any
    text: str


class TwiceError(yaml.YAMLError):
    """A key that stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `6e-3` as text, where people mean a number, `24:00:00` as 86400, `010` as 8; dates."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Checked here, where a mapping is as written: merge keys (`<<`) are spread out later."""
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
    """What a YAML text holds, its plain numbers and the like as `Scalar`s. Raises yaml.YAMLError."""
    return _plain_keys(yaml.load(text, Loader=_Loader))


def _plain_keys(data: Any) -> Any:
    if isinstance(data, dict):
        return {k.value if isinstance(k, Scalar) else k: _plain_keys(value) for k, value in data.items()}
    return [_plain_keys(entry) for entry in data] if isinstance(data, list) else data


def load_override(text: str, annotation: Any) -> Any:
    """The value of an override for a key of this type.

    Where the key takes text it is what was typed, whatever YAML would make of it, without the quotes around
    it; else a list or a mapping in brackets, or one value. Raises yaml.YAMLError.
    """
    text = text.strip()
    if text[:1] in ("[", "{") and not _takes_text(annotation):
        return _whole(text)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            return _whole(text)
        except yaml.YAMLError:  # quotes within: text like any other
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
    """One YAML value, which must be all of the text: what comes after ` #` would be lost."""
    node = yaml.compose(text, Loader=_Loader)
    if node.end_mark.index != len(text):
        raise yaml.YAMLError(f"{text[node.end_mark.index :].strip()!r} would be lost; quote what holds it")
    return load_yaml(text)


def settle(data: Any, annotation: Any) -> Any:
    """`data` without Scalars: each becomes its text where the schema takes text, else its value.

    `annotation` is a section or the type of one of its fields. What the schema does not know becomes values.
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
    """The type of a field of a section by its keys, Any if there is no such field."""
    for key in keys:
        section = section_in(annotation)
        known = section is not None and isinstance(key, str) and key in section.model_fields
        annotation = section.model_fields[key].annotation if known else Any
    return annotation


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or a list of which."""
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
    """Whether a plain value is text: str, or names to choose from."""
    return any(kind is str or get_origin(kind) is Literal for kind in _alternatives(annotation))
