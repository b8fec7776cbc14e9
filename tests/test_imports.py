"""Who may import whom; what `import lrnn_lm` costs; and registration whichever library is imported first."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lrnn_lm"
ARROWS = {  # a package may import those on its right, and itself
    "recipe": set(),
    "runs": {"model", "recipe"},
    "data": set(),
    "kernels": set(),
    "mixers": {"kernels"},
    "model": {"mixers", "kernels"},
    "train": {"data", "model", "recipe", "runs"},
    "evaluate": {"model", "data", "recipe", "runs"},
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


def python(code: str) -> str:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_lrnn_lm_is_light():
    heavy = ("torch", "transformers", "triton", "pydantic")
    assert python(f"import lrnn_lm, sys; print([m for m in {heavy} if m in sys.modules])") == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoModelForCausalLM; import lrnn_lm",
        "import lrnn_lm; from transformers import LlamaForCausalLM, AutoModelForCausalLM",
        "import lrnn_lm.model.layers; from transformers import AutoModelForCausalLM",
    ],
)
def test_registered_in_any_order(imports):
    code = (
        f"{imports}; from transformers import AutoConfig; config = AutoConfig.for_model('lrnn', "
        "vocab_size=11, hidden_size=16, num_hidden_layers=1, intermediate_size=8); "
        "print(type(config).__name__, type(AutoModelForCausalLM.from_config(config)).__name__)"
    )
    assert python(code) == "LRNNConfig LRNNForCausalLM"
