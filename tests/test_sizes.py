"""Functions and files can be read at one sitting (docs/design.md, section 8)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lrnn_lm"
FUNCTION, KERNEL, FILE = 60, 120, 400  # lines, docstrings included
FILES = sorted(PACKAGE.rglob("*.py"))


def test_no_file_is_longer():
    sizes = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert not {name: lines for name, lines in sizes.items() if lines > FILE}


@pytest.mark.parametrize(("in_kernels", "most"), [(True, KERNEL), (False, FUNCTION)])
def test_no_function_is_longer(in_kernels, most):
    long = {}
    for path in FILES:
        if (PACKAGE / "kernels" in path.parents) is not in_kernels:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= most:
                long[f"{path.relative_to(PACKAGE)}: {node.name}"] = node.end_lineno - node.lineno + 1
    assert not long
