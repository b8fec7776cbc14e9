"""The exported code is the package's own: the same logits and the same text, where the package is not."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from symtable import symtable

import pytest
import torch
from small_models import MIXER_ROWS, RECURRENT, tokens
from transformers import AutoModelForCausalLM

from lrnn_lm import LRNNConfig
from lrnn_lm.mixers import MIXERS
from lrnn_lm.model.export import write_remote_code
from lrnn_lm.model.export.remote_code import AUTO_MAP, remote_code
from lrnn_lm.requirements import TRANSFORMERS_TEXT
from lrnn_lm.runs.export import export

ROOT = Path(__file__).parents[2]
KERNELS = 1e-5  # largest absolute difference between kernels and the scan in plain torch, fp32
PROMPT, NEW, PADDING = 9, 6, 4
# One model with a layer of every recurrent mixer, which decodes by steps of its own; hybrids hold attention.
ALL = {"layer_pattern": [MIXER_ROWS[name] for name in RECURRENT], "num_hidden_layers": len(RECURRENT)}
MODELS = {"bd_lru": {}, "all": ALL, "attention-qk-norm": {}, "hybrid": {}, "hybrid-attention-first": {}}

# What a reader asks of a model, as text: it runs here on the package's models, elsewhere on exported ones.
ASK = """
def ask(model, rows):
    import torch
    ids = torch.tensor(rows)
    with torch.no_grad():
        plain = model(ids).logits
        start, cache = model(ids[:, :5], use_cache=True), None
        steps, cache = [start.logits], start.past_key_values
        for t in range(5, ids.shape[1], 2):
            out = model(ids[:, t : t + 2], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
            cache = out.past_key_values
        padded = torch.nn.functional.pad(ids, (PADDING, 0))
        mask = torch.ones_like(padded)
        mask[:, :PADDING] = 0
        left = model(padded, attention_mask=mask).logits[:, PADDING:]
        text = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        beams = model.generate(ids, max_new_tokens=NEW, do_sample=False, num_beams=2)
    logits = [plain, torch.cat(steps, dim=1), left]
    return {"logits": [x.tolist() for x in logits], "text": [text.tolist(), beams.tolist()]}
""".replace("PADDING", str(PADDING)).replace("NEW", str(NEW))

READ_ALL = (
    ASK
    + """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
import os, torch
folders = arguments["folders"]
folder = next(iter(folders.values()))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
result["config"] = type(model.config) is type(config)
result["base"] = type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__
for kind in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
    classifier = kind.from_pretrained(folder, num_labels=3, trust_remote_code=True)
    classifier.save_pretrained(arguments["classifier"])
    classifier = kind.from_pretrained(arguments["classifier"], trust_remote_code=True)
    scores = classifier(torch.tensor(arguments["rows"][:1])).logits
    result.setdefault("scores", []).append([type(classifier).__name__, list(scores.shape)])
for name, each in folders.items():  # by its own code, which has its own mixers only
    result[name] = ask(AutoModelForCausalLM.from_pretrained(each, trust_remote_code=True), arguments["rows"])
fed, embedding = [], torch.nn.functional.embedding
torch.nn.functional.embedding = lambda ids, *args: fed.append(ids.numel()) or embedding(ids, *args)
keeping = type(model).from_pretrained(folder, prefix_cache_bytes=2**20)
for _ in range(2):
    keeping.generate(torch.tensor(arguments["rows"][:1]), max_new_tokens=1)
    result.setdefault("fed", []).append(sum(fed))
batch = model.generate_batch([row[:n] for row in arguments["rows"] for n in (3, 9)], max_new_tokens=3)
result["batch"] = [out.generated_tokens for out in batch.values()]
result["tokens"] = AutoTokenizer.from_pretrained(folder)("w5 w7").input_ids
for mixer in ({"type": "h_lru", "order": 2}, {"type": "slice"}, {"type": "bd_gru", "num_blocks": 2}):
    try:
        type(config)(mixer=mixer)
    except ValueError as error:
        result.setdefault("others", []).append(str(error))
os.remove(arguments["incomplete"] + "/configuration_lrnn.py")
try:
    AutoModelForCausalLM.from_pretrained(arguments["incomplete"], trust_remote_code=True)
except OSError as error:
    result["incomplete"] = str(error)
result["ours"] = [name for name in sys.modules if name.split(".")[0] in ("lrnn_lm", "triton")]
"""
)


def ask(model, rows):
    scope = {}
    exec(ASK, scope)
    return scope["ask"](model, rows)


@pytest.fixture(scope="module")
def exported(make_checkpoint, tmp_path_factory):
    """Models that hold every mixer, exported: folders by name."""
    place = tmp_path_factory.mktemp("exported")
    made = {
        name: make_checkpoint("bd_lru" if changes else name, **changes) for name, changes in MODELS.items()
    }
    return {name: export(checkpoint, place / name) for name, checkpoint in made.items()}


@pytest.fixture(scope="module")
def elsewhere(exported, read_elsewhere, tmp_path_factory):
    """What readers without the package got of every model, and of one without its configuration's code."""
    folders = {name: str(folder) for name, folder in exported.items()}
    incomplete = shutil.copytree(exported["bd_lru"], tmp_path_factory.mktemp("incomplete") / "model")
    given = {"folders": folders, "rows": tokens(2, PROMPT).tolist(), "incomplete": str(incomplete)}
    given["classifier"] = str(tmp_path_factory.mktemp("classifier"))
    return read_elsewhere(READ_ALL, given)


@pytest.mark.parametrize("name", MODELS)
def test_reads_the_same_without_the_package(name, exported, elsewhere):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported[name])  # no remote code is needed here
    assert type(model).__module__ == "lrnn_lm.model.modeling"
    here, there = ask(model, tokens(2, PROMPT).tolist()), elsewhere[name]
    assert here["logits"] == there["logits"]  # bit for bit
    assert here["text"] == there["text"]


