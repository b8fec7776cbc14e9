"""Caches of recurrent states: their length, their rows, and whose they are."""

import pytest
import torch
from small_models import OF_EACH_STATE, close, prefilled, small_model, states, tokens
from tolerances import TOLERANCE
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from lrnn_lm.model import cache as caches
from lrnn_lm.model import copy_states, load_states, save_states
from lrnn_lm.model.cache import check_state, layer_state, make_cache, tokens_seen

SUMS = TOLERANCE["other order of sums"]
LIKE = ["bd_lru", "hybrid", "hybrid-attention-first", "attention", "attention-window"]


@pytest.mark.parametrize("name", LIKE)
@torch.no_grad()
def test_the_length_is_the_tokens_seen(name):
    model, ids = small_model(name), tokens(length=9)
    assert tokens_seen(None) == tokens_seen(make_cache(model.config)) == 0
    cache = DynamicCache(config=model.config)
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        view = make_cache(model.config, cache)
        assert view.layers is cache.layers
        assert view.get_seq_length() == tokens_seen(cache) == start
        model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        assert view.get_seq_length() == tokens_seen(cache) == stop
    assert make_cache(model.config).layers is not cache.layers


@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1])), [1, 0, 1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    ],
    ids=["repeat", "select", "reorder"],
)
@torch.no_grad()
def test_rows_of_a_cache(name, change, rows):
    """What follows is what follows those rows: of states, keys and values alike."""
    model, ids = small_model(name), tokens(length=9)
    cache = make_cache(model.config, prefilled(model, ids[:, :6]))
    change(cache)
    change(make_cache(model.config))  # of nothing nothing is made
    got = model(ids[rows, 6:], past_key_values=cache, use_cache=True).logits
    close(got, model(ids[rows]).logits[:, 6:], SUMS)
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[[0, 1], [4, 2]] = True  # each row's last document goes on
    given = [make_cache(model.config), DynamicCache(config=model.config)]
    if rows == [1, 0]:  # a static cache cannot do the others
        given.append(StaticCache(config=model.config, max_cache_len=12))
    for cache in given:
        model(ids[:, :6], reset=reset[:, :6], past_key_values=cache, use_cache=True)
        change(cache)
        got = model(ids[rows, 6:], past_key_values=cache, use_cache=True).logits
        close(got, model(ids[rows], reset=reset[rows]).logits[:, 6:], SUMS)


