"""Who may import whom; what `import lrnn_lm` costs; and registration whichever library is imported first."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from forks import LIBRARIES
from tiny_run import environment

PACKAGE = Path(__file__).parents[1] / "lrnn_lm"
ARROWS = {  # a package may import those on its right, and itself
    "recipe": set(),
    "runs": {"model", "recipe"},
    "data": set(),
    "kernels": set(),
    "mixers": {"kernels"},
    "model": {"mixers", "kernels"},
    "train": {"data", "model", "recipe", "runs"},
    "evaluate": {"model", "data", "recipe", "runs", "kernels"},
    "launch": {"recipe", "runs"},
}


def imported_parts(path: Path) -> set[str]:
    """The parts of lrnn_lm that a file imports, at its top or inside its functions."""
    here = ["lrnn_lm", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            names = [".".join([*base, *([node.module] if node.module else []), a.name]) for a in node.names]
        else:
            continue
        found |= {parts[1] for name in names if (parts := name.split("."))[0] == "lrnn_lm" and len(parts) > 1}
    return found


@pytest.mark.parametrize("part", ARROWS)
def test_arrows(part):
    for path in (PACKAGE / part).rglob("*.py"):
        if path.name == "__main__.py":  # a door to the command line
            continue
        wrong = imported_parts(path) & (ARROWS.keys() | {"cli"}) - ARROWS[part] - {part}
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_every_part_has_its_arrows():
    parts = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert parts <= set(ARROWS)


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere in it, also for type checking."""
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            named = {f"{base}.{alias.name}" for alias in node.names}
            found |= (named & modules) | (set() if named <= modules else {base})
    return found & modules - {name}


def test_no_circle(capsys):
    """Not even one that only functions close when they run, or type checkers."""
    files = {
        ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): p
        for p in PACKAGE.rglob("*.py")
        if p.name != "__main__.py"
    }
    graph = {name: imported_modules(path, set(files)) for name, path in files.items()}
    order = list(TopologicalSorter(graph).static_order())  # CycleError names a circle
    with capsys.disabled():
        print(f"\n{len(order)} modules, {sum(map(len, graph.values()))} imports among them, no circle")
    assert order.index("lrnn_lm.kernels.reference") < order.index("lrnn_lm.train.loop")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_lrnn_lm_is_light():
    heavy = ("torch", "transformers", "triton", "pydantic")
    assert python(f"import lrnn_lm, sys; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_the_server_has_imported_no_more_than_it_says():
    """Else tests of what is absent there would show nothing."""
    code = "import sys; print([n for n in sys.modules if n.partition('.')[0] in ('lrnn_lm', 'triton')])"
    assert LIBRARIES.run(code).stdout == "[]\n"


@pytest.mark.parametrize(
    "imports",
    [
        "import lrnn_lm",  # after transformers
        *(
            pytest.param(first, marks=pytest.mark.slow)
            for first in (
                "import lrnn_lm; from transformers import LlamaForCausalLM, AutoModelForCausalLM",
                "import lrnn_lm.model.layers; from transformers import AutoModelForCausalLM",
            )
        ),
    ],
)
def test_registered_in_any_order(imports):
    code = (
        f"{imports}; from transformers import AutoConfig, AutoModelForCausalLM; "
        "config = AutoConfig.for_model('lrnn', vocab_size=11, hidden_size=16, num_hidden_layers=1, "
        "intermediate_size=8); "
        "print(type(config).__name__, type(AutoModelForCausalLM.from_config(config)).__name__)"
    )
    said = LIBRARIES.run(code).stdout if imports == "import lrnn_lm" else python(code)
    assert said.strip() == "LRNNConfig LRNNForCausalLM"


def test_modules_that_moved_are_found_under_their_old_names():
    from lrnn_lm.model import decode

    assert decode.__name__ == "lrnn_lm.model.decoding.decode"
    assert callable(decode.decode_step)
