"""docs/extending.md: the mixer and the optimizer that it adds are added as it says, and work."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import write_recipe

from lrnn_lm import LRNNConfig, LRNNForCausalLM, mixers
from lrnn_lm.mixers import MIXERS
from lrnn_lm.mixers import base as mixers_base
from lrnn_lm.model.accounting import account
from lrnn_lm.recipe import load_recipe
from lrnn_lm.recipe import mixer as section
from lrnn_lm.train import optim
from lrnn_lm.train.build import build_trainer

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
MIXER, LINE, ROW, OPTIMIZER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def ema(monkeypatch: pytest.MonkeyPatch) -> type[mixers_base.Mixer]:
    """The page's mixer in the registry."""
    names: dict[str, object] = {}
    exec(MIXER.replace("from .", "from lrnn_lm.mixers."), names)
    monkeypatch.setitem(MIXERS, "ema", names["MovingAverage"])
    return names["MovingAverage"]


def test_a_recipe_reads_the_options_from_the_file_and_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: type[mixers_base.Mixer]
) -> None:
    folder = tmp_path / "mixers"
    shutil.copytree(Path(mixers.__file__).parent, folder)
    (folder / "ema.py").write_text(MIXER)
    text = (folder / "__init__.py").read_text()
    text = text.replace("from .fla ", "from .ema import MovingAverage\nfrom .fla ")
    text, added = re.subn(r"(MIXERS: .*= \{\n)", rf"\1{LINE}", text)
    assert added == 1
    (folder / "__init__.py").write_text(text)
    monkeypatch.setattr(section, "MIXERS_FOLDER", folder)
    monkeypatch.setattr(section, "MIXER_OPTIONS", section.read_options())
    assert section.MIXER_OPTIONS["ema"].keys() == {*ema.options} == {"width", "decay"}
    mixer = section.make_section()
    assert mixer(type="ema", width=5).model_dump() == {"type": "ema", "width": 5, "decay": 0.9}
    for wrong in ({"width": 0}, {"decay": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            mixer(type="ema", **wrong)


@pytest.mark.usefixtures("ema")
def test_the_mixer_runs_in_a_model(tmp_path: Path) -> None:
    """In one pass, and in two from the state between; and saved and loaded, as of a package of its own."""
    row = eval(ROW.strip().removesuffix(",").partition(":")[2])
    config = LRNNConfig(
        vocab_size=53, hidden_size=16, num_hidden_layers=2, intermediate_size=24, mixer={**row, "decay": 0.5}
    )
    torch.manual_seed(0)
    model = LRNNForCausalLM(config).eval()
    assert torch.equal(model.model.layers[0].mixer.decay_logit, torch.zeros(9))
    ids = torch.randint(1, 53, (2, 12))
    whole = model(ids).logits
    whole.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=0, atol=1e-5)
    assert account(config, 12).recurrent_state_bytes == 2 * 9 * 4
    model.save_pretrained(tmp_path)
    assert torch.equal(LRNNForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, whole)


def test_the_mixer_keeps_double_precision(ema: type[mixers_base.Mixer]) -> None:
    """The tests of a row compare gradients in fp64: a state rounded to fp32 fails them."""
    torch.manual_seed(0)
    mixer, x = ema(6, width=4).double(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert mixer(x)[1].dtype == torch.float64
    assert torch.autograd.gradcheck(mixer, (x, torch.randn(2, 4, dtype=torch.float64, requires_grad=True)))


def test_the_optimizer_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "OPTIMIZERS", dict(optim.OPTIMIZERS))
    exec(OPTIMIZER, vars(optim).copy())
    recipe = load_recipe(write_recipe(tmp_path), ["optim.name=sgd", "train.tokens=1024"])
    trainer = build_trainer(recipe)
    assert type(trainer.optimizer).__name__ == "SGD"
    trainer.run()
    assert trainer.finished
