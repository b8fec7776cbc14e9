"""Several modules of the package as a few flat files, for code that travels without the package.

A file is its modules one after the other, each after those that it imports.

- Imports move to the top of the file; imports between modules disappear, or name the flat file.
- A name that two modules use gets its module's name in front: `_slab` of matrix_scan is `_matrix_scan_slab`.
- `reference.scan` of an imported module becomes that function's name.

Edits are found in the syntax tree and applied to the text, so comments and layout stay.
"""

import ast
import builtins
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable

from .scopes import Module, Source, Sources, inner_names, references

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
        self.references = {m: references(sources, sources[m]) for m in self.file_of}
        self.final = self._final_names()

    def _final_names(self) -> dict[tuple[Module, str], str]:
        """A name for everything that a module defines, unique over all files."""
        modules = self.file_of
        ignored = {"_", "__all__"}  # never read
        uses = Counter(name for m in modules for name in self.sources[m].own - ignored)
        external = _external_names(self.sources[m].external for m in modules)
        uses.update(external)
        exported = {
            (meaning.module, meaning.name)
            for m in modules
            if self.sources[m].path.name == "__init__.py"
            for node in self.sources[m].top
            for alias in node.names
            for meaning in [self.sources.meaning(m, node, alias.name)]
        }
        final = {}
        for m in modules:
            for name in self.sources[m].own - ignored:
                alike = uses[name] > 1 and (m, name) not in exported
                final[m, name] = _prefixed(m[-1], name) if alike else name
        taken = external | set(vars(builtins))
        doubled = [n for n, count in Counter(final.values()).items() if count > 1 or n in taken]
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
            for reference in self.references[module]:
                home = self.file_of[reference.meaning.module]
                if home != file and reference.meaning.by in self.sources[module].top:
                    flat.setdefault(home, set()).add(self.final[reference.meaning[:2]])
        return external, flat

    def text(self, module: Module) -> str:
        """A module's part of its file; empty if it only re-exports names."""
        source = self.sources[module]
        at_top = {*source.external, *source.top}
        statements = [n for n in ast.walk(source.tree) if isinstance(n, ast.stmt)]
        gone = {n for n in statements if n in at_top or _is_all(n) or self._left_out(n)}
        rest = [n for n in source.tree.body if n not in gone]
        if all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in rest):
            return ""
        edits = [_line_edit(node, source.text) for node in gone]
        for node in statements:
            if isinstance(node, ast.ImportFrom) and node.level and node not in at_top:
                edits.append(_edit(node, self._inner_import(module, node)))
            elif (
                isinstance(node, ast.Import | ast.ImportFrom)
                and node not in at_top
                and not _always_there(node)
            ):
                edits.append(_edit(node, _guarded(ast.unparse(node), node.col_offset)))
        kept = [node for node in rest if not isinstance(node, ast.Import | ast.ImportFrom)]
        names = [edit for edit in self._name_edits(source) if any(_holds(node, edit) for node in kept)]
        return _apply(source.text, [*edits, *names]).strip("\n")

    def _name_edits(self, source: Source) -> list[Edit]:
        """What is called by another name in the flat file."""
        edits, inner = [], inner_names(source.tree)
        for node, meaning in self.references[source.module]:
            name = self.final.get(meaning[:2], meaning.name)
            now = ast.unparse(node)
            if name != now and inner & {name, now}:
                raise ValueError(
                    f"{source.path}, line {node.lineno}: a local name hides the module's {name!r}"
                )
            edits.append(_edit(node, name))
        for node in source.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                edits.append(_name_edit(node, self.final.get((source.module, node.name), node.name)))
        return edits

    def _inner_import(self, module: Module, node: ast.ImportFrom) -> str:
        """A relative import inside a function, as it reads in the flat file."""
        meanings = {self.sources.meaning(module, node, alias.name)[:2] for alias in node.names}
        meanings |= {r.meaning[:2] for r in self.references[module] if r.meaning.by is node}
        homes: dict[str, set[str]] = {}
        for target, name in meanings:
            if name is not None and self.file_of[target] != self.file_of[module]:
                homes.setdefault(self.file_of[target], set()).add(self.final[target, name])
        indent = " " * node.col_offset
        lines = [f"from .{home} import {', '.join(sorted(names))}" for home, names in sorted(homes.items())]
        return f"\n{indent}".join(lines) or "pass"


