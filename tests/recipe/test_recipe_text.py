"""What a recipe says is what is understood: text as it was typed, nothing given twice, no option unread."""

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lrnn_lm import mixers
from lrnn_lm.cli import main
from lrnn_lm.launch.sweep import read_sweep
from lrnn_lm.mixers import MIXERS
from lrnn_lm.recipe import RecipeError, dump_recipe, flatten, load_recipe, recipe_from_dict
from lrnn_lm.recipe.mixer import MIXER_OPTIONS, check_options, make_section, read_options

SOURCES = Path(inspect.getfile(mixers)).parent
TEXTS = [
    "007", "0012", "1.10", "1e5", "12e5", "9e12345", "1_000", "0x10", "0b1", "null", "Null", "yes", "no",
    "on", "OFF", "true", "False", "2024-01-02", "2024-13-45", "1.", "v1.0",
]  # fmt: skip
PATHS = [
    *TEXTS, "corpus #2.jsonl", "#1", "a: b.txt", "*.jsonl", "[ab].txt", "{a,b}.txt", "a/[0-9]*.gz", "&x",
    "!x", "%x", "@x", "`x", "it's", "a'b'", "- a", "?", "|", ">", ":", "=", "24:00:00", "a=b", "x:", ".inf",
    "2M", "'a' b'", "<<", "~x",
]  # fmt: skip
NULLS = ("null", "Null")  # what stands for no value, in a file and of a key that may be left out


def top(base: Path, text: str) -> Path:
    path = base.with_name("top.yaml")
    path.write_text("extends: base.yaml\n" + text)
    return path


# Text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_name_is_the_text_that_was_typed(base: Path, text: str) -> None:
    assert load_recipe(base, [f"name={text}"]).name == text
    assert load_recipe(base, [f"name='{text}'"]).name == text
    assert load_recipe(base, [f'name="{text}"']).name == text
    if text in NULLS:
        with pytest.raises(RecipeError, match="name: input should be a valid string"):
            load_recipe(top(base, f"name: {text}\n"))
    else:
        assert load_recipe(top(base, f"name: {text}\n")).name == text
    assert load_recipe(top(base, f"name: '{text}'\n")).name == text
    stored = base.with_name("stored.yaml")
    stored.write_text(dump_recipe(load_recipe(base, [f"name={text}"])))
    assert load_recipe(stored).name == text


@pytest.mark.parametrize("text", PATHS)
@pytest.mark.parametrize("key", ["data.source.path", "data.tokenizer", "train.runs_dir", "launch.python"])
def test_so_is_every_key_that_takes_text(base: Path, key: str, text: str) -> None:
    may_be_none = key in ("data.source.path", "launch.python")
    if may_be_none and text in NULLS:
        if key == "launch.python":
            assert flatten(load_recipe(base, [f"{key}={text}"]))[key] is None
        return
    if key == "train.runs_dir" and text == "~x":  # a home folder, of nobody here
        return
    assert flatten(load_recipe(base, [f"{key}={text}"]))[key] == text


def test_so_are_lists_of_text(base: Path) -> None:
    got = load_recipe(base, ["launch.modules=[1.10, 007, yes, cuda/12.10]", "eval.tasks=[1e5]"])
    assert (got.launch.modules, got.eval.tasks) == (["1.10", "007", "yes", "cuda/12.10"], ["1e5"])
    got = load_recipe(top(base, "launch: {modules: [1.10, 2024-01-02], account: 012, time: 24:00:00}\n"))
    assert got.launch.modules == ["1.10", "2024-01-02"]
    assert (got.launch.account, got.launch.time) == ("012", "24:00:00")


def test_numbers_stay_numbers(base: Path) -> None:
    got = load_recipe(
        base,
        ["optim.lr=6e-3", "train.tokens=1_280_000", "seed=010", "optim.betas=[0.9, 95e-2]",
         "train.compile=yes", "optim.grad_clip=null", "optim.warmup=0.1", "model.vocab_size=16"],
    )  # fmt: skip
    assert (got.optim.lr, got.train.tokens, got.seed, got.optim.betas) == (0.006, 1_280_000, 10, (0.9, 0.95))
    assert (got.train.compile, got.optim.grad_clip, got.model.vocab_size) == (True, None, 16)
    assert load_recipe(top(base, "seed: 010\ntrain: {compile: on}\n")).seed == 10


