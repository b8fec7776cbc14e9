"""A strict YAML reader: no key twice, and every value as the text that was typed.

YAML 1.1 would read `1.10` as a number, `no` as false, `24:00:00` as 86400 and `6e-3` as text. So only empty
values and `null` mean something here. What else a text stands for is decided by the schema: pydantic turns it
into the number, boolean or text that its key takes.
"""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel


class TwiceError(yaml.YAMLError):
    """A key that is given twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """Reads every value as text but null; merge keys (`<<`) are expanded."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Refuse a key given twice, and read null as a key's text. On the nodes: merge keys come later."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            key.tag = key.tag.replace("null", "str")
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                raise TwiceError(f"{key.value} is given twice, in lines {first} and {line}; make one of them")
            lines[key.value] = line
        return node


_KEPT = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "merge")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """Parse YAML; its values are texts and None. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def load_override(text: str, annotation: Any) -> Any:
    """The value of an override for a key of this type.

    If the key takes text, the value is the text as typed, without surrounding quotes, whatever YAML would
    make of it. Else it is a list or mapping in brackets, or one value. Raises yaml.YAMLError.
    """
    text = text.strip()
    if text[:1] in ("[", "{") and not takes_text(annotation):
        return _whole(text)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            return _whole(text)
        except yaml.YAMLError:  # quotes inside the text: take it as typed
            return text
    is_null = text in ("null", "Null", "NULL", "~") and NoneType in _alternatives(annotation)
    return None if is_null or not text else text


def _whole(text: str) -> Any:
    """Parse one YAML value. It must cover the whole text: anything after ` #` would be lost."""
    node = yaml.compose(text, Loader=_Loader)
    if node.end_mark.index != len(text):
        raise yaml.YAMLError(f"{text[node.end_mark.index :].strip()!r} would be lost; quote what holds it")
    return load_yaml(text)


def field_type(annotation: Any, *keys: str) -> Any:
    """Type of the field at `keys` in a section; Any if there is no such field."""
    for key in keys:
        if get_origin(annotation) is dict:  # its keys are names
            annotation = get_args(annotation)[1]
            continue
        section = section_in(annotation)
        known = section is not None and key in section.model_fields
        annotation = section.model_fields[key].annotation if known else Any
    return annotation


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type, also inside a list or an option; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for arg in get_args(annotation) if (s := section_in(arg)) is not None), None)


def takes_text(annotation: Any) -> bool:
    """Whether the type takes text: str, or a choice of names."""
    return any(kind is str or get_origin(kind) is Literal for kind in _alternatives(annotation))


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for arg in get_args(annotation) for kind in _alternatives(arg)]
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    return [annotation]
