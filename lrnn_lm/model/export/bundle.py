"""Several modules of the package as a few flat files, for code that travels without the package.

A file is its modules one after the other, each after those that it imports.

- Imports move to the top of the file; imports between modules disappear, or name the flat file.
- A name that two modules use gets its module's name in front: `_slab` of matrix_scan is `_matrix_scan_slab`.
- `reference.scan` of an imported module becomes that function's name.

Edits are found in the syntax tree and applied to the text, so comments and layout stay. `sources.py` knows
what every name stands for.
"""

import ast
import builtins
import re
import sys
from collections import Counter
from collections.abc import Callable

from .sources import Module, Name, Source, Sources

_PRESENT = {"torch", "transformers", *sys.stdlib_module_names}

Edit = tuple[int, int, int, int, str]  # first line and byte, last line and byte, what stands there instead


class Bundle:
    """Modules as flat files.

    Args:
        files: the modules of each file, in order, by the file's name.
        left_out: whether a statement does not travel.
    Raises:
        ValueError: what a flat file cannot express: a module used as a value, a name with two meanings.
    """

    def __init__(
        self, sources: Sources, files: dict[str, list[Module]], left_out: Callable[[ast.stmt], bool]
    ):
        self.sources, self.files, self._left_out = sources, files, left_out
        self.file_of = {module: file for file, modules in files.items() for module in modules}
        self.references = {module: sources.references(module) for module in self.file_of}
        self.final = self._final_names()

    def _final_names(self) -> dict[Name, str]:
        """A name for everything that a module defines, unique over all files."""
        origins: dict[str, str] = {}  # of names that imports of other packages bind
        for node in (node for module in self.file_of for node in self.sources[module].external):
            for alias in node.names:
                inside = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                name = alias.asname or (alias.name if inside else alias.name.split(".")[0])
                origin = inside + (alias.name if inside or alias.asname else name)
                if origins.setdefault(name, origin) != origin:
                    raise ValueError(
                        f"{name!r} is {origins[name]} in one module of the bundle and {origin} in another"
                    )
        uses = Counter([*origins, *(name for module in self.file_of for name in self.sources[module].own)])
        passed_on = self.sources.passed_on()
        final = {
            (module, name): _prefixed(module[-1], name)
            if uses[name] > 1 and (module, name) not in passed_on
            else name
            for module in self.file_of
            for name in self.sources[module].own
        }
        taken = {*origins, *vars(builtins)}
        doubled = [name for name, count in Counter(final.values()).items() if count > 1 or name in taken]
        if doubled:
            raise ValueError(
                f"names that several modules of the bundle have, or Python itself: {sorted(doubled)}"
            )
        return final

    def imports(self, file: str) -> tuple[list[ast.Import | ast.ImportFrom], dict[str, set[str]]]:
        """What a file imports at its top: other packages, and names by flat file."""
        external, flat = [], {}
        for module in self.files[file]:
            external += self.sources[module].external
            for _, name, at_top in self.references[module]:
                if at_top and self.file_of[name[0]] != file:
                    flat.setdefault(self.file_of[name[0]], set()).add(self.final[name])
        return external, flat

    def text(self, module: Module) -> str:
        """A module's part of its file; empty if it only passes on names."""
        source = self.sources[module]
        at_top = {*source.external, *source.top}
        gone = {n for n in source.statements if n in at_top or _is_all(n) or self._left_out(n)}
        rest = [n for n in source.tree.body if n not in gone]
        if all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in rest):
            return ""
        edits = [*self._name_edits(source, gone), *(line_edit(node, source.text) for node in gone)]
        for node in source.statements:
            if isinstance(node, ast.ImportFrom) and node.level and node not in at_top:
                edits.append(edit(node, self._inner_import(module, node)))
            elif isinstance(node, ast.Import | ast.ImportFrom) and node not in at_top:
                names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                if {name.split(".")[0] for name in names} - _PRESENT:
                    edits.append(edit(node, _guarded(ast.unparse(node), node.col_offset)))
        return apply(source.text, edits).strip("\n")

    def _name_edits(self, source: Source, gone: set[ast.stmt]) -> list[Edit]:
        """What is called by another name in the flat file, outside of the statements that are gone."""
        dropped = {node for statement in gone for node in ast.walk(statement)}
        edits = []
        for node, meaning, _ in self.references[source.module]:
            name, now = self.final[meaning], ast.unparse(node)
            if name != now and source.inner & {name, now}:
                raise ValueError(
                    f"{source.path}, line {node.lineno}: a local name hides the module's {name!r}"
                )
            if node not in dropped:
                edits.append(edit(node, name))
        for node in source.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (source.module, node.name) in self.final:
                start = node.col_offset + len("class " if isinstance(node, ast.ClassDef) else "def ")
                end, name = start + len(node.name.encode()), self.final[source.module, node.name]
                edits.append((node.lineno, start, node.lineno, end, name))
        return edits

    def _inner_import(self, module: Module, node: ast.ImportFrom) -> str:
        """A relative import inside a function, as it reads in the flat file."""
        homes: dict[str, set[str]] = {}
        for name in (self.sources.meaning(module, node, alias.name) for alias in node.names):
            if self.file_of[name[0]] != self.file_of[module]:
                homes.setdefault(self.file_of[name[0]], set()).add(self.final[name])
        indent = "\n" + " " * node.col_offset
        lines = [f"from .{home} import {', '.join(sorted(names))}" for home, names in sorted(homes.items())]
        return indent.join(lines) or "pass"


