"""`repeat`: layers applied again with the same weights are a deeper model whose layers are copies."""

from pathlib import Path

import pytest
import torch
from small_models import close, plain, prefilled, small_config, small_model, tokens

from lrnn_lm import LRNNForCausalLM
from lrnn_lm.model.accounting import account, training_memory
from lrnn_lm.model.carried import CarriedStates
from lrnn_lm.recipe import load_recipe

LAYERS, REPEAT = 3, 2
NAMES = ("bd_lru", "hybrid-attention-first")
DEMO = Path(__file__).parents[2] / "recipes/demo.yaml"


def pair(name: str) -> tuple[LRNNForCausalLM, LRNNForCausalLM]:
    """A model that repeats its layers, and one of as many layers as it applies, with the same weights."""
    model = small_model(name, repeat=REPEAT)
    deep = LRNNForCausalLM(
        small_config(name, num_hidden_layers=LAYERS * REPEAT, layer_pattern=model.config.layer_mixers)
    ).eval()
    weights = model.state_dict()
    for key in deep.state_dict():
        if key.startswith("model.layers."):
            _, _, i, rest = key.split(".", 3)
            weights[key] = weights[f"model.layers.{int(i) % LAYERS}.{rest}"]
    deep.load_state_dict(weights)
    return model, deep


@pytest.mark.parametrize("name", NAMES)
def test_logits_gradients_and_padding(name):
    model, deep = pair(name)
    ids, mask = tokens(), torch.ones(2, 21, dtype=torch.long)
    mask[0, :4] = 0
    losses = [each(ids, attention_mask=mask, labels=ids).loss for each in (model, deep)]
    assert losses[0] == losses[1]
    for loss in losses:
        loss.backward()
    copies = dict(deep.named_parameters())
    for key, parameter in model.named_parameters():
        want = copies[key].grad
        if key.startswith("model.layers."):
            _, _, i, rest = key.split(".", 3)
            want = sum(copies[f"model.layers.{int(i) + LAYERS * r}.{rest}"].grad for r in range(REPEAT))
        close(parameter.grad, want, 1e-5 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("name", NAMES)
def test_each_application_has_its_own_state(name):
    model, ids = small_model(name, repeat=REPEAT), tokens()
    cache = prefilled(model, ids[:, :9])
    assert len(cache.layers) == LAYERS * REPEAT
    parts = [plain(model, ids[:, t : t + 1], cache) for t in range(9, 21)]
    close(torch.cat(parts, dim=1), plain(model, ids, None)[:, 9:], 2e-5)
    prompt = {"max_new_tokens": 6, "do_sample": False}
    deep = pair(name)[1]
    assert torch.equal(model.generate(ids, **prompt), deep.generate(ids, **prompt))
    with pytest.raises(ValueError, match=f"does not fit this model's {LAYERS * REPEAT} layers"):
        plain(model, ids[:, :1], prefilled(small_model(name), ids))


def test_checkpointed_layers_and_segments():
    """Recomputed in the backward pass, and read in two parts whose states carry gradients."""
    model, ids = small_model("bd_lru", repeat=REPEAT), tokens()
    want = torch.autograd.grad(model(ids).logits.square().sum(), list(model.parameters()))
    states = CarriedStates(model.config)
    parts = [model(part, past_key_values=states).logits for part in ids.split(12, dim=1)]
    got = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), list(model.parameters()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = torch.autograd.grad(model.train()(ids).logits.square().sum(), list(model.parameters()))
    for x, carried, recomputed in zip(want, got, again, strict=True):
        close(carried / x.abs().max(), x / x.abs().max(), 1e-4)
        close(recomputed / x.abs().max(), x / x.abs().max(), 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_cost(name):
    model, deep = pair(name)
    mine, other = account(model.config, 64), account(deep.config, 64)
    assert mine.total_parameters == account(small_config(name), 64).total_parameters < other.total_parameters
    assert mine.work == other.work
    assert mine.state_bytes == other.state_bytes
    memory = [training_memory(each.config, 2, 16, checkpointing=True).activations for each in (model, deep)]
    assert memory[0] == memory[1]


def test_saved_and_loaded(tmp_path):
    model, ids = small_model("bd_lru", repeat=REPEAT), tokens()
    model.save_pretrained(tmp_path)
    assert torch.equal(LRNNForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_mistakes():
    for value, message in ((0, "repeat must be at least 1"), (1.5, "repeat must be a whole number")):
        with pytest.raises(ValueError, match=message):
            small_config("bd_lru", repeat=value)
    with pytest.raises(ValueError, match=r"model\.repeat"):
        load_recipe(DEMO, ["model.repeat=0"])
    assert load_recipe(DEMO, ["model.repeat=3"]).model.repeat == 3


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_chosen_by_number(name):
    """transformers counted the layers once: later passes were None, and -1 was the end of the first pass."""
    model, deep = pair(name)
    asked = [1, LAYERS + 1, LAYERS * REPEAT]
    wanted = deep(tokens(), output_hidden_states=asked).hidden_states
    assert sum(state is not None for state in wanted) >= 2  # transformers 5.17 leaves out the last
    for each in (model, model.model):
        chosen = each(tokens(), output_hidden_states=asked).hidden_states
        assert len(chosen) == len(wanted)
        for state, want in zip(chosen, wanted, strict=True):
            assert (state is None) == (want is None)
            assert state is None or torch.equal(state, want)