@torch.no_grad()
def test_rows_of_a_callers_cache_that_a_graph_wrote_to():
    """A compiled model, which cannot change the class of its caller's cache, breaks its graph to do so."""
    model, ids = small_model("attention", num_hidden_layers=1), tokens(length=9)
    cache = DynamicCache(config=model.config)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]])
    torch.compile(model, backend="eager")(ids[:, :6], position_ids=positions, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    got = model(ids[[1, 0], 6:], past_key_values=cache, use_cache=True).logits
    for row, start in ((1, 4), (0, 2)):
        close(got[row], model(ids[1 - row, start:][None]).logits[0, 6 - start :], SUMS)


@pytest.mark.parametrize("name", OF_EACH_STATE)
@torch.no_grad()
def test_a_cache_that_was_reset_takes_another_batch(name):
    """Of more rows, or of fewer, which would be spread over all that there were."""
    model = small_model(name)
    if "reset" not in vars(DynamicLayer) and {*model.config.layer_types} != {"linear_attention"}:
        pytest.skip("this transformers fills keys with zeros instead of dropping them, for any model")
    cache = DynamicCache(config=model.config)
    for rows in (2, 3, 1):
        ids = tokens(rows, 9, seed=rows)
        cache.reset()
        model(ids[:, :6], past_key_values=cache)
        got = model(ids[:, 6:], past_key_values=cache).logits
        close(got, model(ids).logits[:, 6:], SUMS)


@pytest.mark.parametrize("name", ["bd_lru", "hybrid"])
@torch.no_grad()
def test_cache_position_counts_as_the_cache_does(name):
    model, ids = small_model(name), tokens(length=9)
    cache = DynamicCache(config=model.config)
    for start, stop in ((0, 5), (5, 9)):
        some = {"past_key_values": cache, "use_cache": True}
        for wrong in (torch.arange(start + 1, stop + 1), torch.arange(start, stop - 1)):
            with pytest.raises(ValueError, match=f"cache_position must be {start} .. {stop - 1}, the places"):
                model(ids[:, start:stop], cache_position=wrong, **some)
        got = model(ids[:, start:stop], cache_position=torch.arange(start, stop), **some).logits
    close(got, model(ids).logits[:, 5:], SUMS)


@pytest.mark.parametrize("name", ["attention", "hybrid", "attention-window"])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_positions_go_on_from_those_given(name, static, tmp_path):
    """After positions that do not count from the first token; a cache that is emptied forgets them."""
    model, ids = small_model(name), tokens(length=9)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [7, 8, 3, 4, 5, 6]])
    begins = [3, 2]
    want = torch.cat([model(ids[i : i + 1, n:]).logits[:, 6 - n :] for i, n in enumerate(begins)])
    cache = StaticCache(config=model.config, max_cache_len=16) if static else make_cache(model.config)

    def read():
        model(ids[:, :6], position_ids=positions, past_key_values=cache, use_cache=True)

    def rest(cache, rows=(0, 1)):
        parts = ids[list(rows), 6:].split(1, dim=1)
        return torch.cat([model(p, past_key_values=cache, use_cache=True).logits for p in parts], dim=1)

    read()
    close(rest(copy_states(cache, 2), (0, 0, 1, 1)), want.repeat_interleave(2, dim=0), SUMS)
    save_states(cache, tmp_path / "states", model)
    close(rest(load_states(tmp_path / "states", model)), want, SUMS)
    close(rest(cache), want, SUMS)
    if not static and "reset" not in vars(DynamicLayer):
        return  # transformers 5.17 keeps keys of zeros there, as many as before
    cache.reset()
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([5, 4], dim=1)]
    close(torch.cat(parts, dim=1), model(ids).logits, SUMS)


@torch.no_grad()
def test_positions_go_on_after_padding():
    model, ids = small_model("hybrid"), tokens(length=9)
    mask = torch.ones_like(ids)
    mask[0, 4:6] = mask[1, :2] = 0
    positions = torch.tensor([[5, 6, 7, 8, 0, 0], [1, 1, 3, 4, 5, 6]])
    cache = make_cache(model.config)
    some = {"past_key_values": cache, "use_cache": True}
    model(ids[:, :6], attention_mask=mask[:, :6], position_ids=positions, **some)
    got = model(ids[:, 6:], attention_mask=mask, **some).logits
    close(got, model(ids, attention_mask=mask).logits[:, 6:], SUMS)