def render_imports(nodes: list[ast.Import | ast.ImportFrom], flat: dict[str, set[str]], code: str) -> str:
    """The imports at the top of a file that its code uses, each once.

    First Python's own, then torch and transformers, then the rest inside a `try` (transformers requires what
    is imported outside of one), then names of the other flat files.
    """
    read = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    plain: dict[str, set[str]] = {group: set() for group in ("python", "present", "rest")}
    names: dict[tuple[str, str], set[str]] = {}
    for node in nodes:
        root = (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        group = "python" if root in sys.stdlib_module_names else "present" if root in _PRESENT else "rest"
        for alias in node.names:
            if (alias.asname or alias.name).split(".")[0] not in read:
                continue
            if isinstance(node, ast.Import):
                plain[group].add(f"import {ast.unparse(alias)}")
            else:
                names.setdefault((group, node.module), set()).add(ast.unparse(alias))
    blocks = {
        group: "\n".join(
            [*sorted(lines), *(_from(m, used) for (g, m), used in sorted(names.items()) if g == group)]
        )
        for group, lines in plain.items()
    }
    if blocks["rest"]:
        blocks["rest"] = _guarded(blocks["rest"], 0)
    blocks["flat"] = "\n".join(_from(f".{home}", used) for home, used in sorted(flat.items()))
    return "\n\n".join(filter(None, blocks.values()))


def _from(module: str, names: set[str]) -> str:
    line = f"from {module} import {', '.join(sorted(names))}"
    if len(line) <= 110:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in sorted(names)) + ")"


def _guarded(statements: str, column: int) -> str:
    indent = " " * column
    inner = "".join(f"\n{indent}    {line}" for line in statements.splitlines())
    return f"try:{inner}\n{indent}except ImportError:\n{indent}    raise"


def _always_there(node: ast.Import | ast.ImportFrom) -> bool:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    return all(name.split(".")[0] in _PRESENT for name in names)


def _external_names(imports: Iterable[list[ast.Import | ast.ImportFrom]]) -> set[str]:
    """Names that imports of other packages bind; ValueError if one stands for two things."""
    origins: dict[str, str] = {}
    for node in (node for nodes in imports for node in nodes):
        for alias in node.names:
            name = alias.asname or (alias.name.split(".")[0] if isinstance(node, ast.Import) else alias.name)
            whole = alias.name if alias.asname else name
            origin = whole if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
            if origins.setdefault(name, origin) != origin:
                raise ValueError(
                    f"{name!r} is {origins[name]} in one module of the bundle and {origin} in another"
                )
    return set(origins)


def _prefixed(stem: str, name: str) -> str:
    """`name` with its module's in front, in the same style: _matrix_slab, MATRIX_CHUNK, MatrixPlan."""
    if name.isupper():
        return f"{stem.upper()}_{name}"
    if name[0].isupper():
        return stem.title().replace("_", "") + name
    return f"_{stem}{name}" if name.startswith("_") else f"{stem}_{name}"


def _edit(node: ast.expr | ast.stmt, text: str) -> Edit:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset, text


def _is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def _holds(node: ast.stmt, edit: Edit) -> bool:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
    return first <= edit[0] <= node.end_lineno


def _line_edit(node: ast.stmt, text: str) -> Edit:
    """A statement gone, its lines and the comments right above them too."""
    lines, first = text.splitlines(), node.lineno
    while first > 1 and lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return first, 0, node.end_lineno + 1, 0, ""


def _name_edit(node: ast.FunctionDef | ast.ClassDef, name: str) -> Edit:
    start = node.col_offset + len("class " if isinstance(node, ast.ClassDef) else "def ")
    return node.lineno, start, node.lineno, start + len(node.name.encode()), name


def _apply(text: str, edits: list[Edit]) -> str:
    lines = [*text.encode().splitlines(keepends=True), b""]
    for first, start, last, stop, new in sorted(set(edits), reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:start] + new.encode() + lines[last - 1][stop:]]
    return re.sub(r"\n{4,}", "\n\n\n", b"".join(lines).decode())
