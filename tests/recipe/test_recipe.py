"""Recipes: reading, extending, overriding, writing back, and errors that a person can act on."""

import json

import pytest
import yaml

from lrnn_lm.recipe import RecipeError, dump_recipe, load_recipe, recipe_from_dict

BASE = {"data": {"sequence_length": 256}, "train": {"tokens": "2M", "tokens_per_step": 4096}}


def recipe(**sections):
    return recipe_from_dict({"name": "test", **BASE, **sections})


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def test_extends_and_overrides(tmp_path):
    write(tmp_path, "base.yaml", "model: {hidden_size: 64, mixer: {type: bd_lru, block_size: 2}}\nseed: 3\n")
    write(tmp_path, "middle.yaml", "extends: base.yaml\nmodel: {mixer: {block_size: 8}}\n")
    top = write(tmp_path, "top-one.yaml", "extends: middle.yaml\nmodel: {num_hidden_layers: 2}\n")
    got = load_recipe(top, ["model.mixer.gate=tanh", "train.tokens=20M", "optim.lr=1e-3", "eval.tasks=[]"])
    assert (got.name, got.seed) == ("top-one", 3)
    assert (got.model.hidden_size, got.model.num_hidden_layers) == (64, 2)
    assert (got.model.mixer.block_size, got.model.mixer.gate) == (8, "tanh")
    assert (got.train.tokens, got.optim.lr, got.eval.tasks) == (20_000_000, 1e-3, [])
    linked = tmp_path / "elsewhere" / "link.yaml"
    linked.parent.mkdir()
    linked.symlink_to(top)
    assert load_recipe(linked).model == load_recipe(top).model


@pytest.mark.parametrize("key", ["path: corpus/*.txt", "split: test", "text_field: body", "name: small"])
@pytest.mark.parametrize("kind", ["python-docs", "text"])
def test_a_key_that_the_source_would_ignore_is_refused(tmp_path, key, kind):
    """Else a run would be trained on other text than its recipe names."""
    name = key.partition(":")[0]
    source = f"type: {kind}" + (", path: x" if kind == "text" and name != "path" else "")
    path = write(tmp_path, "r.yaml", f"data: {{source: {{{source}, {key}}}}}\n")
    if kind == "text" and name == "path":
        assert load_recipe(path).data.source.path == "corpus/*.txt"
        return
    with pytest.raises(
        RecipeError, match=rf"data\.source: source type '{kind}' does not read {name}=.*jsonl|hf"
    ):
        load_recipe(path)


def test_a_path_alone_does_not_change_the_source():
    with pytest.raises(
        RecipeError, match=r"source type 'python-docs' does not read path='corpus/.*text, jsonl"
    ):
        load_recipe("recipes/demo.yaml", ["data.source.path=corpus/*.txt"])
    with pytest.raises(RecipeError, match="does not read path"):
        load_recipe("recipes/small.yaml", ["data.source.type=python-docs", "data.source.path=corpus/*.txt"])


def test_all_keys_of_files_by_hand_are_refused_too(tmp_path):
    keys = "path: x, name: n, split: test, text_field: body"
    path = write(tmp_path, "r.yaml", f"data: {{source: {{type: python-docs, {keys}}}}}\n")
    with pytest.raises(RecipeError, match="'python-docs' does not read"):
        load_recipe(path)


@pytest.mark.parametrize("order", [1, -1])
def test_another_type_of_source_leaves_what_it_does_not_read(tmp_path, order):
    hub = write(
        tmp_path, "hub.yaml", "data: {source: {type: hf, path: owner/set, name: small, split: test}}\n"
    )
    overrides = ["data.source.type=text", "data.source.path=mine.txt"][::order]
    for path in (hub, write(tmp_path, "top.yaml", "extends: hub.yaml\n")):
        source = load_recipe(path, overrides).data.source
        assert (source.type, source.path, source.name, source.split) == ("text", "mine.txt", None, "train")
        assert load_recipe(path, ["data.source.type=python-docs"]).data.source.path is None
    top = write(tmp_path, "top.yaml", "extends: hub.yaml\ndata: {source: {type: jsonl, path: a.jsonl}}\n")
    assert load_recipe(top).data.source.name is None
    source = load_recipe(hub, ["data.source.limit=3"]).data.source
    assert (source.name, source.split, source.limit) == ("small", "test", 3)


