"""Attention with a window: the model with an explicit mask, and a cache of W - 1 tokens."""

import pytest
import torch
from small_models import close, prefilled, small_config, small_model, tokens
from tolerances import TOLERANCE
from torch.nn.attention import flex_attention
from transformers import CompileConfig, DynamicCache, StaticCache

from lrnn_lm import LRNNForCausalLM
from lrnn_lm.model import copy_states, modeling

SUMS, GRADIENT = TOLERANCE["other order of sums"], TOLERANCE["gradient"]
NAME, W, T = "attention-window", 4, 21
MIXED = ["hybrid-attention-first", NAME]  # attention to all tokens, an LSTM, a window of 4; a window alone


def test_training_is_attention_under_an_explicit_mask():
    ids = tokens(length=T)
    model, full = small_model(NAME).train(), small_model("attention").train()
    full.load_state_dict(model.state_dict())
    steps = torch.arange(T)
    distance = steps.unsqueeze(1) - steps
    mask = ((distance >= 0) & (distance < W))[None, None]
    results = []
    for each, given in ((model, None), (full, mask)):
        logits = each(ids, attention_mask=given, use_cache=False).logits
        logits.sigmoid().square().sum().backward()
        results.append((logits.detach(), [p.grad for p in each.parameters()]))
    (got, gradients), (want, expected) = results
    close(got, want, SUMS)
    for gradient, one in zip(gradients, expected, strict=True):
        close(gradient, one, GRADIENT * one.abs().max().item())
    ids[:, 0] = (ids[:, 0] + 1) % 50
    later = 3 * (W - 1) + 1  # three layers reach 3 (W - 1) tokens back, and no further
    with torch.no_grad():
        changed = model(ids, use_cache=False).logits
    assert torch.equal(changed[:, later:], got[:, later:])
    assert not torch.equal(changed[:, later - 1], got[:, later - 1])


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("cuts", [[1], [3], [4], [5, 6], [12], [2, 4, 8, 16], list(range(1, T))], ids=str)
@torch.no_grad()
def test_passes_after_one_another(name, cuts):
    """As in one pass, after fewer tokens than the window, as many, and more; the cache stays bounded."""
    model, ids = small_model(name), tokens(length=T)
    want = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        parts = [
            model(ids[:, a:b], past_key_values=cache, use_cache=True).logits
            for a, b in zip([0, *cuts], [*cuts, T], strict=True)
        ]
        close(torch.cat(parts, dim=1), want, SUMS)
        assert cache.layers[-1].keys.shape[2] == (W - 1 if isinstance(cache, DynamicCache) else W)
        cache = copy_states(cache)
        more = model(ids[:, :5], past_key_values=cache, use_cache=True).logits
        close(more, model(torch.cat([ids, ids[:, :5]], dim=1)).logits[:, T:], SUMS)


def test_a_step_on_a_static_cache_is_two_graphs():
    """transformers' layer counts tokens in Python, by a number that the second graph takes as an input."""
    torch.compiler.reset()
    model, ids, graphs = small_model(NAME, num_hidden_layers=1), tokens(3, 7), []

    def backend(graph, examples, **options):
        graphs.append(graph)
        return graph

    mask = (torch.arange(7) >= torch.arange(3).unsqueeze(1)).long()
    config = CompileConfig(backend=backend, fullgraph=True)
    config._compile_all_devices = True
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    got = model.generate(ids, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(got, model.generate(ids, **options))
    assert len(graphs) == 2


@torch.no_grad()
def test_a_static_cache_shorter_than_the_window_is_copied():
    model, ids = small_model(NAME, mixer={"type": "attention", "num_heads": 2, "window": 8}), tokens(length=T)
    cache = StaticCache(config=model.config, max_cache_len=6)
    model(ids[:, :6], past_key_values=cache, use_cache=True)
    close(model(ids[:, 6:], past_key_values=copy_states(cache)).logits, model(ids).logits[:, 6:], SUMS)


@torch.no_grad()
def test_a_static_cache_refuses_padding_after_a_token():
    model, ids, mask = small_model(NAME), tokens(length=9), torch.ones(2, 9)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match="beside a window a static cache takes padding on the left only"):
        model(ids, attention_mask=mask, past_key_values=StaticCache(config=model.config, max_cache_len=16))


@torch.no_grad()
def test_a_cache_of_another_window_is_refused():
    model, ids = small_model(NAME), tokens()
    wider = small_config(NAME, mixer={"type": "attention", "num_heads": 2, "window": 5})
    with pytest.raises(ValueError, match="a window of 5 tokens where this model has 4; use DynamicCache"):
        model(ids, past_key_values=DynamicCache(config=wider))
    with pytest.raises(ValueError, match="does not fit this model's 3 layers"):
        model(ids, past_key_values=prefilled(small_model("attention"), ids))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", [NAME, "attention-grouped"])
@pytest.mark.parametrize("kind", ["left", "holes"])
def test_training_by_blocks_leaves_the_cache_of_a_mask(name, kind, monkeypatch):
    """transformers' Trainer lets a model make a cache, which nobody reads."""
    mask = {"left": [[0] * 5 + [1] * 16, [1] * 21], "holes": [[0, 1, 1, 0, 1, 1, 1] * 3, [1] * 17 + [0] * 4]}
    mask, ids = torch.tensor(mask[kind]), tokens(length=T)
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[0, [3, 12]] = reset[1, 9] = True
    model = small_model(name)
    longer, found = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1), []
    for blocks in (False, True):
        monkeypatch.setattr(modeling, "takes_blocks", lambda x, head_dim, blocks=blocks: blocks)
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *inputs: None)  # no gradients on a CPU
        first = model(ids, attention_mask=mask, reset=reset, use_cache=True)
        loss = (first.logits.tanh() * mask.unsqueeze(-1)).sum()
        (gradient,) = torch.autograd.grad(loss, model.model.layers[0].mixer.k_proj.weight, retain_graph=True)
        cache = first.past_key_values
        after = model(ids[:, :3], attention_mask=longer, past_key_values=cache, use_cache=True).logits
        found.append((first.logits[mask.bool()], after, gradient))
    for got, want in zip(found[1], found[0], strict=True):
        close(got, want, GRADIENT * want.abs().max().item())


@pytest.mark.parametrize("window", [2, 3, 8])
@torch.no_grad()
def test_a_window_set_on_a_model_that_exists(window):
    """As to try another at evaluation: with a cache and padding inside of rows, too."""
    model, ids = small_model("attention-window"), tokens()
    model.config.sliding_window = window
    built = LRNNForCausalLM(model.config).eval()
    built.load_state_dict(model.state_dict())
    mask = torch.ones_like(ids)
    mask[0, 6:9] = mask[1, :2] = 0
    found = []
    for each in (model, built):
        cache = each(ids[:, :10], attention_mask=mask[:, :10], use_cache=True).past_key_values
        found.append(each(ids[:, 10:], attention_mask=mask, past_key_values=cache).logits)
    close(*found, SUMS)
