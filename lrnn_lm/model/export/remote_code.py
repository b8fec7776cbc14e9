"""The model as files that travel with a checkpoint: what `trust_remote_code=True` loads without this package.

Three files, bundled from the package's own modules (`bundle.py`):

- configuration_lrnn.py: LRNNConfig;
- modeling_lrnn.py: all that is imported with the model: plain-torch scans, its mixers, the model itself;
- kernels_lrnn.py: what functions import where it runs, the Triton kernels.

Mixers that the checkpoint does not have stay at home, with their kernels.

transformers copies only those files beside the entry file that it finds in lines `from .name import ..`. It
requires every package that is imported outside a `try`, so Triton is imported inside one. Operators have a
namespace of their own, so that two copies of the code can run in one process. Nothing registers with the Auto
classes, as `auto_map` in config.json does that.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path

from ...mixers import MIXERS
from ...requirements import TRANSFORMERS, TRANSFORMERS_TEXT
from ...version import __version__
from ..config import LRNNConfig
from .bundle import Bundle, apply, edit, line_edit, render_imports
from .sources import Module, Source, Sources, path_of

CONFIGURATION, MODELING, KERNELS = "configuration_lrnn", "modeling_lrnn", "kernels_lrnn"
# Both classes through one file: transformers loads each file named here as a module of its own.
AUTO_MAP = {
    "AutoConfig": f"{MODELING}.LRNNConfig",
    "AutoModel": f"{MODELING}.LRNNModel",
    "AutoModelForCausalLM": f"{MODELING}.LRNNForCausalLM",
    "AutoModelForSequenceClassification": f"{MODELING}.LRNNForSequenceClassification",
    "AutoModelForTokenClassification": f"{MODELING}.LRNNForTokenClassification",
}

_OPENS = {
    CONFIGURATION: "The configuration of a linear recurrent network language model.",
    MODELING: "The model: scans in plain torch, sequence mixers, and their Hugging Face classes.",
    KERNELS: "The Triton kernels: scans, steps of decoding, cross-entropy. Imported where they run only.",
}

_NAMESPACE = """
# Torch knows operators by name, for the whole process: each copy of this file keeps its own.
NAMESPACE = "lrnn_" + hashlib.sha256(__name__.encode()).hexdigest()[:12]
"""
_OTHERS = " (a checkpoint's code holds its own mixers; for others, pip install lrnn-lm)"
_PACKAGE = Path(__file__).parents[2]
_REGISTRY: Module = ("mixers",)


@cache
def remote_code(mixers: frozenset[str] = frozenset(MIXERS)) -> dict[str, str]:
    """File names and their contents, for models of these types of mixers."""
    # `LRNNConfig()`, which transformers makes to compare with, has BD-LRU.
    sources = Sources(("model", "classification"), {_REGISTRY: _rows(mixers | {"bd_lru"})})
    done: list[Module] = []
    files: dict[str, list[Module]] = {}
    for file, roots in (
        (CONFIGURATION, [("model", "config")]),
        (MODELING, [("model", "classification")]),
        (KERNELS, sorted(sources)),
    ):
        before = len(done)
        for root in roots:
            sources.in_order(root, done)
        files[file] = done[before:]
    bundle = Bundle(sources, files, _registers)
    return {f"{file}.py": _write(bundle, file) for file in files}


def write_remote_code(folder: str | Path) -> None:
    """Let a folder that `save_pretrained` wrote load with `trust_remote_code=True` where this package is not.

    Writes the generated files and names them in config.json (`auto_map`); safe to repeat.
    """
    folder = Path(folder)
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"auto_map": AUTO_MAP}
    model = LRNNConfig.from_pretrained(folder)
    specs = [model.mixer, *(model.layer_pattern or ())]
    for name, text in remote_code(frozenset(spec["type"] for spec in specs)).items():
        (folder / name).write_text(text, encoding="utf-8")
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rows(kept: frozenset[str]) -> str:
    """The registry of mixers with these rows only, and without the imports of the others."""
    source = Source(_REGISTRY)
    table = next(
        node.value
        for node in source.tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MIXERS"
    )
    rows = {key.value: value.id for key, value in zip(table.keys, table.values, strict=True)}
    gone = {name for key, name in rows.items() if key not in kept}
    lines = "".join(f'    "{key}": {name},\n' for key, name in rows.items() if name not in gone)
    edits = [edit(table, "{\n" + lines + "}")]
    for node in source.top:
        names = {alias.name for alias in node.names}
        if names <= gone:
            edits.append(line_edit(node, source.text))
        elif names & gone:
            edits.append(edit(node, f"from .{node.module} import {', '.join(sorted(names - gone))}"))
    return apply(source.text, edits).replace('OTHERS = ""', f"OTHERS = {_OTHERS!r}", 1)


def _write(bundle: Bundle, file: str) -> str:
    external, flat = bundle.imports(file)
    texts = {module: text for module in bundle.files[file] if (text := bundle.text(module))}
    code = "".join(
        f"\n\n# --- from {'/'.join(path_of(module).relative_to(_PACKAGE.parent).parts)} ---\n\n{text}\n"
        for module, text in texts.items()
    )
    code, operators = re.subn(r'f?"lrnn_lm::', 'f"{NAMESPACE}::', code)
    if operators:
        code = _NAMESPACE + code
        external = [*external, *ast.parse("import hashlib").body]
    header = (
        f"# Generated by lrnn-lm {__version__} (Apache-2.0) from the modules below: change them there.\n"
        f'"""{_OPENS[file]}"""\n\n'
    )
    parts = [_version_check()] if file == MODELING else []
    parts.append(render_imports(external, flat, code))
    return header + "\n".join(parts) + code


def _registers(node: ast.stmt) -> bool:
    """Whether a statement is `AutoX.register(..)` or imports one of our modules by name; neither travels."""
    call = node.value if isinstance(node, ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
    if call.func.attr == "register":
        return owner.startswith("Auto")
    return call.func.attr == "import_module" and ast.unparse(call.args[0]).strip("'").startswith("lrnn_lm")


def _version_check() -> str:
    first, before = TRANSFORMERS
    return (
        "import transformers\n\n"
        f'if not {first} <= tuple(map(int, transformers.__version__.split(".")[:2])) < {before}:\n'
        "    raise ImportError(\n"
        f'        "this model needs transformers {TRANSFORMERS_TEXT}, not " + transformers.__version__\n'
        f"        + \": run pip install 'transformers{TRANSFORMERS_TEXT}'\"\n"
        "    )\n"
    )
