"""Patterns of layers and schedules: what is stored is read again; what does not fit is refused."""

import itertools
from pathlib import Path

import pytest
import yaml

from lrnn_lm.recipe import RecipeError, dump_recipe, flatten, load_recipe
from lrnn_lm.recipe.mixer import MIXER_OPTIONS
from lrnn_lm.train.optim import learning_rate


def top(base: Path, text: str) -> Path:
    path = base.with_name("top.yaml")
    path.write_text("extends: base.yaml\n" + text)
    return path


# Patterns ---------------------------------------------------------------------------------------------

PATTERNS = [
    "[bd_lru, {type: attention, num_heads: 2}]",
    "[bd_lru, {type: bd_lru, block_size: 8}, attention]",
    "[{gate: silu}, h_lru]",
    "[{type: bd_lru, gate_std: 1.0}]",
]
CHANGES = [
    ["model.mixer.block_size=16"], ["model.mixer.gate=sigmoid"], ["model.mixer.num_blocks=3"],
    ["model.mixer.type=h_lru"], ["model.layer_pattern=null"], ["model.layer_pattern=[attention]"], ["seed=1"],
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_stored_recipe_takes_overrides_as_the_first(base: Path, pattern: str, changes: list[str]) -> None:
    first = top(base, f"model: {{layer_pattern: {pattern}}}\n")
    stored = base.with_name("stored.yaml")
    stored.write_text(dump_recipe(load_recipe(first)))
    assert load_recipe(stored) == load_recipe(first)
    assert dump_recipe(load_recipe(stored)) == stored.read_text()

    def layers(path: Path) -> object:
        try:
            then = flatten(load_recipe(path, [*changes, "name=x"]))
        except RecipeError as error:
            return str(error)
        return then.get("model.layer_pattern") or {k: v for k, v in then.items() if ".mixer." in k}

    assert layers(first) == layers(stored)


@pytest.mark.parametrize("kind", MIXER_OPTIONS)
def test_a_stored_pattern_of_all_mixers_is_the_first(kind: str, tmp_path: Path) -> None:
    """Under any `mixer`: its defaults are stored, and other types may have others for the same options."""
    model = {"mixer": {"type": kind}, "layer_pattern": [*MIXER_OPTIONS]}
    path, stored = tmp_path / "first.yaml", tmp_path / "stored.yaml"
    path.write_text(yaml.safe_dump({"model": model, "data": {"source": {"type": "python-docs"}}}))
    stored.write_text(dump_recipe(load_recipe(path)))
    assert flatten(load_recipe(stored)) == flatten(load_recipe(path))


OPTIONAL = {name for own in MIXER_OPTIONS.values() for name, option in own.items() if option.may_be_none}


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        (kind, n)
        for kind, own in MIXER_OPTIONS.items()
        for n in own
        if n in OPTIONAL and not own[n].may_be_none
    ],
)
def test_an_option_that_only_other_types_may_leave_without_a_value(
    kind: str, option: str, base: Path
) -> None:
    with pytest.raises(RecipeError, match=f"mixer.{option}: {kind} needs a value"):
        load_recipe(base, [f"model.mixer={{type: {kind}, {option}: null}}"])


def test_an_override_that_reaches_no_layer_is_refused(base: Path) -> None:
    """Every layer that has the option sets it itself."""
    path = top(base, "model: {layer_pattern: [bd_lru, {type: bd_matrix, head_conv: 3, block_size: 2}]}\n")
    with pytest.raises(
        RecipeError, match=r"^override model.mixer.head_conv changes nothing: .* have head_conv set"
    ):
        load_recipe(path, ["model.mixer.head_conv=5"])
    for given in ("model.mixer.type=lstm", "model.mixer={type: lstm, width: 8}"):
        with pytest.raises(
            RecipeError, match=r"^override model.mixer.type changes nothing: no layer .* is a lstm"
        ):
            load_recipe(path, [given])
    for mixer in ("{head_conv: 5}", "{type: h_lru, order: 2}"):
        last = base.with_name("last.yaml")
        last.write_text(f"extends: top.yaml\nmodel: {{mixer: {mixer}}}\n")
        with pytest.raises(RecipeError, match=r"last.yaml: model.mixer.\w+ changes nothing"):
            load_recipe(last)
        assert load_recipe(last, ["model.layer_pattern=null"]).model.layer_pattern is None
    recipe = load_recipe(path, ["model.mixer.block_size=16", "model.mixer.keys=true"])
    assert [(entry.block_size, entry.keys) for entry in recipe.model.layer_pattern] == [(16, None), (2, True)]


def test_a_constant_rate_needs_no_final_one(base: Path) -> None:
    """Below the default final rate; and beside one that satisfied older versions."""
    for more in ([], ["optim.final_lr=0"]):
        assert load_recipe(base, ["optim.schedule=constant", "optim.lr=1e-6", *more]).optim.lr == 1e-6


