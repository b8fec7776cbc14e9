"""English that every Python carries: the language reference's topics and the standard library's docstrings.

Source files are parsed with `ast`, never imported. A document is one topic, or the docstrings of one module
(and of its classes and functions) under their names; a long module makes several documents.
"""

import ast
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .specs import DataError

MAX_CHARS = 6_000  # a document is closed after the docstring that reaches this
MIN_CHARS = 160  # what is shorter teaches nothing
_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip",
    "__pycache__", "pydoc_data",
}  # fmt: skip
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents() -> Iterator[str]:
    """Topics in order of name, then modules in order of path; no docstring twice. Raises DataError if there
    are none.
    """
    found = False
    seen: set[str] = set()
    for topic in _topics():
        if topic not in seen:
            found = True
            seen.add(topic)
            yield topic
    for path in _module_files():
        for document in _module_documents(path, seen):
            found = True
            yield document
    if not found:
        raise DataError(
            "source python-docs: this Python came without its standard library's sources; use another source"
        )


def fingerprint() -> list[object]:
    """What determines the documents: Python's version and the names and sizes of its modules."""
    root = _root()
    return [
        sys.version,
        MAX_CHARS,
        MIN_CHARS,
        [(str(p.relative_to(root)), p.stat().st_size) for p in _module_files()],
    ]


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return [topics[name].strip("\n") + "\n" for name in sorted(topics) if len(topics[name]) >= MIN_CHARS]


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _module_files() -> list[Path]:
    files: list[Path] = []
    for folder, inside, names in os.walk(_root()):
        inside[:] = [name for name in inside if name not in _SKIPPED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def _module_documents(path: Path, seen: set[str]) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and deliberately broken files
        return
    parts = list(path.relative_to(_root()).with_suffix("").parts)
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    sections: list[str] = []
    for name, text in _docstrings(tree, module):
        if text in seen:
            continue
        seen.add(text)
        sections.append(f"{name}\n\n{text}\n")
        if sum(map(len, sections)) >= MAX_CHARS:
            yield "\n".join(sections)
            sections = []
    document = "\n".join(sections)
    if len(document) >= MIN_CHARS:
        yield document


def _docstrings(node: _Documented, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module, class or function, then of what stands inside it, in source
    order.
    """
    text = ast.get_docstring(node)
    if text and text.strip():
        yield name, text
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = ", ".join(
                a.arg for a in [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
            )
            yield from _docstrings(child, f"{name}.{child.name}({arguments})")
