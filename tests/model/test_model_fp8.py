"""Products in fp8: where they cannot be, it is said; where they are emulated, the model still learns."""

import importlib.util

import pytest
import torch
from small_models import small_model, tokens

from lrnn_lm.model.fp8 import use_fp8
from lrnn_lm.recipe import load_recipe

CPU = torch.device("cpu")


def test_where_it_cannot_run():
    model = small_model("bd_lru")
    known = importlib.util.find_spec("torchao")
    with pytest.raises(ValueError, match="fp8 products here" if known else "need torchao"):
        use_fp8(model, CPU)


def test_a_recipe_asks_for_it():
    assert not load_recipe("recipes/demo.yaml").train.fp8
    assert load_recipe("recipes/demo.yaml", ["train.fp8=true"]).train.fp8


def test_emulated():
    pytest.importorskip("torchao", reason="torchao is not installed (extra `fp8`)")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "mixer": {"type": "bd_lru", "num_blocks": 8}}
    model, ids = small_model("bd_lru", **sizes), tokens()
    names, want = list(model.state_dict()), float(model(ids, labels=ids).loss.detach())
    assert use_fp8(model, CPU, emulate=True) == 3 * 6
    assert list(model.state_dict()) == names
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(6):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(want, rel=0.05)
    assert losses[-1] < losses[0] - 0.3
    with pytest.raises(ValueError, match="multiple of 16"):
        use_fp8(small_model("bd_lru"), CPU, emulate=True)