def test_a_pattern_longer_than_the_model_is_told(base: Path) -> None:
    """Attention, say, is gone where someone makes a hybrid shallower."""
    pattern = "model.layer_pattern=[bd_lru, bd_lru, {type: attention, num_heads: 2}]"
    (told,) = load_recipe(base, [pattern, "model.num_hidden_layers=2"]).notes()
    assert told == "model.layer_pattern has 3 entries, the model 2 layers: not used: attention"
    for layers in (3, 4):
        assert load_recipe(base, [pattern, f"model.num_hidden_layers={layers}"]).notes() == []
    assert load_recipe(base, ["model.layer_pattern=null", "model.num_hidden_layers=1"]).notes() == []


def test_what_reaches_a_layer_is_not_refused(base: Path) -> None:
    """Layers without a type of their own have that of `mixer`; an override's pattern is not the file's."""
    path = top(base, "model: {mixer: {type: h_lru}, layer_pattern: [h_lru, {order: 2}, {}]}\n")
    last = base.with_name("last.yaml")
    last.write_text("extends: top.yaml\nmodel: {mixer: {type: h_lru, order: 4}}\n")
    assert [entry.order for entry in load_recipe(last).model.layer_pattern] == [4, 2, 4]
    path.write_text(path.read_text().replace("[h_lru, {order: 2}, {}]", "[{type: h_lru, order: 2}, {}]"))
    assert [entry.order for entry in load_recipe(last).model.layer_pattern] == [2, 4]
    for pattern in ("[bd_lru, {type: h_lru, order: 2}]", "[bd_lru, attention]", "[{type: h_lru, order: 3}]"):
        recipe = load_recipe(last, [f"model.layer_pattern={pattern}"])
        assert len(recipe.model.layer_pattern) == pattern.count(",") + 1 - pattern.count("order")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_older_versions_stored_is_read(base: Path, pattern: str) -> None:
    """Every option of every type, in `mixer` and in each entry."""
    first = top(base, f"model: {{layer_pattern: {pattern}}}\n")
    recipe = load_recipe(first)
    data = yaml.safe_load(dump_recipe(recipe))
    defaults = {
        name: option.default for options in MIXER_OPTIONS.values() for name, option in options.items()
    }
    data["model"]["mixer"] = defaults | data["model"]["mixer"]
    data["model"]["layer_pattern"] = [
        data["model"]["mixer"] | entry.model_dump(mode="json") for entry in recipe.model.layer_pattern
    ]
    old = base.with_name("old.yaml")
    old.write_text(yaml.safe_dump(data))
    assert flatten(load_recipe(old)) == flatten(recipe)
    change = ["model.mixer.block_size=16", "name=x"]
    assert flatten(load_recipe(old, change)) == flatten(load_recipe(first, change))


# The schedule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.schedule=wsd", "optim.warmup=50%", "optim.decay=80%"], "overlap"),
        (["optim.schedule=wsd", "optim.warmup=15 steps", "optim.decay=6 steps"], "overlap"),
        (["optim.schedule=wsd", "optim.warmup=10%", "optim.decay=2400"], "overlap"),
        (["optim.warmup=100000 steps"], "takes 100000 steps and train.tokens pays for 20"),
        (["optim.warmup=21 steps"], "takes 21 steps and train.tokens pays for 20"),
        (["optim.warmup=3K"], "pays for 20"),
        (["optim.schedule=wsd", "optim.warmup=0", "optim.decay=21 steps"], "optim.decay takes 21 steps"),
        (["optim.warmup=127"], "write '127 steps' or a share such as 10%"),
        (["optim.schedule=wsd", "optim.decay=100"], "write '100 steps'"),
    ],
    ids=str,
)
def test_a_schedule_that_does_not_fit(base: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(base, overrides)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("total", [1, 2, 3, 5, 20, 23, 100])
@pytest.mark.parametrize("warmup", ["0%", "10%", "20%", "50%", "100%"])
@pytest.mark.parametrize("decay", ["0%", "20%", "50%", "80%", "100%"])
def test_what_fits_has_no_jump_and_reaches_the_rate(base: Path, total: int, warmup: str, decay: str) -> None:
    if int(warmup[:-1]) + int(decay[:-1]) > 100:
        return
    keys = [f"train.tokens={128 * total}", "optim.schedule=wsd", "optim.lr=1", "optim.final_lr=0"]
    recipe = load_recipe(base, [*keys, f"optim.warmup={warmup}", f"optim.decay={decay}"])
    rates = [learning_rate(step, total, 128, recipe.optim) for step in range(total)]
    steps = [span.steps(total, 128) for span in (recipe.optim.warmup, recipe.optim.decay)]
    up, down = (1 / max(1, count) for count in steps)
    assert max([0, *(after - before for before, after in itertools.pairwise(rates))]) <= up + 1e-9
    if min(steps) and sum(steps) <= total:
        assert max(before - after for before, after in itertools.pairwise(rates)) <= down + 1e-9
        assert max(rates) == 1
    assert load_recipe(base, ["optim.schedule=wsd", "optim.warmup=20%", "optim.decay=80%"])


def test_other_schedules_have_no_decay_to_check(base: Path) -> None:
    """A sweep over schedules gives all of them the same keys."""
    assert load_recipe(base, ["optim.warmup=90%", "optim.decay=90%"]).optim.warmup.amount == 0.9