@torch.no_grad()
def test_a_state_cannot_be_cut_back():
    model, ids = small_model("attention"), tokens(length=9)
    cache = make_cache(model.config, prefilled(model, ids))
    cache.crop(-3)
    close(model(ids[:, 6:], past_key_values=cache, use_cache=True).logits, model(ids).logits[:, 6:], SUMS)
    cache = model(ids, reset=torch.arange(9).expand(2, 9) == 5, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cut back to before the last document"):
        cache.crop(-5)
    for name in ("bd_lru", "hybrid", "hybrid-attention-first", "attention-window"):
        model = small_model(name)
        with pytest.raises(ValueError, match=r"cannot be cut back .* lrnn_lm.model.copy_states"):
            make_cache(model.config, prefilled(model, ids)).crop(-3)


def test_a_state_is_copied_where_a_gradient_may_need_it():
    """The cache writes over its own."""
    model = small_model("bd_lru")
    cache = prefilled(model, tokens())
    (kept, *_) = states(cache)
    given = layer_state(cache, 0)
    assert torch.equal(given, kept)
    assert given.data_ptr() != kept.data_ptr()
    with torch.no_grad():
        assert layer_state(cache, 0) is kept
    assert layer_state(None, 0) is layer_state(make_cache(model.config), 0) is None


def test_whose_state_it_is():
    check_state(None, 7, 7)
    state = torch.zeros(3, 4, 5)
    check_state(state, 3, 20)
    with pytest.raises(ValueError, match="has 20 numbers where this model has 21; use DynamicCache"):
        check_state(state, 3, 21)
    with pytest.raises(ValueError, match=r"of 3 sequences, the input has 2; .*copy_states\(cache, rep"):
        check_state(state, 2, 20)


@torch.no_grad()
def test_a_state_that_nobody_signed_is_taken_by_its_size():
    """As from a cache that was filled by hand."""
    model, ids = small_model("bd_lru"), tokens(length=9)
    cache = prefilled(model, ids[:, :6])
    for layer in cache.layers:
        del layer.mixer_type
        assert caches.state_mixer(layer) is None
    got = model(ids[:, 6:], past_key_values=cache, use_cache=True).logits
    close(got, model(ids).logits[:, 6:], SUMS)


@torch.no_grad()
def test_whose_keys_they_are():
    """Of attention: two heads of 8, a key and a value a token."""
    model = small_model("attention")
    check_state(make_cache(model.config).layers[0], 7, 7)  # empty, it is anybody's
    layer = prefilled(model, tokens(rows=2)).layers[0]
    check_state(layer, 2, 32)
    with pytest.raises(ValueError, match="has 32 numbers where this model has 33"):
        check_state(layer, 2, 33)
    with pytest.raises(ValueError, match="states of 2 sequences, the input has 3"):
        check_state(layer, 3, 32)


@torch.no_grad()
def test_caches_of_other_layers_are_refused():
    ids = tokens()
    recurrent, attention, hybrid = (small_model(name) for name in ("bd_lru", "attention", "hybrid"))
    with pytest.raises(ValueError, match="past_key_values is a tuple, not a cache; use DynamicCache"):
        recurrent(ids, past_key_values=((ids, ids),), use_cache=True)
    keys = prefilled(attention, ids)
    for model in (recurrent, hybrid):
        with pytest.raises(ValueError, match=r"3 layers \(recurrent layers take no keys and values"):
            model(ids, past_key_values=keys, use_cache=True)
    for model, cache in ((attention, prefilled(recurrent, ids)), (hybrid, prefilled(recurrent, ids))):
        with pytest.raises(ValueError, match="fit this model's 3 layers; use DynamicCache"):
            model(ids, past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_documents_are_remembered_by_attention_alone():
    model, ids = small_model("hybrid"), tokens()
    cache = prefilled(model, ids)
    assert [caches.notes_of(layer).get("document_start") for layer in cache.layers] == [None] * 3
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[0, 4], reset[1, [2, 7]] = True, True
    cache = model(ids, reset=reset, use_cache=True).past_key_values
    found = [caches.notes_of(layer).get("document_start") for layer in cache.layers]
    assert found[1].tolist() == [4, 7]
    assert found[0] is found[2] is None
    assert [caches.state_mixer(layer) for layer in cache.layers] == ["bd_lru", None, "h_lru"]
    assert [caches.state_mixer(layer) for layer in make_cache(model.config).layers] == [None] * 3


@pytest.mark.parametrize("name", LIKE)
@torch.no_grad()
def test_the_last_document_goes_on_by_itself(name):
    """Its first token is seen, the last of the document before is not; a new document sees neither."""
    model, ids, more = small_model(name), tokens(), tokens(length=4, seed=5)
    for starts in ([4, 20], [20, 0], [19, 1]):
        reset = torch.zeros_like(ids, dtype=torch.bool)
        reset[[0, 1], starts] = True
        for again in (None, 1):
            later = None if again is None else torch.arange(4).expand(2, 4) == again
            cache = model(ids, reset=reset, use_cache=True).past_key_values
            got = model(more, reset=later, past_key_values=cache, use_cache=True).logits
            got = torch.cat([got, model(more, past_key_values=cache, use_cache=True).logits], dim=1)
            for row, start in enumerate(starts):
                parts = [ids[row, start:], more[row, : again or 0], more[row, again or 0 :], more[row]]
                documents = [parts] if again is None else [parts[:2], parts[2:]]
                alone = [model(torch.cat(document)[None]).logits[0] for document in documents]
                close(got[row], torch.cat(alone)[-8:], SUMS)