def test_a_stored_source_may_hold_what_it_does_not_read(tmp_path):
    """As older versions stored it where an override had changed the type: the run can resume."""
    stored = yaml.safe_load(dump_recipe(load_recipe("recipes/demo.yaml")))
    stored["data"]["source"] |= {"path": "owner/set", "name": "small", "split": "test"}
    source = load_recipe(write(tmp_path, "recipe.yaml", yaml.safe_dump(stored))).data.source
    assert (source.type, source.path, source.name, source.split) == ("python-docs", None, None, "train")


def test_override_makes_the_sections_that_are_not_there(tmp_path):
    path = write(tmp_path, "r.yaml", "name: other\n")
    got = load_recipe(path, ["name=renamed", "data.source.type=text", "data.source.path=a=b.txt"])
    assert (got.name, got.data.source.path) == ("renamed", "a=b.txt")


def test_recipes_are_found_by_their_short_names():
    assert load_recipe("demo.yaml").name == "demo"
    assert load_recipe("recipes/demo.yaml") == load_recipe("demo.yaml")


def test_resolved_recipe_reads_back(tmp_path):
    first = recipe(
        model={"hidden_size": 32, "mixer": {"type": "h_lru"}, "layer_pattern": ["h_lru", "attention"]},
        train={"tokens": 9_882_828_800, "tokens_per_step": 524_288},
        optim={"warmup": "3.5%", "decay": "200 steps", "final_lr": 1e-5, "grad_clip": None},
        checkpoint={"every": "30 min"}, eval={"every": "1.5M"},
    )  # fmt: skip
    text = dump_recipe(first)
    path = write(tmp_path, "resolved.yaml", text)
    assert load_recipe(path) == first
    assert dump_recipe(load_recipe(path)) == text
    assert yaml.safe_load(text)["optim"]["warmup"] == "3.5%"


def test_steps_and_rows():
    got = recipe(train={"tokens": 10_000, "tokens_per_step": 4096})
    assert (got.total_steps, got.rows_per_step) == (2, 16)


