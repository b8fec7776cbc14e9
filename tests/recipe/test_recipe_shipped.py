"""Every recipe that the project ships builds on `meta`, with the parameter count written in it."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from lrnn_lm.mixers import mixer_class
from lrnn_lm.mixers.fla_layer import FlaMixer
from lrnn_lm.model import accounting
from lrnn_lm.model.accounting import account, check_parameters
from lrnn_lm.recipe import load_recipe, shipped
from lrnn_lm.train import info as info_module
from lrnn_lm.train.build import model_config
from lrnn_lm.train.info import print_info, vocabulary

RECIPES = sorted(
    path
    for path in shipped("recipes").rglob("*.yaml")
    if path.parent.name != "accelerate" and path.name != "base.yaml"
)
PAPER = sorted(path for path in RECIPES if path.parent.name == "paper")
ids = [str(path.relative_to(shipped("recipes"))) for path in RECIPES]


@pytest.fixture(autouse=True)
def built_once(monkeypatch):
    """A model is built once for all that is counted on it."""
    build, built = accounting.meta_model, {}

    def once(config):
        key = config.to_json_string()
        if key not in built:
            built[key] = build(config)
        return built[key]

    for module in (accounting, info_module):
        monkeypatch.setattr(module, "meta_model", once)


def config_of(path: Path):
    recipe = load_recipe(path)
    return recipe, model_config(recipe, vocabulary(recipe))


def info(*arguments) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_info(*arguments, console=console)
    return console.file.getvalue()


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_builds_with_its_parameter_count(path):
    recipe, config = config_of(path)
    if issubclass(mixer_class(config.mixer["type"]), FlaMixer):
        pytest.importorskip("fla.layers", reason="flash-linear-attention is not installed")
    model = accounting.meta_model(config)
    check_parameters(config, recipe.model.parameters)
    assert sum(p.numel() for p in model.parameters()) == account(config, 16).total_parameters
    short = ["data.sequence_length=256"] if config.mixer["type"] == "lstm" else []  # it walks through the row
    assert "steps" in info(str(path), short)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_paper_settings(path):
    recipe, config = config_of(path)
    assert recipe.model.parameters is not None
    assert recipe.total_steps == 18_850
    assert recipe.total_steps * recipe.train.tokens_per_step == recipe.train.tokens
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (50_280, 768, 12)
    assert recipe.optim.warmup.steps(recipe.total_steps, recipe.train.tokens_per_step) == 1885
    line = next(x for x in (path.parent / "README.md").read_text().splitlines() if f"`{path.name}`" in x)
    assert f"{recipe.model.parameters:,}" in line
    mixer = config.mixer
    assert all(f"{k} {mixer[k]}" in line for k in re.findall(r"(\w+) \d", line.split("|")[2])), line


def test_wrong_count_is_told_by_info():
    with pytest.raises(ValueError, match=r"211,875,360.*model.parameters=null"):
        info("recipes/paper/bd-lru-m4.yaml", ["model.parameters=5"])
    assert "total" in info(
        "recipes/paper/bd-lru-m4.yaml", ["model.parameters=null", "model.num_hidden_layers=2"]
    )


def test_info_leaves_out_what_is_not_there():
    recurrent, attention = info("recipes/paper/bd-lru-m4.yaml"), info("recipes/paper/transformer.yaml")
    assert "attention" not in recurrent
    assert "keys and values" not in recurrent
    assert "scan" not in attention
    assert "a token" in attention.split("keys and values")[1]
    assert "sequential" in info("recipes/paper/lstm.yaml", ["data.sequence_length=256"])


def test_info_of_a_checkpoint(tmp_path):
    _, config = config_of(shipped("recipes/demo.yaml"))
    config.save_pretrained(tmp_path)
    assert f"{account(config, 256).total_parameters:,}" in info(str(tmp_path))
    with pytest.raises(ValueError, match="belong to a recipe"):
        info(str(tmp_path), ["seed=1"])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        info(str(tmp_path))


def test_unknown_vocabulary_and_unknown_target(tmp_path):
    with pytest.raises(ValueError, match=r"model\.vocab_size"):
        info("recipes/demo.yaml", ["data.tokenizer=gpt2"])
    with pytest.raises(ValueError, match=r"config\.json"):
        info(str(tmp_path))
    with pytest.raises(ValueError, match="no such recipe"):
        info("recipes/nothing.yaml")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("[bd_lru, {type: attention, window: 1024}]", "the same beyond its windows"),
        ("[bd_lru, {type: attention, window: 1024}, attention]", "4,096 bytes more a token"),
        ("[bd_lru, attention]", "6,144 bytes more a token"),
    ],
)
def test_what_a_token_adds_to_the_cache(pattern, words):
    """Nothing in the layers whose window is full."""
    sizes = ["model.num_hidden_layers=6", "model.hidden_size=512", "model.parameters=null"]
    assert words in info("recipes/small.yaml", [f"model.layer_pattern={pattern}", *sizes])
