"""The package as a wheel, outside the clone; what it does without its extras; its version."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forks import LIBRARIES
from test_readme import TINY

import lrnn_lm
from lrnn_lm.cli import main
from lrnn_lm.requirements import UnmetRequirementError

ROOT = Path(__file__).parents[1]
HEAVY = ("datasets", "lm_eval", "matplotlib", "pyarrow", "sentencepiece", "tensorboard")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A function that runs Python code elsewhere, with the wheel installed and the clone out of reach.

    It is built from what the Containerfile copies, so that a container has all of it, too.
    """
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed: pip install 'lrnn-lm[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    copied = re.findall(r"^COPY (.+) (\S+)$", (ROOT / "Containerfile").read_text(), flags=re.MULTILINE)
    for names, target in copied:
        for name in names.split():
            place = folder / "src" / (name if target == "./" else target)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(ROOT / name, place)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, folder / "src"], check=True
    )
    [built] = folder.glob("lrnn_lm-*.whl")
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", built], check=True)
    first = f"""
import sys
assert not [name for name in sys.modules if name.startswith("lrnn_lm")]
sys.path[:] = [{str(folder / "site")!r}, *(path for path in sys.path if path not in ("", {str(ROOT)!r}))]
"""
    return lambda code, *words: LIBRARIES.run(first + code, *words, cwd=folder)


def test_without_the_clone(wheel):
    """Generating takes no extra, shipped recipes are found, the demo trains without [eval] and [serve]."""
    run = wheel(
        """
import json, sys
import torch
import lrnn_lm
from lrnn_lm.cli import main
from lrnn_lm.recipe.load import load_recipe, shipped

assert "site" in lrnn_lm.__file__, lrnn_lm.__file__
heavy, tiny = map(json.loads, sys.argv[1:])
for name in [name for name in sys.modules if name.partition(".")[0] in heavy]:
    del sys.modules[name]  # of the server
config = lrnn_lm.LRNNConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
lrnn_lm.LRNNForCausalLM(config).generate(torch.tensor([[3, 4]]), max_new_tokens=2)
assert callable(lrnn_lm.generate)
loaded = {name.partition(".")[0] for name in sys.modules} & {*heavy}
assert not loaded, loaded
for name in ("lm_eval", "tensorboard", "fastapi", "uvicorn", "openai"):
    sys.modules[name] = None
recipes = [file for file in shipped("recipes").rglob("*.yaml") if "accelerate" not in file.parts]
assert len(recipes) > 20
for file in recipes:
    load_recipe(str(file))
main(["train", "recipes/demo.yaml", *tiny])
""",
        json.dumps(HEAVY),
        json.dumps([*TINY, "train.tokens=1024"]),
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "demo is trained: 2 steps" in run.stdout


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--help"], 0, "Pretrain, score and run"),
        (["--version"], 0, lrnn_lm.__version__),
        (["bench", "kernels"], 2, "run lrnn bench from a clone"),
    ],
)
def test_commands(wheel, words, code, told):
    run = wheel("import sys; from lrnn_lm.cli import main; main(sys.argv[1:])", *words)
    assert (run.returncode, run.stderr.count("Traceback")) == (code, 0)
    assert told in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("words", "absent", "extra"),
    [
        (["prepare", "recipes/demo.yaml", "data.source={type: text, path: .}"], "sentencepiece", "train"),
        (["train", "recipes/demo.yaml"], "matplotlib", "train"),
        (["train", "recipes/demo.yaml", "data.source={type: text, path: .}"], "zstandard", "train"),
        (["train", "recipes/demo.yaml", "data.source={type: hf, path: a/b}"], "datasets", "train"),
        (["train", "recipes/demo.yaml"], "lm_eval", "eval"),
        (["eval", "model", "--recall"], "matplotlib", "eval"),
        (["serve", "model"], "fastapi", "serve"),
        (["serve", "model"], "uvicorn", "serve"),
        (["serve", "model"], "openai", "serve"),
    ],
)
def test_a_missing_extra_is_named(words, absent, extra, monkeypatch, capsys, tmp_path):
    """Before anything is trained."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("a", "Once upon a time."), ("b", "The end.")):
        (tmp_path / f"{name}.txt").write_text(text)
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 2
    told = capsys.readouterr().err.strip()  # after a line of progress
    assert told == f"lrnn: {absent} is not installed: pip install 'lrnn-lm[{extra}]'"


def test_python_names_it_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnmetRequirementError, match=r"pip install 'lrnn-lm\[train\]'"):
        lrnn_lm.train("recipes/demo.yaml")


def test_the_version_is_told_everywhere():
    version = lrnn_lm.__version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