def test_what_is_saved_without_the_code_names_no_code(exported, tmp_path):
    """As of an export that was trained further with this package: its files are not there."""
    AutoModelForCausalLM.from_pretrained(exported["bd_lru"]).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    config = LRNNConfig(auto_map={"AutoModel": "somebody/small--modeling_lrnn.LRNNModel"})  # on the hub
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == config.auto_map


def test_what_is_saved_where_it_came_from_names_its_code(exported, tmp_path):
    folder = shutil.copytree(exported["bd_lru"], tmp_path / "export")
    before = json.loads((folder / "config.json").read_text())["auto_map"]
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == before


def test_a_missing_code_file_is_named_by_the_loader(elsewhere):
    assert "configuration_lrnn.py" in elsewhere["incomplete"]


def test_another_mixer_than_the_code_has_is_told_so(elsewhere):
    assert len(elsewhere["others"]) == 3
    for message in elsewhere["others"]:
        assert message.startswith("unknown mixer type")
        assert message.endswith("for others, pip install lrnn-lm)")


def test_a_reader_reads_a_text_once(elsewhere):
    assert elsewhere["fed"] == [PROMPT, PROMPT + 1]


def test_a_reader_decodes_requests_together(exported, elsewhere):
    from transformers import AutoModelForCausalLM

    model, rows = AutoModelForCausalLM.from_pretrained(exported["bd_lru"]), tokens(2, PROMPT)
    prompts = [row[None, :n] for row in rows for n in (3, 9)]
    texts = [model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :] for ids in prompts]
    assert elsewhere["batch"] == [text.tolist() for text in texts]


def test_reader_needs_neither_package_nor_triton(elsewhere, tokenizer):
    assert elsewhere["ours"] == []
    assert elsewhere["config"]
    assert elsewhere["base"] == "LRNNModel"
    names = ["LRNNForSequenceClassification", "LRNNForTokenClassification"]
    assert elsewhere["scores"] == [[names[0], [1, 3]], [names[1], [1, PROMPT, 3]]]
    assert elsewhere["tokens"] == tokenizer("w5 w7").input_ids


BOTH = (
    ASK
    + """
from transformers import AutoConfig, AutoModelForCausalLM
first, second = arguments["folders"]
def read(folder, remote):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote)
    result.setdefault("modules", []).append(type(model).__module__.split(".")[0])
    return model
models = [read(first, True), read(second, True)]
import lrnn_lm
models += [read(first, False), read(first, True)]
result["answers"] = [ask(model, arguments["rows"]) for model in models]
import torch
for model in models:  # each with its own operators, forward and backward
    model.train()
    model(torch.tensor(arguments["rows"]), labels=torch.tensor(arguments["rows"])).loss.backward()
result["gradients"] = [model.lm_head.weight.grad.norm().item() for model in models]
models[0].save_pretrained(arguments["again"])
"""
)


def test_package_and_two_copies_in_one_process(exported, make_checkpoint, read_elsewhere, tmp_path):
    """Copies of the code from two folders, then the package: the same numbers; a copy saves its code too."""
    second = export(make_checkpoint("bd_lru"), tmp_path / "other")
    again = tmp_path / "again"
    arguments = {
        "folders": [str(exported["bd_lru"]), str(second)],
        "rows": tokens(2, PROMPT).tolist(),
        "again": str(again),
    }
    got = read_elsewhere(BOTH, arguments, absent=("triton",))
    assert got["modules"] == ["transformers_modules", "transformers_modules", "lrnn_lm", "lrnn_lm"]
    for answer in got["answers"][1:]:
        assert answer == got["answers"][0]
    assert got["gradients"] == pytest.approx([got["gradients"][0]] * 4, rel=1e-5)
    assert {file.name for file in again.glob("*.py")} == set(remote_code())


TRITON = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(arguments, trust_remote_code=True)
loaded = lambda: any(name.endswith(".kernels_lrnn") for name in sys.modules)
result["before"] = loaded()
kernels = sys.modules[type(model).__module__]
for name, gates, values in (
    ("block_diagonal", torch.randn(2, 7, 3, 2, 3), torch.randn(2, 7, 3, 2)),
    ("higher_order", torch.randn(2, 7, 3, 3), torch.randn(2, 7, 3)),
):
    scan = getattr(kernels, name + "_scan")
    one, other = (scan(gates, values, backend=backend)[0] for backend in ("triton", "torch"))
    result[name] = (one - other).abs().max().item()
