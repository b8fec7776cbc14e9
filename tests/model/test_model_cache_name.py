"""The argument and output that transformers 5.24 renames: `past_key_values` is also `cache`, everywhere."""

import inspect

import pytest
import torch
from small_models import close, small_model, tokens
from tolerances import TOLERANCE

from lrnn_lm.model.cache import CACHE, make_cache


def test_a_model_takes_both_names():
    model, ids = small_model("bd_lru"), tokens(length=9)
    for name in ("past_key_values", "cache"):
        for part in (model, model.model):
            given = {name: make_cache(model.config), "use_cache": True}
            part(ids[:, :5], **given)
            got = part(ids[:, 5:], **given)
            assert getattr(got, CACHE) is given[name]
            close(got[0], part(ids, use_cache=False)[0][:, 5:], TOLERANCE["other order of sums"])


def test_two_caches_are_refused():
    model, ids = small_model("attention"), tokens(length=9)
    one, other = make_cache(model.config), make_cache(model.config)
    for part in (model, model.model):
        with pytest.raises(ValueError, match="these are two caches; pass one"):
            part(ids, past_key_values=one, cache=other)
        part(ids, past_key_values=one, cache=one)


def test_generate_goes_on_from_a_cache_of_the_name_in_use():
    model, ids = small_model("bd_lru"), tokens(length=9)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cache = getattr(model(ids[:, :5], use_cache=True), CACHE)
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **{CACHE: cache}, **options), want)
    assert "cache" in inspect.signature(model.forward).parameters  # 5.24 looks for it
