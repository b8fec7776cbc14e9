"""Modules become flat files that mean the same: names that collide, modules as values, scopes."""

import ast
import sys
import types
from collections import Counter

import pytest

from lrnn_lm.model.export import sources as reading
from lrnn_lm.model.export.bundle import Bundle, render_imports
from lrnn_lm.model.export.remote_code import remote_code

MODULES = {
    "entry.py": '''
"""The entry."""
import math
from . import inner
from .inner.low import SIZE as _SIZE, scale  # a comment
SIZE = 2  # its own
def _help(x, scale=scale):
    """SIZE in a text stays."""
    return scale(x) + SIZE + _SIZE
def area(r):
    inner_size = [SIZE for _ in range(1)]
    return math.pi * r + sum(inner_size) + inner.double(r)
def late(x):
    from .kernel import run
    return run(x)
''',
    "inner/__init__.py": '''
"""Passes on."""
from .low import scale
from .low import SIZE
def double(x):
    return 2 * _help(x)
def _help(size):
    return f"{size}" and size + len("ä") - 1
__all__ = ["SIZE", "scale"]
''',
    "inner/low.py": '''
SIZE = 10
class Scale:
    factor = 3
    def __call__(self, x):
        return x * SIZE * self.factor
scale = Scale()
''',
    "kernel.py": '''
import absent_package
from .inner import low
from .inner.low import SIZE
def run(x, *, size=SIZE):
    return low.scale(x) + size + (absent_package is None)
''',
}  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that writes modules as a package and bundles them into two files."""

    def make(modules):
        for name, text in modules.items():
            file = tmp_path / "package" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.lstrip())
        (tmp_path / "package" / "__init__.py").touch()
        monkeypatch.setattr(reading, "_PACKAGE", tmp_path / "package")
        sources = reading.Sources(("entry",))
        flat = []
        sources.in_order(("entry",), flat)
        rest = [module for module in sources if module not in flat]
        bundle = Bundle(sources, {"flat": flat, "kernels": rest}, lambda node: False)
        files = {}
        for file in ("flat", "kernels"):
            code = "\n\n".join(bundle.text(module) for module in bundle.files[file])
            files[file] = render_imports(*bundle.imports(file), code) + "\n" + code
        return files

    return make


def test_bundled_code_means_the_same(package, monkeypatch):
    files = package(MODULES)
    monkeypatch.setitem(sys.modules, "absent_package", types.ModuleType("absent_package"))
    for name, text in files.items():
        module = types.ModuleType(f"bundled.{name}")
        module.__package__ = "bundled"
        monkeypatch.setitem(sys.modules, f"bundled.{name}", module)
        exec(compile(text, name, "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "bundled", types.ModuleType("bundled"))
    flat, kernels = sys.modules["bundled.flat"], sys.modules["bundled.kernels"]
    assert flat.area(0) == 2 + 0
    assert flat._entry_help(1) == 1 * 10 * 3 + 2 + 10
    assert flat.late(1) == kernels.run(1) == 30 + 10
    assert flat._inner_help(5) == 5
    assert '"""SIZE in a text stays."""' in files["flat"]
    assert "try:\n    import absent_package\nexcept ImportError:\n    raise" in files["kernels"]
    assert "__all__" not in files["flat"]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("from . import kernel\nscan = kernel\n", "'kernel' is a module"),
        ("from . import kernel\nx = kernel.nothing\n", "no 'nothing' in kernel"),
        ("from .kernel import nothing\n", "has no 'nothing'"),
        ("from .nowhere import x\n", "no module nowhere"),
        ("x = 1\ndef f():\n    global x\n    x = 2\n", "`global` cannot be bundled"),
        ("from .kernel import x as y\ndef f(x):\n    return x + y\n", "a local name hides the module's 'x'"),
        (
            "from .kernel import x as y\ndef f(y):\n    return y\nz = y\n",
            "a local name hides the module's 'x'",
        ),
        ("def sum(x):\n    return x\n", r"Python itself: \['sum'\]"),
        ("from math import pi as x\nfrom .kernel import x as y\nz = x + y\n", None),
        ("from time import time\nfrom .kernel import x\nprint(time)\n", "'time' is "),
    ],
)
def test_what_cannot_be_bundled_is_told(package, entry, problem):
    modules = {"entry.py": entry, "kernel.py": "import time\nx = time.time()\n"}
    if problem is None:
        assert "kernel_x" in package(modules)["flat"]
        return
    with pytest.raises(ValueError, match=problem):
        package(modules)


def test_no_name_has_two_meanings():
    """In all files together: a reader may search for a name and find the one thing that it is."""
    counts = Counter()
    for text in remote_code().values():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                counts[node.name] += 1
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                counts.update(
                    {
                        n.id
                        for t in targets
                        for n in ast.walk(t)
                        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
                    }
                )
    assert {name for name, count in counts.items() if count > 1} == {"_", "NAMESPACE"}
