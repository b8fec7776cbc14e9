"""English text in every Python installation: the language reference's topics, the library's docstrings.

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
MIN_CHARS = 160  # shorter documents are dropped
_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip",
    "__pycache__", "pydoc_data",
}  # fmt: skip
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents() -> Iterator[str]:
    """Topics in order of name, then modules in order of path; no text twice. DataError if there are none."""
    seen = dict.fromkeys(_topics())
    yield from list(seen)
    for path in _module_files():
        yield from _module_documents(path, seen)
    if not seen:
        raise DataError(
            "source python-docs: this Python came without its standard library's sources; use another source"
        )


def fingerprint() -> list[object]:
    """What decides the documents: Python's version, and the names and sizes of its modules."""
    modules = [(str(p.relative_to(_root())), p.stat().st_size) for p in _module_files()]
    return [sys.version, MAX_CHARS, MIN_CHARS, modules]


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


def _module_documents(path: Path, seen: dict[str, None]) -> Iterator[str]:
    """The documents of a module, without docstrings that are in `seen`; adds the others to it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates, and files broken on purpose
        return
    parts = list(path.relative_to(_root()).with_suffix("").parts)
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    sections: list[str] = []
    for name, text in _docstrings(tree, module):
        if text in seen:
            continue
        seen[text] = None
        sections.append(f"{name}\n\n{text}\n")
        if sum(map(len, sections)) >= MAX_CHARS:
            yield "\n".join(sections)
            sections = []
    document = "\n".join(sections)
    if len(document) >= MIN_CHARS:
        yield document


def _docstrings(node: _Documented, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module, class or function, then of its members, in source order."""
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
