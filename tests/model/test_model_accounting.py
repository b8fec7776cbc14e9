"""The accounting against brute force: counted parameters, counted products, measured memory, a real cache."""

import pytest
import torch
from small_models import HYBRIDS, MIXER_ROWS, NAMES, in_turn, small_config, small_model, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from lrnn_lm.mixers import build_mixer
from lrnn_lm.model import LRNNForReconstruction
from lrnn_lm.model.accounting import account, check_parameters, saved_bytes, training_memory


@pytest.mark.parametrize(("name", "tied"), in_turn([False, True]))
def test_parameters(name, tied):
    model = small_model(name, tie_word_embeddings=tied)
    counted = account(model.config, 16)
    assert counted.total_parameters == sum(p.numel() for p in model.parameters())
    assert ("head" in counted.parameters) != tied
    assert counted.parameters["mlp"] == 3 * 3 * 16 * 24
    assert counted.parameters["norms"] == 7 * 16


@pytest.mark.parametrize("tied", [False, True])
def test_an_autoencoder_has_its_decoder(tied):
    """In parameters and products, from the config that it stores."""
    config = small_config("bd_lru", tie_word_embeddings=tied, architectures=["LRNNForReconstruction"])
    model, T, D = LRNNForReconstruction(config), 8, config.hidden_size
    counted = account(config, T)
    assert counted.total_parameters == sum(p.numel() for p in model.parameters())
    assert counted.parameters["decoder"] == sum(p.numel() for p in model.decoder.parameters())
    assert counted.work.products == account(small_config("bd_lru"), T).work.products + 2 * 2 * D * D
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.decoder(torch.zeros(1, D))
    assert counter.get_total_flops() == 2 * 2 * D * D


@pytest.mark.parametrize("name", ["bd_lru", "h_lru", "attention", "hybrid"])
def test_products_are_those_that_torch_counts(name):
    """Attention's own count is causal; torch counts the whole square, T instead of (T + 1) / 2 a token."""
    model, T = small_model(name), 8
    counted = account(model.config, T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(rows=2, length=T))
    square = counted.work.attention * 2 * T // (T + 1)
    assert counter.get_total_flops() == 2 * T * (counted.work.products + square)


def test_a_window_is_counted():
    """A token is compared with itself and up to 3 before: scores and sums of 2 heads of 8, in 3 layers."""
    config = small_config("attention-window")
    for T in (1, 3, 4, 5, 1000):
        keys = sum(min(t + 1, 4) for t in range(T))
        assert account(config, T).work.attention == 3 * (2 * 2 * 16 * keys // T)
        assert account(config, T, cache_bytes=2).attention_state_bytes == 3 * 2 * 2 * 16 * min(T, 3)


def test_lstm_products_by_hand():
    """A layer: input 16, cell 9, four gates; the products with the state wait for one another."""
    work = account(small_config("lstm"), 8).work
    mlp, head = 3 * 2 * 16 * 24, 2 * 16 * 53
    assert work.products == 3 * (2 * 4 * 9 * 16 + 2 * 9 * 16 + mlp) + head
    assert work.sequential == 3 * (2 * 4 * 9 * 9 + 12 * 9)
    assert work.scan == work.attention == 0


def test_recurrences_by_hand():
    """Five blocks of 3: 15 rows of 4 gates, each a multiply-add and 3 operations to normalise."""
    work = account(small_config("bd_lru"), 8).work
    assert (work.scan, work.sequential, work.attention) == (3 * 15 * 4 * 5, 0, 0)
    assert account(small_config("h_lru"), 8).work.scan == 3 * 7 * 5 * 5


def test_mamba2_by_hand():
    """Inner width 32 = 4 heads of 8, state 3, one group. In: gate and values 32 each, B and C of 3, a step a
    head. The convolution reaches 4 steps over values, B and C. A state element takes a decay, a product with
    its input and a sum, and is read by a product and a sum; a channel's own input comes in by a multiply-add.
    """
    work = account(small_config("mamba2"), 8).work
    mlp, head = 3 * 2 * 16 * 24, 2 * 16 * 53
    into, convolution, out = 2 * 16 * (32 + 32 + 3 + 3 + 4), 2 * 4 * (32 + 3 + 3), 2 * 32 * 16
    assert work.products == 3 * (into + convolution + out + mlp) + head
    assert work.scan == 3 * (4 * 8 * 3 * (3 + 2) + 2 * 4 * 8)
    assert work.sequential == work.attention == 0
    assert work.total == work.products + work.scan


@pytest.mark.parametrize("name", NAMES)
def test_only_attention_depends_on_the_context(name):
    short, long = account(small_config(name), 10), account(small_config(name), 1000)
    kinds = small_config(name).layer_types
    assert (short.flops_per_token < long.flops_per_token) == ({*kinds} != {"linear_attention"})
    assert (short.state_bytes < long.state_bytes) == ("full_attention" in kinds)
    assert short.recurrent_state_bytes == long.recurrent_state_bytes
    assert long.flops_per_token_training == 3 * long.flops_per_token


@pytest.mark.parametrize("name", NAMES)
def test_state_is_what_the_cache_holds(name):
    model = small_model(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(rows=1, length=10), past_key_values=cache)
    held = 0
    for layer in cache.layers:
        parts = (
            [layer.recurrent_states[0]] if hasattr(layer, "recurrent_states") else [layer.keys, layer.values]
        )
        held += sum(part.nbytes for part in parts)
    assert account(model.config, 10, cache_bytes=4).state_bytes == held


@pytest.mark.parametrize("name", ["bd_lru", "bd_matrix-erase", "m2rnn", *HYBRIDS])
def test_memory_estimate(name):
    """Proportional to the rows; less with checkpointing, less in bf16."""
    config = small_config(name)
    memory = training_memory(config, 4, 16, optimizer=10)
    parameters = account(config, 16).total_parameters
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * parameters, 4 * parameters, 10)
    one, four = (saved_bytes(config, 0, rows, 16, torch.float32) for rows in (1, 4))
    assert 3.5 <= four / one <= 4.5
    checkpointed = training_memory(config, 4, 16, checkpointing=True)
    assert checkpointed.activations < memory.activations
    half = training_memory(config, 4, 16, torch.bfloat16)
    assert half.activations < 0.9 * memory.activations
    assert memory.total > memory.activations + memory.loss


def test_h_lru_keeps_no_window_of_states():
    """What a higher order keeps for the backward pass is its gates, not (B, T, N, M) of states."""
    B, T, N = 2, 64, 7
    low, high = (
        saved_bytes(small_config("h_lru", mixer=MIXER_ROWS["h_lru"] | {"order": M}), 0, B, T, torch.float32)
        for M in (2, 16)
    )
    gates = 4 * B * T * N * (16 - 2)
    assert gates <= high - low <= 1.2 * gates


def test_expected_parameter_count():
    config = small_config("bd_lru")
    total = account(config, 8).total_parameters
    check_parameters(config, total)
    check_parameters(config, None)
    with pytest.raises(ValueError, match=f"{total + 1:,}.*{total:,}"):
        check_parameters(config, total + 1)


def test_a_context_needs_a_token():
    with pytest.raises(ValueError, match="context_length"):
        account(small_config("bd_lru"), 0)


@pytest.mark.parametrize("spec", [{"type": "bd_lru", "block_size": 4}, {"type": "h_lru"}, {"type": "lstm"}])
def test_sizes_that_are_left_out(spec):
    mixer = build_mixer(spec, 16)
    assert mixer.out_proj.weight.shape[0] == 16