@pytest.mark.parametrize(
    "override",
    [
        "train.tokens=2M #x",
        "train.compile=true # why",
        "seed=1 #2",
        "eval.tasks=[a, b] # c",
        "eval.tasks=[a #b]",
    ],
)
def test_a_hash_cuts_nothing(base: Path, override: str) -> None:
    with pytest.raises(RecipeError, match="#") as raised:
        load_recipe(base, [override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("override", ["name=", "name=[a]", "name={a: 1}", "data.tokenizer="])
def test_no_text_at_all(base: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(base, [override])


def test_a_name_fits_a_folder(base: Path) -> None:
    assert len(load_recipe(base, [f"name={'n' * 200}"]).name) == 200
    with pytest.raises(RecipeError, match="name: string should have at most 200"):
        load_recipe(base, [f"name={'n' * 201}"])


def test_sweeps_keep_text_too(base: Path) -> None:
    sweep = base.with_name("sweep.yaml")
    sweep.write_text("data.source.path: [1.1, 1.10, 007]\noptim.lr: [1e-3]\n")
    runs = read_sweep(sweep, base, [])
    assert [run.data.source.path for run in runs] == ["1.1", "1.10", "007"]
    assert runs[1].name == "base-path_1.10-lr_0.001"
    sweep.write_text("- {name: 1.10}\n- {name: 0012, eval.tasks: [1e5, 'a #b'], seed: 3}\n")
    runs = read_sweep(sweep, base, [])
    assert [run.name for run in runs] == ["1.10", "0012"]
    assert (runs[1].eval.tasks, runs[1].seed) == (["1e5", "a #b"], 3)


# Given twice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("seed: 1\ntrain: {tokens: 2M}\nseed: 1\n", "seed", (2, 4)),
        ("train: {tokens: 2560}\neval: {}\ntrain: {micro_batch: 4}\n", "train", (2, 4)),
        ("optim:\n  lr: 1\n  warmup: 1%\n  lr: 2\n", "lr", (3, 5)),
        ("model: {mixer: {order: 2,\n  'order': 3}}\n", "order", (2, 3)),
        (
            "model: {layer_pattern: [bd_lru, {type: attention,\n num_heads: 2,\n num_heads: 2}]}",
            "num_heads",
            (3, 4),
        ),
        ("data: {source: {options: {start: 1, start: 2}}}\n", "start", (2, 2)),
        ("extends: base.yaml\n", "extends", (1, 2)),
    ],
)
def test_given_twice(base: Path, text: str, key: str, lines: tuple[int, int]) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(top(base, text))
    message = str(raised.value)
    assert f"{key} is given twice, in lines {lines[0]} and {lines[1]}" in message
    assert message.startswith(str(base.with_name("top.yaml")))
    assert "\n" not in message


def test_given_twice_elsewhere(base: Path) -> None:
    with pytest.raises(RecipeError, match="path is given twice"):
        load_recipe(base, ["data.source={type: text, path: a, path: b}"])
    for one, section in (("optim.lr=1", "optim={}"), ("model.mixer.order=2", " model ={hidden_size: 8}")):
        with pytest.raises(RecipeError, match=f"'{one}' before it would be lost"):
            load_recipe(base, ["seed=1", one, section])
        load_recipe(base, ["optim={lr: 1}", "optim.lr=2", "optim.lr=3"])  # the last of one key counts
    with pytest.raises(RecipeError, match=r"seed: unable to parse input string as an integer, exceeded"):
        load_recipe(base, [f"seed={'9' * 5000}"])
    sweep = base.with_name("sweep.yaml")
    sweep.write_text("seed: [1]\noptim.lr: [1]\nseed: [2]\n")
    with pytest.raises(RecipeError, match=r"sweep.yaml: seed is given twice, in lines 1 and 3"):
        read_sweep(sweep, base, [])


def test_merge_keys_and_anchors_are_no_repetition(base: Path) -> None:
    got = load_recipe(
        top(
            base,
            "optim: &o {lr: 1e-2, warmup: 5%}\n"
            "model:\n  mixer: &m {type: attention, num_heads: 4}\n"
            "  layer_pattern: [*m, {<<: *m, num_heads: 2}, *m]\n",
        )
    )
    assert [mixer.num_heads for mixer in got.model.layer_pattern] == [4, 2, 4]
    base.with_name("loop.yaml").write_text("model: &m {mixer: *m}\n")
    with pytest.raises(RecipeError, match=r"model.mixer.mixer: unknown key"):
        load_recipe(base.with_name("loop.yaml"))


# Options of mixers ------------------------------------------------------------------------------------


def test_what_is_read_from_the_source_is_what_the_classes_take() -> None:
    assert list(MIXER_OPTIONS) == list(MIXERS)
    for name, mixer in MIXERS.items():
        taken = inspect.signature(mixer).parameters
        assert {k: option.default for k, option in MIXER_OPTIONS[name].items()} == {
            k: taken[k].default for k in mixer.options
        }
        assert set(taken) - {*mixer.options} <= {"hidden_size", "settings"}


TOY = """
class Toy(Mixer):
    def __init__(self, hidden_size: int, width: int{first}, order: float | None = 0.5, {last}):
        super().__init__()
"""


@pytest.fixture
def with_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., type]:
    """The section of mixers as it is where a file and a line in the registry have added one more."""

    def add(first: str = " = 3", last: str = 'name: str = "a"') -> type:
        for module in ("lstm", "attention"):
            shutil.copy(SOURCES / f"{module}.py", tmp_path)
        (tmp_path / "toy.py").write_text(TOY.format(first=first, last=last))
        (tmp_path / "__init__.py").write_text(
            "from .attention import Attention\nfrom .lstm import LSTM\nfrom .toy import Toy\n"
            'MIXERS: dict[str, type] = {"lstm": LSTM, "attention": Attention, "toy": Toy}\n'
        )
        monkeypatch.setattr("lrnn_lm.recipe.mixer.MIXERS_FOLDER", tmp_path)
        monkeypatch.setattr("lrnn_lm.recipe.mixer.MIXER_OPTIONS", read_options())
        return make_section()

    return add


