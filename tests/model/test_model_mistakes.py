"""Mistakes in a mixer's table or in inputs are ValueErrors that say what to write; the tables agree."""

import json
import math
import re
from typing import get_args

import pytest
import torch
from small_models import small_model, tokens
from torch import nn
from transformers import StaticCache

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.kernels import GATES
from lrnn_lm.mixers import build_mixer, mixer_options
from lrnn_lm.recipe.mixer import GateName
from lrnn_lm.runs.load import model_configuration


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"type": "bd_lru", "block_size": 0}, "block_size must be at least 1"),
        ({"type": "bd_lru", "num_blocks": 0}, "num_blocks must be at least 1"),
        ({"type": "h_lru", "order": -1}, "order must be at least 1"),
        ({"type": "h_lru", "num_blocks": -4}, "num_blocks must be at least 1"),
        ({"type": "lstm", "width": 0}, "width must be at least 1"),
        ({"type": "attention", "num_heads": 0}, "num_heads must be at least 1"),
        ({"type": "attention", "num_heads": 3}, "does not split into 3 heads"),
        ({"type": "attention", "num_kv_heads": 0}, "num_kv_heads must be at least 1"),
        ({"type": "attention", "num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 8"),
        ({"type": "attention", "window": 0}, "window must be at least 1"),
        ({"type": "attention", "window": 1}, "window must be at least 2 tokens"),
        ({"type": "attention", "window": "4"}, "window must be a whole number"),
        ({"type": "mamba2", "head_dim": 5}, "does not split into heads"),
        ({"type": "mamba2", "head_dim": 8, "n_groups": 3}, "do not split into n_groups"),
        ({"type": "mamba2", "state_size": 0}, "state_size must be at least 1"),
        ({"type": "bd_lru", "block_size": "4"}, "block_size must be a whole number, not '4'"),
        ({"type": "h_lru", "order": 4.0}, r"order must be a whole number, not 4\.0"),
        ({"type": "lstm", "width": "9"}, "width must be a whole number"),
        ({"type": "bd_lru", "half_life": [2, math.inf]}, r"half_life\[1\] must be above 0 and finite"),
        ({"type": "bd_matrix", "half_life": ["a", 3]}, r"half_life\[0\] must be above 0 and finite"),
        ({"type": "bd_lru", "half_life": 5}, "half_life is \\[shortest, longest\\]"),
        ({"type": "attention", "rope_theta": 0}, "rope_theta must be above 0 and finite"),
        ({"type": "attention", "rope_theta": math.nan}, "rope_theta must be above 0 and finite"),
        ({"type": "attention", "rope_theta": "10000"}, "rope_theta must be above 0 and finite"),
        ({"type": "complex_lru", "longest": math.inf}, "longest must be above 0 and finite"),
        ({"type": ["bd_lru"]}, "unknown mixer type"),
        ({"type": "bd_lru", "gate": "softmaxx"}, "unknown gate 'softmaxx'"),
        ({"type": "h_lru", "gate": "exp"}, "unknown gate 'exp'"),
        ({"type": "bd_lruu"}, "did you mean 'bd_lru'"),
        ({"type": "transformer"}, "known: bd_lru"),
        ({"type": "bd_lru", "blok_size": 2}, "did you mean 'block_size'"),
    ],
    ids=str,
)
def test_wrong_mixer(spec, words):
    with pytest.raises(ValueError, match=words):
        build_mixer(spec, 16)
    with pytest.raises(ValueError, match=words):
        LRNNForCausalLM(LRNNConfig(vocab_size=11, hidden_size=16, num_hidden_layers=1, mixer=spec))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_wrong_size(key):
    with pytest.raises(ValueError, match=f"{key} must be at least 1"):
        LRNNConfig(**{key: 0})


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
@pytest.mark.parametrize("value", ["7", 7.0, None])
def test_a_size_that_is_no_number(key, value):
    with pytest.raises(ValueError, match=f"{key} must be a whole number, not {value!r}"):
        LRNNConfig(**{key: value})


@pytest.mark.parametrize("change", [
    {"dtype": "x"}, {"hidden_size": True}, {"max_position_embeddings": "x"}, {"max_position_embeddings": {}},
    {"rms_norm_eps": "x"}, {"rms_norm_eps": -1}, {"rms_norm_eps": {}}, {"mixer": "x"},
    {"mixer": {"type": "of a newer version"}}, {"hidden_size": 0},
], ids=str)  # fmt: skip
def test_a_config_json_that_was_changed_by_hand(change, tmp_path):
    """The message names the file."""
    file = tmp_path / "config.json"
    LRNNConfig(num_hidden_layers=1, mixer={"type": "bd_lru", "num_blocks": 4}).save_pretrained(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"^{file}: "):
        model_configuration(tmp_path)