def test_pattern_entries_take_the_mixers_options():
    mixer = {"type": "bd_lru", "block_size": 2, "num_heads": 4}
    model = recipe(model={"mixer": mixer, "layer_pattern": ["bd_lru", {"type": "attention"}]}).model
    assert [m.type for m in model.layer_pattern] == ["bd_lru", "attention"]
    assert (model.layer_pattern[0].block_size, model.layer_pattern[1].num_heads) == (2, 4)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"modle": {}}, "modle: unknown key; did you mean 'model'?"),
        (
            {"model": {"mixer": {"blok_size": 2}}},
            "model.mixer.blok_size: unknown key; did you mean 'block_size'?",
        ),
        ({"data": {"source": {"qqq": 2}}}, "data.source.qqq: unknown key; known here: type"),
        ({"model": {"mixer": {"type": "bd_lruu"}}}, "'bd_lruu' is not known; did you mean 'bd_lru'?"),
        ({"model": {"mixer": {"gate": "exp2"}}}, "known here: softmax"),
        (
            {"model": {"mixer": {"block_size": 0}}},
            "model.mixer.block_size: input should be greater than or equal",
        ),
        (
            {"model": {"hidden_size": "wide"}},
            "model.hidden_size: input should be a valid integer (got",
        ),
        ({"train": {"tokens": "10X"}}, "train.tokens: expected a count such as 2M or 524288, not '10X'"),
        ({"model": {"mixer": {"type": "attention"}, "hidden_size": 20}}, "20 does not split into 8 heads"),
        (
            {"model": {"mixer": {"type": "mamba2"}, "hidden_size": 20}},
            "does not split into heads of width 64",
        ),
        ({"model": {"layer_pattern": []}}, "model.layer_pattern"),
        ({"model": 3}, "model: takes keys and values, not 3"),
        ({"optim": {"betas": [0.9, 1.5]}}, "each beta lies in"),
        ({"optim": {"final_lr": 1.0}}, "optim.final_lr 1.0 is above optim.lr"),
        ({"optim": {"betas": 0.9}}, "optim.betas: takes a list, as in [a, b], not 0.9"),
        ({"optim": {"warmup": "150%"}}, "between 0% and 100%"),
        ({"optim": {"warmup": 1}}, "optim.warmup: 1 is the whole budget or one step"),
        ({"optim": {"decay": "1"}}, "optim.decay: 1 is the whole budget or one step"),
        ({"train": {"tokens": 100, "tokens_per_step": 256}}, "train.tokens 100 is less than one step"),
        (
            {"model": {"mixer": {"type": "attention", "window": 2049}}},
            "window 2049 is above data.sequence_length 256",
        ),
        (
            {"model": {"layer_pattern": [{"type": "attention", "window": W} for W in (8, 16)]}},
            "windows of [8, 16] tokens; a model has one size",
        ),
        (
            {"train": {"tokens_per_step": 1000}},
            "not a multiple of data.sequence_length 256; the nearest below is 768",
        ),
        ({"train": {"tokens": "lots"}}, "train.tokens: expected a count such as 2M"),
        ({"train": {"precision": "fp64"}}, "'fp64' is not known"),
        ({"data": {"source": {"type": "text"}}}, "source type 'text' needs a path"),
        ({"checkpoint": {"every": "sometimes"}}, "checkpoint.every"),
        ({"tracking": {"trackers": ["tensorbord"]}}, "did you mean 'tensorboard'?"),
        ({"name": "a/b"}, "name: takes letters a to z, digits and . _ -, a letter or digit first, not 'a/b'"),
        (
            {"launch": {"account": "a b"}},
            "launch.account: takes letters a to z, digits and . _ , : + -, a letter",
        ),
        ({"seed": -1}, "seed: input should be greater"),
        ({"seed": 2**64}, "seed: input should be less"),
        ({"optim": {"lr": float("inf")}}, "optim.lr: input should be a finite number"),
        ({"model": {"layers": 2}}, "model.layers: unknown key; did you mean 'num_hidden_layers'?"),
        ({"train": {"lr": 1e-3}}, "train.lr: unknown key; did you mean 'optim.lr'?"),
        ({"model": {"block_size": 2}}, "did you mean 'model.mixer.block_size'?"),
        ({"seed": True, "seeed": 1}, "seeed: unknown key"),
    ],
    ids=str,
)
def test_each_mistake_is_one_plain_line(sections, words):
    with pytest.raises(RecipeError) as error:
        recipe(**sections)
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "a recipe is a mapping of sections, not list"),
        ("model: {hidden_size: [", "not valid YAML"),
        ("extends: nowhere.yaml", "nowhere.yaml: no such recipe file"),
        ("extends: demo", "demo: no such recipe file; did you mean recipes/demo.yaml?"),
        ("extends: paper/bd_lru_m4.yaml", "did you mean recipes/paper/bd-lru-m4.yaml?"),
        ("name: x\ntrain: {tokens: 40}", "r.yaml: train.tokens 40 is less than one step"),
        ("extends: r.yaml", "extends itself"),
        ("extends: [a, b]", "extends takes one file name"),
        ("1: 2", "1"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, words):
    path = write(tmp_path, "r.yaml", text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_or_a_run_where_a_recipe_is_expected(tmp_path):
    """The message says where the text goes, or which file is the run's recipe."""
    (tmp_path / "corpus").mkdir()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    recipe = write(tmp_path / "run", "recipe.yaml", "name: x")
    texts = [write(tmp_path, "one.txt", "a word: b: c"), write(tmp_path, "two.jsonl", '{"text": ""}\n' * 2)]
    for path in (*texts, tmp_path / "corpus"):
        with pytest.raises(RecipeError, match=r"text to train on is given as data\.source\.path$"):
            load_recipe(path)
    for path in (tmp_path / "run", checkpoint):
        with pytest.raises(RecipeError, match=f"did you mean {recipe}"):
            load_recipe(path)


def test_binary_missing_and_folder(tmp_path):
    binary = tmp_path / "b.yaml"
    binary.write_bytes(bytes(range(256)))
    for path, words in ((binary, "not valid YAML"), (tmp_path / "no.yaml", "no such"), (tmp_path, "no such")):
        with pytest.raises(RecipeError, match=words):
            load_recipe(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.tokens", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("steps", "or 'eval.every=200 steps'"),  # of eval.every=200 steps without quotes
        ("train..tokens=3", "write section.key=value"),
        ("name.deep=3", "name holds a value, not a section"),
        ("model.mixer=[", "not valid YAML"),
        ("train.tokns=2M", "did you mean 'tokens'?"),
        ("model.layer_pattern.1.num_heads=2", "is a list; write it whole, as in 'model.layer_pattern=[..]'"),
        ("optim.betas.1=0.9", "is a list; write it whole, as in 'optim.betas=[..]'"),
    ],
)
def test_wrong_overrides(override, words):
    with pytest.raises(RecipeError) as error:
        load_recipe("recipes/small.yaml", [override])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        *(("fp8", v, "train.precision=bf16") for v in (True, 1, None, "yes", {})),
        ("max_rewinds", 5, "max_bad_steps"),
    ],
)
def test_a_removed_key_names_what_takes_its_place(tmp_path, key, value, instead):
    path = write(tmp_path, "old.yaml", f"train: {{{key}: {json.dumps(value)}}}")
    for arguments in ((path,), ("recipes/demo.yaml", [f"train.{key}={json.dumps(value)}"])):
        with pytest.raises(RecipeError, match=rf"train\.{key}: was removed: .*{instead}") as error:
            load_recipe(*arguments)
        assert "\n" not in str(error.value)