def test_a_new_mixer_is_a_file_and_a_line(with_toy: Callable[..., type]) -> None:
    section = with_toy()
    assert section(type="toy").model_dump() == {"type": "toy", "width": 3, "order": 0.5, "name": "a"}
    assert section(type="lstm").model_dump() == {"type": "lstm", "width": None}  # each its own default
    for wrong in ({"width": 0}, {"order": -1.0}, {"name": 3}, {"type": "top"}, {"with": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            section(**{"type": "toy", **wrong})
    toy, attention = section(type="toy", width=2), section(type="attention")
    with pytest.raises(ValueError, match=r"mixer.width is an option of lstm, toy, not of attention"):
        check_options("mixer", toy, ["attention"])
    assert attention.filled(toy).model_dump() == attention.model_dump()
    assert section(type="lstm").filled(toy).width == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first": ""}, "toy.py: Toy: each option needs a default"),
        ({"last": "other=3"}, "option other has a type that a recipe cannot check, none"),
        ({"last": "other: dict = None"}, "option other has a type that a recipe cannot check, dict"),
    ],
)
def test_a_declaration_that_no_recipe_could_check(
    with_toy: Callable[..., type], change: dict[str, str], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        with_toy(**change)


VALUES = {
    "gate": "tanh", "half_life": [2, 8], "output_gate": True, "head_norm": False, "qk_norm": True,
    "allow_neg_eigval": True, "keys": True, "erase": True, "scaled": True,
    "use_rope": False, "solver": "newton", "input_logit": False,
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXER_OPTIONS)
def test_an_option_of_another_type_is_refused(kind: str) -> None:
    """Its default value too, in `mixer` and in an entry of the pattern."""
    every = {option for options in MIXER_OPTIONS.values() for option in options}
    for option in every - {*MIXER_OPTIONS[kind]}:
        owner = next(other for other, options in MIXER_OPTIONS.items() if option in options)
        mixer = {"type": kind, option: VALUES.get(option, 4)}
        for model in ({"mixer": mixer}, {"mixer": {"type": "lstm"}, "layer_pattern": ["lstm", mixer]}):
            with pytest.raises(RecipeError) as raised:
                recipe_from_dict({"name": "x", "model": model})
            where = "layer_pattern.1" if "layer_pattern" in model else "mixer"
            assert f"{where}.{option} is an option of" in str(raised.value)
            assert owner in str(raised.value)
            assert f"not of {kind}" in str(raised.value)


def test_its_own_options_are_taken(base: Path) -> None:
    for kind, options in MIXER_OPTIONS.items():
        given = {option: VALUES.get(option, 2) for option in options} | {"type": kind}
        given |= {"head_dim": 16} if "head_dim" in options else {}
        got = recipe_from_dict({"name": "x", "model": {"hidden_size": 64, "mixer": given}}).model.mixer
        assert got.model_dump(mode="json") == given


@pytest.mark.parametrize(
    "overrides",
    [["model.mixer.order=4"], ["model.mixer.num_heads=8"],
     ["model.mixer.type=attention", "model.mixer.block_size=2"],
     ["model.mixer.block_size=2", "model.mixer.type=attention"],
     ["model.mixer={type: attention, gate: tanh}"],
     ["model.layer_pattern=[bd_lru, {type: attention, block_size: 2}]"]],
)  # fmt: skip
def test_overrides_of_another_type_are_refused(base: Path, overrides: list[str]) -> None:
    with pytest.raises(RecipeError, match="is an option of"):
        load_recipe(base, overrides)


def test_a_change_of_type_leaves_out_what_the_new_one_does_not_read(base: Path) -> None:
    assert load_recipe(base, ["model.mixer.type=attention"]).model.mixer.model_fields_set == {"type"}
    got = load_recipe(base, ["model.mixer.type=h_lru", "model.mixer.order=3"]).model.mixer
    assert (got.type, got.order, got.gate) == ("h_lru", 3, "tanh")  # gate: both read it
    child = top(base, "model: {mixer: {type: attention, num_heads: 4}}\n")
    assert load_recipe(child).model.mixer.model_fields_set == {"type", "num_heads"}
    assert load_recipe(child, ["model.mixer.type=bd_lru"]).model.mixer.model_fields_set == {"type"}
    with pytest.raises(RecipeError, match="block_size is an option of bd_lru"):
        load_recipe(top(base, "model: {mixer: {type: attention, block_size: 4}}\n"))
    sweep = base.with_name("sweep.yaml")
    sweep.write_text("model.mixer.type: [bd_lru, lstm, attention]\n")
    assert [run.model.mixer.type for run in read_sweep(sweep, base, [])] == ["bd_lru", "lstm", "attention"]


def test_an_unknown_type_is_told_as_such(base: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'bd_lru'"):
        load_recipe(base, ["model.mixer.type=bdlru"])


@pytest.mark.parametrize("command", ["prepare", "train", "submit", "info"])
def test_an_override_that_a_later_one_replaces_is_told(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one counted without a word."""
    twice = ["optim.lr=1e-3", "train.tokens=2M", "optim.lr=2e-3", "seed=1", "seed=1"]

    def said(*overrides: str) -> str:
        with pytest.raises(SystemExit) as ended:  # after the note, as there is no such recipe
            main([command, str(tmp_path / "none.yaml"), *overrides])
        assert ended.value.code == 2
        note, mistake = capsys.readouterr().err.split("lrnn: " + str(tmp_path))
        assert "no such recipe" in mistake
        return note

    assert said(*twice) == "lrnn: optim.lr is given 2 times; the last counts: optim.lr=2e-3\n"
    assert said(*twice[:2], "seed=1", "optim.eps=1e-9") == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):  # another rank tells it
        main([command, "none.yaml", *twice])
    assert capsys.readouterr().err == ""
