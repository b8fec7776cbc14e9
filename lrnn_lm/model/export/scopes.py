"""What every name in the package's modules stands for; `bundle.py` reads it."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_PACKAGE = Path(__file__).parents[2]
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

Module = tuple[str, ...]  # a module's path below the package: ("kernels", "gates")


class Meaning(NamedTuple):
    """What a name stands for: `name` of `module`, or the module itself if None; the import that says so."""

    module: Module
    name: str | None
    by: ast.ImportFrom | None = None


class Reference(NamedTuple):
    """A place in a module's text that names something of the package."""

    node: ast.expr
    meaning: Meaning


class Source:
    """A module: its text, its tree, and what it defines and imports at its top level."""

    def __init__(self, module: Module):
        self.module = module
        self.path = path_of(module)
        self.text = self.path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.own = set(bound(self.tree.body))
        self.external = [n for n in self.tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        self.external = [n for n in self.external if isinstance(n, ast.Import) or not n.level]
        for node in self.external:
            self.own -= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        self.relative = [n for n in ast.walk(self.tree) if isinstance(n, ast.ImportFrom) and n.level]
        self.top = {node for node in self.relative if node in self.tree.body}

    def target(self, node: ast.ImportFrom) -> Module:
        """The module that a relative import names."""
        package = self.module if self.path.name == "__init__.py" else self.module[:-1]
        return (*package[: len(package) - (node.level - 1)], *(node.module.split(".") if node.module else ()))


class Sources(dict[Module, Source]):
    """All modules that an entry module needs, by name."""

    def __init__(self, entry: Module):
        super().__init__()
        self._read: dict[Module, Source] = {}  # packages too, which are asked what they pass on
        waiting = [entry]
        while waiting:
            module = waiting.pop()
            if module not in self:
                self[module] = self._source(module)
                waiting += [m for node in self[module].relative for m in self.modules_of(module, node)]

    def _source(self, module: Module) -> Source:
        if module not in self._read:
            self._read[module] = Source(module)
        return self._read[module]

    def modules_of(self, module: Module, node: ast.ImportFrom) -> list[Module]:
        """The modules that a relative import of `module` needs."""
        base = self._source(module).target(node)
        if not path_of(base).is_file():
            raise ValueError(f"{self._source(module).path}, line {node.lineno}: no module {'.'.join(base)}")
        inner = [(*base, alias.name) for alias in node.names if self._is_submodule(base, alias.name)]
        return inner if len(inner) == len(node.names) else [*inner, base]

    def _is_submodule(self, base: Module, name: str) -> bool:
        """Whether `from base import name` means a module; a package's own name of that kind comes first."""
        source = self._source(base)
        passed_on = {alias.asname or alias.name for node in source.top for alias in node.names}
        return name not in source.own | passed_on and path_of((*base, name)).is_file()

    def meaning(self, module: Module, node: ast.ImportFrom, name: str) -> Meaning:
        """What `name` of a relative import in `module` stands for, through the modules that pass it on."""
        base = self._source(module).target(node)
        if self._is_submodule(base, name):
            return Meaning((*base, name), None, node)
        source = self._source(base)
        for inner in source.top:
            for alias in inner.names:
                if (alias.asname or alias.name) == name:
                    return self.meaning(base, inner, alias.name)._replace(by=node)
        if name not in source.own:
            raise ValueError(f"{source.path} has no {name!r}, which {self._source(module).path} imports")
        return Meaning(base, name, node)

    def in_order(self, root: Module, done: list[Module]) -> None:
        """Add to `done` what `root` imports at its top level, then `root`."""
        if root in done:
            return
        for node in sorted(self[root].top, key=lambda n: n.lineno):
            for module in self.modules_of(root, node):
                self.in_order(module, done)
        done.append(root)


def references(sources: Sources, source: Source) -> list[Reference]:
    """Every place in a module that names something of the package.

    A name stands for the same thing in the whole module, as `bundle.py` checks, unless a function imports it.

    Raises:
        ValueError: `global`, or a module used as a value.
    """
    found: list[Reference] = []

    def imported(nodes: Iterable[ast.AST]) -> dict[str, Meaning]:
        return {
            alias.asname or alias.name: sources.meaning(source.module, node, alias.name)
            for node in nodes
            if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names
        }

    def visit(node: ast.AST, names: dict[str, Meaning]) -> None:
        if isinstance(node, ast.Global):
            raise ValueError(f"{source.path}, line {node.lineno}: `global` cannot be bundled")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = names | imported(_statements(node.body))
        meaning = names.get(node.id) if isinstance(node, ast.Name) else None
        if meaning is not None:
            if meaning.name is None:
                raise ValueError(
                    f"{source.path}, line {node.lineno}: {node.id!r} is a module; name what is in it"
                )
            found.append(Reference(node, meaning))
        owner = names.get(node.value.id) if _is_attribute_of_name(node) else None
        if owner is not None and owner.name is None:
            if node.attr not in sources[owner.module].own:
                raise ValueError(f"{source.path}, line {node.lineno}: no {node.attr!r} in {node.value.id}")
            found.append(Reference(node, owner._replace(name=node.attr)))
            return
        for child in ast.iter_child_nodes(node):
            visit(child, names)

    visit(source.tree, {name: Meaning(source.module, name) for name in source.own} | imported(source.top))
    return found


def inner_names(tree: ast.Module) -> set[str]:
    """Names that functions, classes and comprehensions of a module bind, arguments included."""
    names = {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, _COMPREHENSIONS):
            targets = [n for g in node.generators for n in ast.walk(g.target)]
            names |= {n.id for n in targets if isinstance(n, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names |= set(bound(node.body))
    return names


def _is_attribute_of_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)


def path_of(module: Module) -> Path:
    """The file of a module."""
    path = _PACKAGE.joinpath(*module)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _statements(body: list[ast.AST]) -> Iterator[ast.AST]:
    """Every node of a scope, not those of scopes inside it."""
    waiting = list(body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*_FUNCTIONS, *_COMPREHENSIONS, ast.ClassDef)):
            waiting += ast.iter_child_nodes(node)


def bound(body: list[ast.AST]) -> Iterator[str]:
    """Names that a scope binds, other than by relative imports."""
    for node in _statements(body):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler):
            yield from filter(None, [node.name])
        elif isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