def render_imports(nodes: list[ast.Import | ast.ImportFrom], flat: dict[str, set[str]], code: str) -> str:
    """The imports at the top of a file that its code uses, each once.

    First Python's own, then torch and transformers, then the rest inside a `try` (transformers requires what
    is imported outside of one), then names of the other flat files.
    """
    read = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    found: dict[tuple[int, str], set[str]] = {}  # names by block and module; of `import x` without a module
    for node in nodes:
        module = node.module if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            root = (module or alias.name).split(".")[0]
            block = 0 if root in sys.stdlib_module_names else 1 if root in _PRESENT else 2
            if (alias.asname or alias.name).split(".")[0] in read:
                found.setdefault((block, module), set()).add(ast.unparse(alias))
    blocks = ["", "", "", "".join(_from(f".{home}", names) for home, names in sorted(flat.items()))]
    for (block, module), names in sorted(found.items()):
        plain = "".join(f"import {name}\n" for name in sorted(names))
        blocks[block] += _from(module, names) if module else plain
    blocks[2] = blocks[2] and _guarded(blocks[2], 0) + "\n"
    return "\n".join(filter(None, blocks))


def _from(module: str, names: set[str]) -> str:
    line = f"from {module} import {', '.join(sorted(names))}\n"
    if len(line) <= 111:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in sorted(names)) + ")\n"


def _guarded(statements: str, column: int) -> str:
    indent = " " * column
    inner = "".join(f"\n{indent}    {line}" for line in statements.splitlines())
    return f"try:{inner}\n{indent}except ImportError:\n{indent}    raise"


def _prefixed(stem: str, name: str) -> str:
    """`name` with its module's in front, in the same style: _matrix_slab, MATRIX_CHUNK, MatrixPlan."""
    if name.isupper():
        return f"{stem.upper()}_{name}"
    if name[0].isupper():
        return stem.title().replace("_", "") + name
    return f"_{stem}{name}" if name.startswith("_") else f"{stem}_{name}"


def _is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def edit(node: ast.expr | ast.stmt, text: str) -> Edit:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset, text


def line_edit(node: ast.stmt, text: str) -> Edit:
    """A statement gone, its lines and the comments right above them too."""
    lines, first = text.splitlines(), node.lineno
    while first > 1 and lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return first, 0, node.end_lineno + 1, 0, ""


def apply(text: str, edits: list[Edit]) -> str:
    lines = [*text.encode().splitlines(keepends=True), b""]
    for first, start, last, stop, new in sorted(set(edits), reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:start] + new.encode() + lines[last - 1][stop:]]
    return re.sub(r"\n{4,}", "\n\n\n", b"".join(lines).decode())
