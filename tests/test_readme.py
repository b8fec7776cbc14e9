"""The README's commands, run as they stand, a tiny run in place of the demo's; recipes that pages name."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.pages import keys, tree
from lrnn_lm.cli import main
from lrnn_lm.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = [
    "model.hidden_size=32", "model.num_hidden_layers=1", "model.mixer.num_blocks=8",
    "model.intermediate_size=32", "model.vocab_size=400", "data.source.limit=40", "data.sequence_length=64",
    "train.tokens=2560",
    "train.tokens_per_step=512", "train.micro_batch=8", "eval.tokens=1K", "eval.tasks=[]",
]  # fmt: skip


WITH_COMMANDS = ("docs/**/*.md", "eval/*.md", "recipes/**/*.md", "slurm/*.md", "lrnn_lm/**/*.py")
PAGES = [ROOT / "README.md", *(page for pattern in WITH_COMMANDS for page in ROOT.glob(pattern))]


def named_recipes() -> list[list[str]]:
    """[recipe, override, ..] of each command and call on a page or in a docstring.

    Left out: what a reader has to fill in (`N`, `$SMALL`), and the mixer that docs/extending.md adds.
    """
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"lrnn (?:train|info|prepare|submit) (recipes/[^`#\n]*)", text):
            path, *words = shlex.split(line)
            found.append([path, *(word for word in words if re.match(r"[a-z_.]+=", word))])
        for call in re.findall(r"(?:load_recipe|train)\((\"recipes/[^)]*)\)", text):
            path, *overrides = ast.literal_eval(f"({call},)")  # the overrides are one list, or none
            found.append([path, *(overrides[0] if overrides else [])])
    known = [each for each in found if not re.search(r"\$|=N\b|=ema\b", " ".join(each))]
    return sorted({" ".join(each): each for each in known}.values())


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """The words of every line in a bash block that starts `program`, comments dropped."""
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    return [words for words in lines if words and words[0] == program]


def lrnn(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return done.value.code or 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder to work in, with a finished tiny run where the README expects the demo's."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert lrnn("train", "recipes/demo.yaml", *TINY) == 0
        yield folder


def test_there_is_something_to_test():
    assert len(commands("lrnn")) >= 3
    assert len(commands("make")) == 2


@pytest.mark.parametrize("words", commands("lrnn"), ids=" ".join)
def test_lrnn_command(words, demo, monkeypatch, capsys, request):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if words[1] == "train":
        words = [*words, *TINY]
    if "standard" in words:
        request.getfixturevalue("few_tasks")
    code = lrnn(*words[1:])
    if "standard" in words:  # its tasks come from the hub, which a test must not need
        assert code == 2
        assert "network" in capsys.readouterr().err
    else:
        assert code == 0


@pytest.mark.parametrize("words", commands("accelerate"), ids=" ".join)
def test_accelerate_command(words, demo):
    if words[3] == "lrnn_lm.evaluate":  # in one process here; in two: tests/evaluate/test_two_processes.py
        assert lrnn("eval", *words[4:]) == 0
        return
    assert words[1:3] == ["launch", "--config_file"]
    assert (ROOT / words[3]).is_file()
    assert words[4:6] == ["-m", "lrnn_lm.train"]
    assert load_recipe(words[6], words[7:]).model.parameters


@pytest.mark.parametrize("words", commands("make"), ids=" ".join)
def test_make_command(words):
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_example(code, demo, capsys):
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert ("Return the" if "runs/demo" in code else "torch.Size([2, 16])") in printed


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipe_example(text, tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(text)
    assert load_recipe(path).model.layer_pattern[-1].num_heads == 4


@pytest.mark.parametrize(
    "text", re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL)
)
def test_recipes_of_the_data_page(text, tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(text)
    data = load_recipe(path).data
    paths = {source.path.split("/")[0] for source in data.sources or [data.source]}
    assert paths in ({"notes"}, {"corpus"}, {"web", "code", "books"})


def test_the_tour_lists_every_file():
    page = tree.PAGE.read_text(encoding="utf-8")
    assert tree.filled(page) == page, "run python -m benchmarks.pages.tree --write"
    rows = [row for row in tree.tree().splitlines() if row.startswith("| [")]
    assert not [row for row in rows if row.count("`") % 2 or ".. |" in row], "a sentence is cut short"
    assert page.count("](../lrnn_lm/kernels/reference.py)") == 2


def test_the_page_of_keys_is_that_of_the_schema():
    assert keys.page() == keys.PAGE.read_text(encoding="utf-8"), "run python -m benchmarks.pages.keys --write"


@pytest.mark.parametrize("words", named_recipes(), ids=" ".join)
def test_a_page_s_recipe_loads_as_it_stands(words):
    """With the shipped recipe: a page's own test may have put a smaller one in its place."""
    assert load_recipe(*words[:1], words[1:]).total_steps >= 1


def test_pages_name_recipes():
    assert len(named_recipes()) >= 20
    assert ["recipes/demo.yaml", "name=tiny", "train.tokens=8K", "eval.tasks=[]"] in named_recipes()  # a call
    assert ["recipes/synthetic/s5.yaml", "model.mixer.block_size=5", "optim.lr=5e-4"] in named_recipes()