def test_a_stored_recipe_may_hold_a_removed_key_that_was_off(tmp_path):
    """What older versions wrote into every run folder: the run goes on."""
    stored = yaml.safe_load(dump_recipe(load_recipe("recipes/demo.yaml")))
    assert "fp8" not in stored["train"]
    stored["train"] |= {"fp8": False, "max_rewinds": 3}
    path = write(tmp_path, "recipe.yaml", yaml.safe_dump(stored))
    assert load_recipe(path) == load_recipe("recipes/demo.yaml")


def test_a_number_is_a_name():
    assert load_recipe("recipes/demo.yaml", ["name=12"]).name == "12"


MIXTURE = """
extends: base.yaml
data:
  sources:
    - {type: text, path: "b/web pages*.txt", weight: 6}
    - {type: hf, path: owner/set, config: en, name: 2024, weight: 4}
    - {type: python-docs}
  stages: [{tokens: 1M, weights: {2024: 0.5, python-docs: 1}}, {}]
"""


def test_a_mixture_takes_the_place_of_a_source_and_back(tmp_path):
    write(
        tmp_path,
        "base.yaml",
        "data: {source: {type: text, path: a}, validation_source: {type: text, path: b}}",
    )
    path = write(tmp_path, "mixed.yaml", MIXTURE)
    data = load_recipe(path).data
    assert [source.name for source in data.sources] == ["2024", "python-docs", "web-pages"], "by name"
    assert data.stage_weights == [(0.5, 1.0, 0.0), (4.0, 1.0, 6.0)]
    assert (data.source.type, data.validation_source) == ("python-docs", None)
    stored = write(tmp_path, "recipe.yaml", dump_recipe(load_recipe(path)))
    assert load_recipe(stored).data == data
    back = load_recipe(path, ["data.source.type=text", "data.source.path=c"]).data
    assert (back.source.path, back.sources, back.stages) == ("c", [], [])
    assert load_recipe(path, ["data.stages=[]"]).data.stage_weights == [(4.0, 1.0, 6.0)]


def test_stages_until_a_number_of_tokens(tmp_path):
    write(tmp_path, "base.yaml", "train: {tokens: 3M}")
    path = write(tmp_path, "mixed.yaml", MIXTURE)
    first, own = {"2024": 0.5, "python-docs": 1.0}, {"2024": 4.0, "python-docs": 1.0, "web-pages": 6.0}
    data = load_recipe(path).data
    assert data.stages_until(0) == []
    assert data.stages_until(10**6) == [(10**6, first)]
    assert data.stages_until(10**6 + 1) == [(10**6, first), (10**6 + 1, own)]


def test_every_tracker_of_accelerate_can_be_named() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    names = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    assert recipe_from_dict({"name": "x", "tracking": {"trackers": names}}).tracking.trackers == names
