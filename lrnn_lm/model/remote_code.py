"""The model as files that travel with a checkpoint: what `trust_remote_code=True` loads without this package.

The files are generated from the package's own modules: `model/modeling.py` and what it imports relatively.
transformers copies only files beside the entry file that it sees named in lines `from .name import ..`, and
demands every other package that is imported outside a `try`. Hence four changes, and no other:

- modules lie flat: `from ..kernels.gates import EPS` reads `from .lrnn_kernels_gates import EPS`;
- what is neither torch, transformers nor Python's own (Triton) is imported inside a `try`;
- operators live in a namespace of their own, so that two copies of the code can run in one process;
- nothing is registered with the Auto classes: `auto_map` in config.json does that.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

from .. import __version__

OLDEST_TRANSFORMERS = (5, 17)  # as in pyproject.toml
ENTRY = "modeling_lrnn"
# Both classes through one file: transformers loads each file named here as a module of its own.
AUTO_MAP = {
    "AutoConfig": f"{ENTRY}.LRNNConfig",
    "AutoModel": f"{ENTRY}.LRNNModel",
    "AutoModelForCausalLM": f"{ENTRY}.LRNNForCausalLM",
}

_PACKAGE = Path(__file__).parent.parent
_NAMES = {("model", "modeling"): ENTRY, ("model", "config"): "configuration_lrnn"}
_OPERATORS = "lrnn_operators"
_PRESENT = {"torch", "transformers", *sys.stdlib_module_names}

Module = tuple[str, ...]  # a module's path below the package: ("kernels", "gates")
Edit = tuple[int, int, list[str]]  # first line, line after the last, what stands there instead


@cache
def remote_code() -> dict[str, str]:
    """File names and their contents; the same for the same version of the package, wherever it lies."""
    files: dict[str, str] = {}
    waiting: list[Module] = [("model", "modeling")]
    while waiting:
        module = waiting.pop()
        name = f"{_flat(module)}.py"
        if name not in files:
            files[name], imported = _generate(module)
            waiting += imported
    files[f"{_OPERATORS}.py"] = _operators()
    return dict(sorted(files.items()))


def _generate(module: Module) -> tuple[str, list[Module]]:
    """A module's file, and the modules that it imports."""
    path = _file(module)
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = source.splitlines()
    edits, imported = [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            text, modules = _relative_import(node, module, lines)
            edits.append((node.lineno, node.end_lineno + 1, text))
            imported += modules
        elif isinstance(node, ast.Import | ast.ImportFrom) and not _always_there(node):
            edits.append((node.lineno, node.end_lineno + 1, _guarded(node, lines)))
        elif isinstance(node, ast.Expr) and _registers(node.value):
            edits.append((_with_comments(node.lineno, lines), node.end_lineno + 1, []))
    prologue = [*_namespace(source), *(_version_check() if _flat(module) == ENTRY else [])]
    if prologue:
        first = next(n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom))
        edits.append((first.lineno, first.lineno, prologue))
    # From the end, so that line numbers stay true; what is inserted before a line comes after its own edit.
    for start, stop, text in sorted(edits, key=lambda edit: edit[:2], reverse=True):
        lines[start - 1 : stop - 1] = text
    code = re.sub(r'f?"lrnn_lm::', 'f"{NAMESPACE}::', "\n".join(lines))
    origin = "/".join(path.relative_to(_PACKAGE.parent).parts)
    header = f"# Generated from {origin} of lrnn-lm {__version__} (Apache-2.0): change it there.\n"
    return header + code.rstrip() + "\n", imported


def _relative_import(
    node: ast.ImportFrom, module: Module, lines: list[str]
) -> tuple[list[str], list[Module]]:
    """A relative import as it reads among flat files, and the modules it names."""
    package = module if _file(module).name == "__init__.py" else module[:-1]
    base = package[: len(package) - (node.level - 1)]
    if node.module:
        target = (*base, *node.module.split("."))
        text = lines[node.lineno - 1 : node.end_lineno]
        text[0] = re.sub(r"from\s+[.\w]+\s+import", f"from .{_flat(target)} import", text[0], count=1)
        return text, [target]
    indent, text, modules = " " * node.col_offset, [], []
    for alias in node.names:
        target = (*base, alias.name)
        flat, bound = _flat(target), alias.asname or alias.name
        text += [
            f"{indent}from .{flat} import __name__ as _  # by such a line transformers finds the file",
            f"{indent}from . import {flat} as {bound}",
        ]
        modules.append(target)
    return text, modules


def _always_there(node: ast.Import | ast.ImportFrom) -> bool:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    return all(name.split(".")[0] in _PRESENT for name in names)


def _guarded(node: ast.Import | ast.ImportFrom, lines: list[str]) -> list[str]:
    """An import that transformers does not demand before it loads the file; it fails where it stands."""
    indent = " " * node.col_offset
    statement = [f"    {line}" for line in lines[node.lineno - 1 : node.end_lineno]]
    return [f"{indent}try:", *statement, f"{indent}except ImportError:", f"{indent}    raise"]


def _registers(call: ast.expr) -> bool:
    """`AutoX.register(..)`, or the import of one of our modules by its name."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
    if call.func.attr == "register":
        return owner.startswith("Auto")
    return call.func.attr == "import_module" and ast.unparse(call.args[0]).strip("'").startswith("lrnn_lm")


def _with_comments(line: int, lines: list[str]) -> int:
    """The first line of the comments that stand right above a statement."""
    while lines[line - 2].lstrip().startswith("#"):
        line -= 1
    return line


def _namespace(source: str) -> list[str]:
    return [f"from .{_OPERATORS} import NAMESPACE"] if '"lrnn_lm::' in source else []


def _operators() -> str:
    """Torch knows operators by name, for the whole process: each copy of the code needs its own names."""
    return (
        f"# Generated by lrnn-lm {__version__} (Apache-2.0).\n"
        '"""Where this copy of the code keeps its torch operators."""\n\n'
        "import hashlib\n\n"
        'NAMESPACE = "lrnn_" + hashlib.sha256(__name__.encode()).hexdigest()[:12]\n'
    )


def _version_check() -> list[str]:
    wanted = ".".join(map(str, OLDEST_TRANSFORMERS))
    return [
        "import transformers",
        "",
        f'if tuple(map(int, transformers.__version__.split(".")[:2])) < {OLDEST_TRANSFORMERS}:',
        "    raise ImportError(",
        f'        "this model needs transformers {wanted} or newer, not " + transformers.__version__',
        '        + ": run pip install --upgrade transformers"',
        "    )",
        "",
    ]


def _flat(module: Module) -> str:
    return _NAMES.get(module) or "_".join(("lrnn", *module))


def _file(module: Module) -> Path:
    path = _PACKAGE.joinpath(*module)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
