"""However a sequence is cut, padded or packed, the model computes the same; and its state matters."""

from itertools import pairwise

import pytest
import torch
from small_models import NAMES, OF_EACH_STATE, RECURRENT, close, in_turn, small_model, states, tokens
from tolerances import TOLERANCE
from transformers import DynamicCache, StaticCache

from lrnn_lm.model import copy_states, drop_states, load_states, save_states

SUMS = TOLERANCE["other order of sums"]
STARTS = ([5, 6, 18], [0, 17])  # of documents, a row each


def reset_mask(length: int = 21) -> torch.Tensor:
    reset = torch.zeros(len(STARTS), length, dtype=torch.bool)
    for row, starts in zip(reset, STARTS, strict=True):
        row[starts] = True
    return reset


def in_segments(model, ids, cuts, cache=None, **masks):
    """Logits of a sequence fed in segments through one cache; masks are cut as the inputs are."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        part = {key: mask[:, start:stop] for key, mask in masks.items()}
        logits.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **part).logits)
    return torch.cat(logits, dim=1)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_segments_are_the_whole(name):
    """Tokens one by one and several at once, through a cache that the model has made; its state matters."""
    model, ids = small_model(name), tokens()
    whole, first = model(ids).logits, model(ids[:, :3], use_cache=True)
    rest = in_segments(model, ids[:, 3:], [1, 2, 10, 11], cache=first.past_key_values)
    close(torch.cat([first.logits, rest], dim=1), whole, SUMS)
    assert first.past_key_values.get_seq_length() == ids.shape[1]
    if name in RECURRENT:
        assert (whole[:, 3] - model(ids[:, 3:4]).logits[:, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_a_cache_made_in_inference_mode_goes_on_outside_of_it(name):
    model, ids = small_model(name), tokens()
    with torch.inference_mode():
        cache = model(ids[:, :9], use_cache=True).past_key_values
    other = copy_states(cache)
    close(in_segments(model, ids[:, 9:], [1, 5], cache), model(ids).logits[:, 9:], SUMS)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, past_key_values=other, **options), model.generate(ids, **options))


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_no_rows_in_segments(name):
    """As the last shard of a data set may leave a rank none."""
    model, ids = small_model(name), tokens(rows=0)
    assert (
        in_segments(model, ids, [1, 10]).shape == model(ids).logits.shape == (0, 21, model.config.vocab_size)
    )


@pytest.mark.parametrize(("name", "cuts"), in_turn([[1, 2, 3, 4, 5], [2, 10], [20]], OF_EACH_STATE))
def test_left_padding_in_segments(name, cuts):
    """The first token may come in a later segment than its padding, alone or not."""
    model, ids = small_model(name), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cache, logits = DynamicCache(config=model.config), []
    for start, stop in zip([0, *cuts], [*cuts, 21], strict=True):
        part = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        logits.append(part.logits)
    close(torch.cat(logits, 1)[0, 4:], model(ids[:1, 4:]).logits[0], SUMS)
    close(torch.cat(logits, 1)[1], model(ids[1:]).logits[0], SUMS)


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_are_separate(name):
    """In one pass and in segments; states are those of the last document."""
    model, ids, reset = small_model(name), tokens(), reset_mask()
    out = model(ids, reset=reset, use_cache=True)
    close(in_segments(model, ids, [3, 4, 13, 14], reset=reset), out.logits, SUMS)
    for row, starts in enumerate(STARTS):
        for start, stop in pairwise(sorted({0, *starts, 21})):
            alone = model(ids[row : row + 1, start:stop], use_cache=True)
            close(out.logits[row, start:stop], alone.logits[0], SUMS)
        if name in RECURRENT:
            for got, want in zip(states(out.past_key_values), states(alone.past_key_values), strict=True):
                close(got[row], want[0], SUMS)


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_everywhere_forgets_everything(name):
    model, ids = small_model(name), tokens(length=5)
    apart = model(ids, reset=torch.ones_like(ids, dtype=torch.bool)).logits
    close(apart, model(ids.reshape(-1, 1)).logits.view(2, 5, -1), SUMS)


def test_a_cache_of_another_shape_is_refused():
    model = small_model("bd_lru")
    with pytest.raises(ValueError, match="DynamicCache"):
        model(tokens(), past_key_values=DynamicCache())


@pytest.mark.parametrize("kind", ["made", "copied", "loaded", "given", "static"])
def test_states_of_another_mixer_are_refused(kind, tmp_path):
    """H-LRU of order 4 and BD-LRU of blocks of 4, 8 of each, have states of one size."""
    ours = small_model("h_lru", mixer={"type": "h_lru", "num_blocks": 8, "order": 4})
    other = small_model("bd_lru", mixer={"type": "bd_lru", "num_blocks": 8, "block_size": 4})
    cache = {
        "static": StaticCache(config=other.config, max_cache_len=30),
        "given": DynamicCache(config=other.config),
    }.get(kind)
    cache = other(tokens(), past_key_values=cache, use_cache=True).past_key_values
    if kind == "copied":
        cache = copy_states(cache)
    if kind == "loaded":
        save_states(cache, tmp_path / "states", other)
        cache = load_states(tmp_path / "states", other)
    message = "a layer's state is of bd_lru where this model has h_lru; use DynamicCache"
    with pytest.raises(ValueError, match=message):
        ours(tokens(), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=message):
        ours.generate(tokens(), past_key_values=cache, max_new_tokens=2)
    other(tokens(), past_key_values=cache, use_cache=True)
    drop_states(cache)  # empty, it is anybody's
    ours(tokens(), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(("name", "residual_in_fp32"), in_turn([True, False]))
def test_bf16_autocast_is_near(name, residual_in_fp32):
    model, ids = small_model(name, residual_in_fp32=residual_in_fp32), tokens()
    streams = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, given, out: streams.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids, reset=reset_mask()).logits.float()
    assert set(streams) == {torch.float32 if residual_in_fp32 else torch.bfloat16}
    want = model(ids, reset=reset_mask()).logits
    assert (got - want).norm() <= TOLERANCE["bf16"] * want.norm()