def test_a_spread_that_is_no_number():
    with pytest.raises(ValueError, match="gate_std must be above 0 and finite, not 'wide'"):
        LRNNForCausalLM(LRNNConfig(num_hidden_layers=1, mixer={"type": "bd_lru", "gate_std": "wide"}))


@pytest.mark.parametrize(
    "fields",
    [{"mixer": "bd_lru"}, {"mixer": ["bd_lru"]}, {"layer_pattern": "bd_lru"}, {"layer_pattern": [3]}],
    ids=str,
)
def test_what_is_no_table_of_a_mixer(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}.* mixer"):
        LRNNConfig(**fields)


def test_other_types_options_are_left_out():
    options = mixer_options({"type": "lstm", "width": 9, "block_size": 4, "gate": "tanh"})
    assert options == {"type": "lstm", "width": 9}


def test_pattern_repeats_and_takes_the_mixers_options():
    config = LRNNConfig(
        num_hidden_layers=5,
        mixer={"type": "bd_lru", "block_size": 2, "num_heads": 4},
        layer_pattern=["bd_lru", {"type": "attention"}],
    )
    assert [spec["type"] for spec in config.layer_mixers] == [
        "bd_lru",
        "attention",
        "bd_lru",
        "attention",
        "bd_lru",
    ]
    assert config.layer_mixers[0] == {"type": "bd_lru", "block_size": 2}
    assert config.layer_mixers[1] == {"type": "attention", "num_heads": 4}
    assert config.layer_types[:2] == ["linear_attention", "full_attention"]
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 4)
    config.layer_pattern[1]["num_kv_heads"] = 2
    assert (config.num_attention_heads, config.to_dict()["num_key_value_heads"]) == (4, 2)


def test_a_pattern_with_windows_of_two_sizes():
    pattern = [{"type": "attention", "window": W} for W in (8, 4, 8)]
    with pytest.raises(ValueError, match=r"windows of \[4, 8\] tokens; a model has one size"):
        LRNNConfig(layer_pattern=pattern)
    config = LRNNConfig(layer_pattern=[*pattern[::2], "attention", "lstm"], num_hidden_layers=4)
    assert config.layer_types == [*["sliding_attention"] * 2, "full_attention", "linear_attention"]
    assert config.sliding_window == 8


def test_the_recipe_knows_the_gates():
    assert set(get_args(GateName)) == set(GATES)


@pytest.mark.parametrize("name", ["bd_lru", "attention", "hybrid", "lstm"])
@pytest.mark.parametrize("shape", [(9,), (1, 0), (2, 3, 4)])
def test_inputs_that_are_no_rows_of_tokens(name, shape):
    model, ids = small_model(name), torch.ones(shape, dtype=torch.long)
    said = rf"input_ids of shape {re.escape(str(shape))} must be \(rows, tokens\), with at least one token"
    for labels in (None, ids):
        with pytest.raises(ValueError, match=said):
            model(ids, labels=labels)
    with pytest.raises(ValueError, match=r"inputs_embeds of shape .* must be \(rows, tokens, hidden_size\)"):
        model(inputs_embeds=torch.ones(2, 16))


@pytest.mark.parametrize("name", ["attention", "hybrid"])
def test_a_static_cache_that_is_too_short(name):
    model, ids = small_model(name), tokens(length=8)
    cache = StaticCache(config=model.config, max_cache_len=9)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="places for 9 tokens, not for the 8 in it and 2 new ones"):
            model(ids[:, :2], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(("name", "kept"), [("hybrid", [1]), ("hybrid", [0, 1, 1, 2]), ("bd_lru", [0, 2])])
@torch.no_grad()
def test_layers_that_the_config_does_not_say(name, kept):
    """Taken out or repeated by hand: attention got no mask where the config told of none."""
    model, ids, mask = small_model(name), tokens(length=9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    specs = model.config.layer_mixers
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in kept)
    model.config.num_hidden_layers = len(kept)
    if name == "hybrid":
        with pytest.raises(ValueError, match=r"by the config of .* set config\.layer_pattern"):
            model(ids, attention_mask=mask)
        model.config.layer_pattern = [specs[i] for i in kept]
    padded, alone = model(ids, attention_mask=mask).logits[:1, 4:], model(ids[:1, 4:]).logits
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-4)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


@pytest.mark.parametrize(("name", "window"), [("attention", 4), ("attention-window", None)])
def test_a_window_that_the_layers_were_not_built_with(name, window, tmp_path):
    """Set or taken off: a window was ignored, and one that was taken off tore the cache."""
    model, ids = small_model(name), tokens()
    model.config.sliding_window = window
    with pytest.raises(ValueError, match="a window was set or taken off, load the model with that config"):
        model(ids)
    model.save_pretrained(tmp_path)
    assert LRNNForCausalLM.from_pretrained(tmp_path)(ids).logits.isfinite().all()
