"""States as values: saved, loaded, copied, dropped; and those of another model or size refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import MIXER_ROWS, NAMES, OF_EACH_STATE, close, in_turn, small_model, tokens
from tolerances import TOLERANCE
from torch import nn
from transformers import DynamicCache, StaticCache

from lrnn_lm.model import copy_states, drop_states, load_states, prefill, save_states
from lrnn_lm.model.states import spread

SUMS = TOLERANCE["other order of sums"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def rest(model, cache, ids, start=10):
    return model(ids[:, start:], past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_a_saved_state_goes_on(name, tmp_path):
    model, ids = small_model(name), tokens()
    reset = torch.zeros(2, 10, dtype=torch.bool)
    reset[1, 4] = True
    cache = model(ids[:, :10], reset=reset, use_cache=True).past_key_values
    save_states(cache, tmp_path / "states.safetensors", model)
    assert [file.name for file in tmp_path.iterdir()] == ["states.safetensors"]
    (tmp_path / "new").touch()  # those who may read a new file may read the states
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "states.safetensors").stat().st_mode
    loaded = load_states(tmp_path / "states.safetensors", model)
    assert loaded.get_seq_length() == 10
    close(rest(model, loaded, ids), rest(model, cache, ids), 0)


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_a_copy_is_its_own(name):
    model, ids = small_model(name), tokens()
    cache = prefill(model, ids[:, :10]).past_key_values
    copies = copy_states(cache, 3)
    want = rest(model, cache, ids)
    close(rest(model, copies, ids.repeat_interleave(3, dim=0)), want.repeat_interleave(3, dim=0), SUMS)
    assert copies.get_seq_length() == cache.get_seq_length() == 21


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_questions_of_unequal_length(name):
    """Padding between a state and the tokens that go on from it leaves no trace."""
    model, document, questions = small_model(name), tokens(rows=1, length=9), tokens(rows=3, length=6, seed=5)
    mask = torch.ones(3, 15, dtype=torch.long)
    mask[1, 9:12] = 0
    mask[2, 9:14] = 0
    cache = copy_states(prefill(model, document).past_key_values, 3)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    got = model.generate(questions, attention_mask=mask, past_key_values=cache, **options)
    for row, padding in enumerate((0, 3, 5)):
        whole = torch.cat([document, questions[row : row + 1, padding:]], dim=1)
        want = model.generate(whole, attention_mask=torch.ones_like(whole), **options)
        assert torch.equal(got[row, 6:], want[0, whole.shape[1] :])


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_rows_are_repeated_and_chosen(name):
    model, ids = small_model(name), tokens()
    cache = copy_states(prefill(model, ids[:, :10]).past_key_values)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    close(rest(model, cache, ids.flip(0)), model(ids).logits[:, 10:].flip(0), SUMS)
    if "linear_attention" in model.config.layer_types:
        with pytest.raises(ValueError, match="copy_states"):
            cache.crop(5)


@pytest.mark.parametrize(("name", "kind"), in_turn(["dynamic", "static"], OF_EACH_STATE))
def test_a_dropped_state_leaves_no_trace(name, kind):
    model, ids = small_model(name), tokens()
    cache = None if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    cache = prefill(model, ids.flip(0), past_key_values=cache).past_key_values
    drop_states(cache)
    close(prefill(model, ids, past_key_values=cache).logits, model(ids).logits[:, -1:], SUMS)


def test_a_static_cache_is_saved_without_its_empty_end(tmp_path):
    model, ids = small_model("hybrid"), tokens()
    cache = StaticCache(config=model.config, max_cache_len=64)
    prefill(model, ids[:, :10], past_key_values=cache)
    save_states(cache, tmp_path / "states", model)
    assert load_file(tmp_path / "states")["1.keys"].shape[2] == 10
    close(rest(model, load_states(tmp_path / "states", model), ids), model(ids).logits[:, 10:], SUMS)


def test_bf16_weights_take_the_states_of_fp32_weights(tmp_path):
    model, ids = small_model("hybrid"), tokens()
    save_states(prefill(model, ids[:, :10]).past_key_values, tmp_path / "states", model)
    half = small_model("hybrid").bfloat16()
    assert rest(half, load_states(tmp_path / "states", half), ids).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 24}, "hidden_size 16, this one has 24"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 3, this one has 2"),
        ({"mixer": {"type": "bd_lru", "num_blocks": 3, "block_size": 5}}, "layer_mixers"),
    ],
    ids=str,
)
def test_states_of_another_model_are_refused(change, words, tmp_path):
    model = small_model("bd_lru")
    save_states(prefill(model, tokens()).past_key_values, tmp_path / "states", model)
    with pytest.raises(ValueError, match=words):
        load_states(tmp_path / "states", small_model("bd_lru", **change))


def test_states_of_other_weights_are_refused(tmp_path):
    model = small_model("bd_lru")
    save_states(prefill(model, tokens()).past_key_values, tmp_path / "states", model)
    model.model.layers[1].mixer.out_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match="other weights"):
        load_states(tmp_path / "states", model)


@pytest.mark.parametrize("rows", [32_000, 50_280, 128_256])
def test_weights_of_more_numbers_than_fp32_counts(rows, tmp_path):
    """Embeddings of common vocabularies have more than 2^24 entries, the last of which the digest reads."""
    model, ids = small_model("bd_lru"), tokens()
    cache = prefill(model, ids).past_key_values
    model.model.embed_tokens.weight = nn.Parameter(torch.zeros(1).expand(rows, 768))
    save_states(cache, tmp_path / "states", model)
    assert load_states(tmp_path / "states", model).get_seq_length() == ids.shape[1]
    for n in (1, 5, 64, 2**24, 2**24 + 2, rows * 768):
        places = spread(n, 64)
        assert len(places.unique()) == min(n, 64)
        assert int(places.max()) in (n - 1, n - 2)


def test_files_that_hold_no_states(tmp_path):
    model = small_model("bd_lru")
    with pytest.raises(ValueError, match="no such file"):
        load_states(tmp_path / "gone", model)
    (tmp_path / "damaged").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="damaged"):
        load_states(tmp_path / "damaged", model)
    save_file({"x": torch.ones(1)}, tmp_path / "other", {"format": "pt", "model": json.dumps({})})
    with pytest.raises(ValueError, match="not a file of states"):
        load_states(tmp_path / "other", model)
    with pytest.raises(ValueError, match="seen no token"):
        save_states(DynamicCache(config=model.config), tmp_path / "empty", model)
    with pytest.raises(ValueError, match="seen no token"):
        copy_states(DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        copy_states(prefill(model, tokens()).past_key_values, 0)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "h_lru-1"])
def test_a_cache_of_another_size_is_refused(name):
    """As many layers of the right kinds, but states of another model: told before anything is computed."""
    other = {"hidden_size": 32} if "attention" in name or "hybrid" in name or name == "mamba2" else {}
    mixer = small_model(name).config.mixer
    if not other:
        size = next(key for key in ("num_blocks", "width", "num_heads") if key in MIXER_ROWS[name])
        other = {"mixer": mixer | {size: mixer[size] * 2}}
    cache = prefill(small_model(name, **other), tokens()).past_key_values
    if name == "hybrid":  # its recurrent layers have sizes of their own: the attention layer tells
        cache.layers[2].recurrent_states[0] = torch.zeros(2, 7, 4)
    with pytest.raises(ValueError, match=r"another model.*DynamicCache"):
        small_model(name)(tokens(length=1), past_key_values=cache)


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_a_cache_of_more_sequences_is_refused(name):
    model = small_model(name)
    cache = prefill(model, tokens(rows=3)).past_key_values
    with pytest.raises(ValueError, match=r"3 sequences, the input has 2.*copy_states"):
        model(tokens(rows=2), past_key_values=cache)


def test_tuples_are_no_caches():
    with pytest.raises(ValueError, match=r"tuple, not a cache; use DynamicCache"):
        small_model("bd_lru")(tokens(), past_key_values=((torch.zeros(1), torch.zeros(1)),))


@pytest.mark.parametrize("name", ["bd_lru", "hybrid"])
def test_a_cache_without_layers_is_refused_by_generate(name):
    """`DynamicCache()` knows of no layer until one writes keys and values to it."""
    with pytest.raises(ValueError, match=r"does not fit .* use DynamicCache\(config=model.config\)"):
        small_model(name).generate(tokens(), past_key_values=DynamicCache(), max_new_tokens=2)
