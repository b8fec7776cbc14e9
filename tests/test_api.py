"""The names that `from lrnn_lm import ..` gives: their examples, those of docs/api.md, and how they fail."""

import doctest
import inspect
import itertools
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import losses, write_recipe

import lrnn_lm
from lrnn_lm import evaluate, generate, load_recipe, train
from lrnn_lm.api import HOMES
from lrnn_lm.train.runtime import own_settings

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
WITH_EXAMPLES = [name for name in HOMES if not name.startswith("LRNN") and name != "load_recipe"]


class IfAnythingIsExpected(doctest.OutputChecker):
    """A line of an example without an answer below it may print what it likes."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe where the examples expect the demo's, and a run of it."""
    folder = tmp_path_factory.mktemp("place")
    recipe = yaml.safe_load(write_recipe(folder).read_text())
    recipe |= {"name": "demo"}
    (folder / "recipes").mkdir()
    (folder / "recipes/demo.yaml").write_text(yaml.safe_dump(recipe))
    train(folder / "recipes/demo.yaml", ["train.tokens=2K", "eval.tasks=[]"])
    return folder


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_docstrings(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    text = inspect.unwrap(getattr(lrnn_lm, name)).__doc__
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert len(example.examples) >= 3
    report: list[str] = []
    results = doctest.DocTestRunner(IfAnythingIsExpected()).run(example, out=report.append)
    assert results.failed == 0, "".join(report)


def test_in_a_thread(place: Path) -> None:
    """As of a server: signals are the program's there, and nothing else is missing."""

    def work() -> Path:
        checkpoint = train(place / "recipes/demo.yaml", ["name=thread", "train.tokens=2K"])
        evaluate(checkpoint, ["heldout_bits_per_byte"])
        return checkpoint

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result().is_dir()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_run_is_its_recipes_whatever_torch_is_set_to(place: Path) -> None:
    """As in a notebook that set them for a model of its own."""
    recipe = place / "recipes/demo.yaml"

    def trained(name: str) -> list[tuple[int, float]]:
        train(recipe, [f"name={name}", "train.tokens=2K", "eval.tasks=[]"])
        return losses(place / "runs" / name)

    straight = trained("straight")
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert trained(f"in_{dtype}".replace(".", "_")) == straight
            assert torch.get_default_dtype() == dtype, "and it is the caller's again"
        finally:
            torch.set_default_dtype(torch.float32)
    for name, mode in (("no_grad", torch.no_grad()), ("inference", torch.inference_mode())):
        with mode:
            assert trained(name) == straight
    device = torch.device("cuda" if torch.cuda.is_available() else "meta")
    torch.set_default_device(device)
    try:
        assert trained("device") == straight
        assert torch.get_default_device().type == device.type, "and it is the caller's again"
    finally:
        torch.set_default_device(None)
    with torch.device("meta"):
        assert trained("in_a_context") == straight
        assert torch.empty(0).is_meta
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="outside of torch"):
        trained("autocast")


def test_scores_and_text_are_the_models_whatever_torch_is_set_to(place: Path) -> None:
    checkpoint = place / "runs/demo/checkpoints/latest"

    def asked() -> tuple[dict, str, str]:
        scores = evaluate(checkpoint, ["heldout_bits_per_byte"], limit=2)["results"]
        texts = [
            generate(checkpoint, "the", seed=1, max_new_tokens=5, prompt_twice=twice) for twice in (0, 1)
        ]
        return scores, *texts

    plain = asked()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert asked() == plain
        finally:
            torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    try:
        assert asked() == plain
        assert torch.empty(0).is_meta, "and it is the caller's again"
    finally:
        torch.set_default_device(None)
    with torch.device("meta"):
        assert asked() == plain


def test_settings_of_torch_around_a_run() -> None:
    """A default device breaks the graphs of torch.compile: within a run there is none, but for a `with`."""

    def unflatten(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (2, 2)) + torch.ones(2, 2)  # torch's method cannot be compiled in a context

    def device() -> tuple[str, str]:
        return torch.empty(0).device.type, torch.get_default_device().type

    try:
        for set_to, context in itertools.product((None, "cpu", "meta"), repeat=2):
            torch.set_default_device(set_to)
            with torch.device(context) if context else nullcontext():
                before = device()
                with suppress(KeyError), own_settings(), own_settings():
                    assert device() == ("cpu", "cpu")
                    if not context:
                        torch.compile(unflatten, fullgraph=True, backend="eager")(torch.ones(4))
                    raise KeyError
                assert device() == before
            assert device() == (set_to or "cpu",) * 2
            torch.set_default_device(None)
            assert device() == ("cpu", "cpu"), "nothing is left"
    finally:
        torch.set_default_device(None)


def test_examples_of_the_page(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["text"].startswith("the state")
    assert names["gates"].grad is not None


@pytest.mark.parametrize("name", HOMES)
def test_every_name_is_there_and_on_the_page(name: str) -> None:
    assert callable(getattr(lrnn_lm, name))
    assert name in lrnn_lm.__all__
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")


def test_packages_are_functions_and_stay_packages() -> None:
    import lrnn_lm.train.build as build

    assert inspect.isfunction(build.build_trainer)
    assert list(inspect.signature(train).parameters) == ["recipe", "overrides"]
    assert next(iter(inspect.signature(evaluate).parameters)) == "checkpoint"
    assert lrnn_lm.train is train


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda place: train(place / "nowhere.yaml"), "nowhere.yaml"),
        (lambda place: train(place / "recipes/demo.yaml", ["train.tokenz=2K"]), "tokenz"),
        (lambda place: train(load_recipe(place / "recipes/demo.yaml"), ["seed=2"]), "overrides go with"),
        (lambda place: evaluate(place / "nowhere", ["heldout_bits_per_byte"]), "nowhere"),
        (lambda place: generate(place / "runs/demo/checkpoints/latest", max_new_tokens=0), "max_new_tokens"),
    ],
)
def test_mistakes_are_value_errors(call, problem: str, place: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        call(place)


def test_a_stopped_run_raises_and_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No exit of the process that called, a notebook say."""
    from lrnn_lm.train.loop import Trainer

    step = Trainer._train_step

    def interrupted(self: Trainer) -> object:
        result = step(self)
        if self.position.step == 1:
            signal.raise_signal(signal.SIGINT)
        return result

    overrides = ["name=stopped", "train.tokens=2560", "eval.tasks=[]", f"train.runs_dir={place / 'runs'}"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT after step"):
            train(place / "recipes/demo.yaml", overrides)
    assert train(place / "recipes/demo.yaml", overrides).name == "step-00000005"