result["after"] = loaded()
"""


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is chosen for machines without a GPU"
)
def test_triton_kernels_travel(exported, read_elsewhere):
    """They are imported where they run, not before; here in Triton's interpreter."""
    pytest.importorskip("triton")
    got = read_elsewhere(TRITON, str(exported["bd_lru"]), absent=("lrnn_lm",))
    assert not got["before"]
    assert got["after"]
    assert max(got["block_diagonal"], got["higher_order"]) <= KERNELS


def test_code_is_generated_alike(exported, make_checkpoint):
    for name, mixers in [("bd_lru", {"bd_lru"}), ("hybrid", {"bd_lru", "attention", "h_lru"})]:
        files = remote_code.__wrapped__(frozenset(mixers))  # not what is cached
        assert {file.name: file.read_text() for file in exported[name].glob("*.py")} == files
    checkpoint = make_checkpoint("bd_lru")
    write_remote_code(checkpoint)
    once = {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.is_file()}
    write_remote_code(checkpoint)
    assert once == {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.is_file()}
    assert json.loads(once["config.json"])["auto_map"] == AUTO_MAP


def test_code_imports_only_what_lies_beside_it():
    """No lrnn_lm, also not by name, and every file is seen by the loader."""
    files = remote_code()
    for name, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, name
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert {f"{module}.py" for module in names} <= set(files), name
            elif isinstance(node, ast.ImportFrom):
                assert not node.module.startswith("lrnn"), name
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("lrnn") for alias in node.names), name
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                assert not ast.unparse(node.args[0]).strip("'").startswith(("lrnn", ".")), name
        assert '"lrnn_lm::' not in source, name
    assert set(files) == {"configuration_lrnn.py", "modeling_lrnn.py", "kernels_lrnn.py"}
    seen = {"modeling_lrnn.py"}
    for source in files.values():
        seen |= {f"{match}.py" for match in re.findall(r"^\s*from\s+\.(\S+)\s+import", source, re.MULTILINE)}
    assert seen == set(files)


def test_code_has_the_mixers_of_its_checkpoint(exported):
    """And no other's, nor their kernels."""
    code = {file.stem: file.read_text() for file in exported["hybrid"].glob("*.py")}
    parts = set(re.findall(r"^# --- from lrnn_lm/(\S+) ---$", "".join(code.values()), re.MULTILINE))
    mixers = {part.removeprefix("mixers/") for part in parts if part.startswith("mixers/")}
    helpers = {"__init__.py", "base.py", "spans.py", "initial_gates.py", "short_conv.py"}
    assert mixers - helpers == {"bd_lru.py", "attention.py", "h_lru.py"}
    assert not {part for part in parts if re.search("gru|slstm|m2rnn|matrix", part)}
    table = code["modeling_lrnn"].partition("MIXERS: dict")[2].partition("}")[0]
    assert re.findall(r'"(\w+)": ', table) == ["bd_lru", "h_lru", "attention"]
    lines = {name: text.count("\n") for name, text in remote_code().items()}
    for name in ("modeling_lrnn", "kernels_lrnn"):
        assert code[name].count("\n") < 0.75 * lines[f"{name}.py"]


@pytest.mark.parametrize(
    "mixers", [tuple(MIXERS), *(pytest.param((name,), marks=pytest.mark.slow, id=name) for name in MIXERS)]
)
def test_every_name_is_defined(mixers, tmp_path):
    """Here or in the file that it is imported from, in annotations too, whatever mixers stay at home."""
    files = remote_code(frozenset(mixers))
    for name, source in files.items():
        (tmp_path / name).write_text(source)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select=F8", "--quiet"]
    found = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    defined = {
        name.removesuffix(".py"): {
            symbol.get_name() for symbol in symtable(source, name, "exec").get_symbols()
        }
        for name, source in files.items()
    }
    for source in files.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert {alias.name for alias in node.names} <= defined[node.module]


def test_loader_demands_torch_and_transformers_alone(exported):
    from transformers.dynamic_module_utils import get_imports

    wanted = {name for file in exported["bd_lru"].glob("*.py") for name in get_imports(file)}
    assert wanted - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_the_transformers_are_those_that_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"transformers{TRANSFORMERS_TEXT}" in project["dependencies"]


@pytest.mark.parametrize("version", ["5.16.2", "5.25.0"])
def test_other_transformers_are_told_so(version):
    source = remote_code()["modeling_lrnn.py"]
    check = source[source.index("if not (5") : source.index("import ctypes")]

    class Old:
        __version__ = version

    with pytest.raises(
        ImportError, match=rf"needs transformers >=5\.17,<5\.25, not {version}: run pip install"
    ):
        exec(check, {"transformers": Old})
