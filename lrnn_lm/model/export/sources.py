"""What every name in the package's modules stands for; `bundle.py` reads it."""

import ast
import symtable
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[2]

Module = tuple[str, ...]  # a module's path below the package: ("kernels", "gates")
Name = tuple[Module, str | None]  # a name and the module that defines it; None: the module itself
Reference = tuple[ast.expr, Name, bool]  # a place in a text, what it names, whether the top level says so


def path_of(module: Module) -> Path:
    """The file of a module."""
    path = _PACKAGE.joinpath(*module)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


class Source:
    """A module: its text, its tree, and what it defines and imports."""

    def __init__(self, module: Module, text: str | None = None):
        self.module, self.path = module, path_of(module)
        self.text = text or self.path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        imports = [n for n in self.tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        self.external = [n for n in imports if isinstance(n, ast.Import) or not n.level]
        self.top = [n for n in imports if n not in self.external]  # of modules of the package
        self.statements = [n for n in ast.walk(self.tree) if isinstance(n, ast.stmt)]
        self.relative = [n for n in self.statements if isinstance(n, ast.ImportFrom) and n.level]
        table = symtable.symtable(self.text, str(self.path), "exec")
        self.own = _bound(table) - {"_", "__all__"}
        self.inner = _bound_inside(table)  # by functions, classes and comprehensions, arguments included

    def target(self, node: ast.ImportFrom) -> Module:
        """The module that a relative import names."""
        package = self.module if self.path.name == "__init__.py" else self.module[:-1]
        return (*package[: len(package) - (node.level - 1)], *(node.module.split(".") if node.module else ()))


def _bound(scope: symtable.SymbolTable) -> set[str]:
    """Names that a scope binds, other than by imports."""
    return {s.get_name() for s in scope.get_symbols() if s.is_local() and not s.is_imported()}


def _bound_inside(scope: symtable.SymbolTable) -> set[str]:
    return set().union(*(_bound(inner) | _bound_inside(inner) for inner in scope.get_children()))


@cache  # a process may write the code of several checkpoints
def _source_of(module: Module, path: Path) -> Source:
    return Source(module)


class Sources(dict[Module, Source]):
    """All modules that an entry module needs, by name. `texts` stand for the files of some of them."""

    def __init__(self, entry: Module, texts: dict[Module, str] | None = None):
        super().__init__()
        # Packages too, which are asked what they pass on
        self._read = {module: Source(module, text) for module, text in (texts or {}).items()}
        waiting = [entry]
        while waiting:
            if (module := waiting.pop()) not in self:
                self[module] = self._source(module)
                waiting += [m for node in self[module].relative for m in self._needed(module, node)]

    def _source(self, module: Module) -> Source:
        if module not in self._read:
            self._read[module] = _source_of(module, path_of(module))
        return self._read[module]

    def _needed(self, module: Module, node: ast.ImportFrom) -> list[Module]:
        """The modules that define what a relative import of `module` imports."""
        return [self.meaning(module, node, alias.name)[0] for alias in node.names]

    def meaning(self, module: Module, node: ast.ImportFrom, name: str) -> Name:
        """What `name` of a relative import in `module` stands for, through the modules that pass it on."""
        where = f"{self._source(module).path}, line {node.lineno}"
        base = self._source(module).target(node)
        if not path_of(base).is_file():
            raise ValueError(f"{where}: no module {'.'.join(base)}")
        source = self._source(base)
        for inner in source.top:
            for alias in inner.names:
                if (alias.asname or alias.name) == name:
                    return self.meaning(base, inner, alias.name)
        if name not in source.own and path_of((*base, name)).is_file():
            return (*base, name), None
        if name not in source.own:
            raise ValueError(f"{where}: {source.path} has no {name!r}")
        return base, name

    def passed_on(self) -> set[Name]:
        """What packages import for others to use."""
        return {
            self.meaning(module, node, alias.name)
            for module, source in list(self._read.items())
            if source.path.name == "__init__.py"
            for node in source.top
            for alias in node.names
        }

    def in_order(self, root: Module, done: list[Module]) -> None:
        """Add to `done` what `root` imports at its top level, then `root`."""
        if root in done:
            return
        for node in self[root].top:
            for module in self._needed(root, node):
                self.in_order(module, done)
        done.append(root)

    def references(self, module: Module) -> list[Reference]:
        """Every place in a module that names something of the package.

        A name stands for the same thing in the whole module, as `bundle.py` checks, unless a function imports
        it. Raises ValueError for `global`, and for a module used as a value.
        """
        source, found = self[module], []

        def visit(node: ast.AST, names: dict[str, tuple[Name, bool]]) -> None:
            where = f"{source.path}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Global):
                raise ValueError(f"{where}: `global` cannot be bundled")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = [n for n in source.relative if node.lineno <= n.lineno <= node.end_lineno]
                names = names | self._imported(module, inner, at_top=False)
            owner = names.get(node.value.id) if _is_attribute_of_name(node) else None
            if owner is not None and owner[0][1] is None:
                (home, _), at_top = owner
                if node.attr not in self[home].own:
                    raise ValueError(f"{where}: no {node.attr!r} in {node.value.id}")
                found.append((node, (home, node.attr), at_top))
                return
            if isinstance(node, ast.Name) and node.id in names:
                if names[node.id][0][1] is None:
                    raise ValueError(f"{where}: {node.id!r} is a module; name what is in it")
                found.append((node, *names[node.id]))
            for child in ast.iter_child_nodes(node):
                visit(child, names)

        own = {name: ((module, name), True) for name in source.own}
        visit(source.tree, own | self._imported(module, source.top, at_top=True))
        return found

    def _imported(
        self, module: Module, nodes: list[ast.ImportFrom], at_top: bool
    ) -> dict[str, tuple[Name, bool]]:
        return {
            alias.asname or alias.name: (self.meaning(module, node, alias.name), at_top)
            for node in nodes
            for alias in node.names
        }


def _is_attribute_of_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
