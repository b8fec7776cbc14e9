"""Sweeps: which runs they make, how those are called, and what is wrong with a file that is none."""

from pathlib import Path

import pytest

from lrnn_lm.launch.sweep import base_name, read_sweep
from lrnn_lm.recipe import Recipe, RecipeError


def sweep(folder: Path, text: str, *overrides: str) -> list[Recipe]:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return read_sweep(Path("sweep.yaml"), Path("base.yaml"), list(overrides))


def test_a_grid_is_every_combination(folder):
    runs = sweep(folder, "optim.lr: [6e-3, 0.001]\nmodel.mixer.gate: [softmax, tanh]\n", "seed=3")
    assert [(run.optim.lr, run.model.mixer.gate, run.seed) for run in runs] == [
        (0.006, "softmax", 3), (0.006, "tanh", 3), (0.001, "softmax", 3), (0.001, "tanh", 3),
    ]  # fmt: skip
    assert runs[1].name == "base-lr_0.006-gate_tanh"


def test_listed_runs(folder):
    runs = sweep(
        folder, "- {name: wide, model.hidden_size: 64}\n- {optim.lr: 1e-3, seed: 1}\n- {}\n", "name=x"
    )
    assert [run.name for run in runs] == ["wide", "x-lr_0.001-seed_1", "x"]
    assert runs[0].model.hidden_size == 64


def test_the_recipe_alone_need_not_be_valid(folder):
    """A sweep may give what it lacks, or change what does not go together."""
    runs = sweep(folder, "model.mixer.block_size: [3, 4]\ntrain.tokens: [4M]\n", "train.tokens=1")
    assert [run.name for run in runs] == [f"base-block_size_{size}-tokens_4M" for size in (3, 4)]
    assert base_name(folder / "sweep.yaml", Path("base.yaml"), ["train.tokens=1"]) == "base"


def test_names_tell_keys_and_values_apart(folder):
    runs = sweep(
        folder, "data.source.type: [text]\nmodel.mixer.type: [bd_lru, h_lru]\ndata.source.path: [a/b.txt]\n"
    )
    assert runs[1].name == "base-source.type_text-mixer.type_h-lru-path_a-b.txt"
    runs = sweep(
        folder,
        "optim.grad_clip: [null, 1.0]\ntrain.compile: [true]\nmodel.layer_pattern: [[bd_lru, attention]]\n",
    )
    assert runs[0].name == "base-grad_clip_null-compile_true-layer_pattern_bd-lru-attention"
    assert runs[0].model.layer_pattern[1].type == "attention"
    assert runs[0].optim.grad_clip is None


MISTAKES = [
    ("optim.lrr: [1]", "sweep.yaml, run 1: base.yaml: optim.lrr: unknown key; did you mean 'lr'?"),
    ("optim.lr: [1e-3, 0.001]", "two runs have the name base-lr_0.001"),
    ("data.source.path: [a/b, a-b]\ndata.source.type: [text]", "two runs have the name"),
    ("- {name: a}\n- {name: a, seed: 2}", "two runs have the name a"),
    ("- {name: a/b}", "sweep.yaml, run 1: base.yaml: name: takes letters a to z, digits"),
    ("optim.lr: 1e-3", "optim.lr takes a list of values, as in [1, 2], not '1e-3'"),
    ("optim.lr: []", "takes a list of values"),
    ("name: [a, b]", "name themselves"),
    ("launch.nodes: [1, 2]", "launch.nodes is one for the whole array"),
    ("optim.lr: [fast]", "sweep.yaml, run 1: base.yaml: optim.lr: input should be a valid number"),
    ("[1, 2]", "not '1'"),
    ("[]", "not none"),
    ("null: [1]", "null: unknown key"),
    ("just words", "a sweep maps keys to lists of values, or lists runs"),
    ("1: [2]", "sweep.yaml, run 1: base.yaml: 1: unknown key"),
    ("a: [", "sweep.yaml: not valid YAML"),
    ("", "sweep.yaml: is empty"),
    ("\n".join(f"k{i}: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" for i in range(9)), "more than 10,000 combinations"),
    (f"data.cache_dir: [{'x' * 60}]", "data.cache_dir makes too long a name"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_mistakes(folder, text, words):
    with pytest.raises(RecipeError) as raised:
        sweep(folder, text)
    assert words in str(raised.value)
    assert str(raised.value).startswith("sweep.yaml")
    assert len(str(raised.value)) < 250


def test_no_such_sweep(folder):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: no such sweep file"):
        read_sweep(Path("nowhere.yaml"), Path("base.yaml"), [])
