"""Caches of models with attention stay true, whatever decoding steps and others do with them."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import pytest
import torch
from decoding_models import DEVICES, GREEDY, PROMPTS, SUMS, build, same
from small_models import close, plain, prefilled, small_model, tokens, with_warning

from lrnn_lm.model import copy_states
from lrnn_lm.model.decoding import decode, memory, prefix, step
from lrnn_lm.model.decoding.decode import decode_step
from lrnn_lm.model.states import drop_states


@pytest.mark.filterwarnings("ignore:decoding without a CUDA graph")
@pytest.mark.parametrize("name", ["hybrid", "attention"])
def test_memories_are_lent_and_given_back(name, steps, small_buffers, monkeypatch):
    """As on a GPU: the pool's, which the next call is lent."""
    monkeypatch.setattr(decode, "decode_step", partial(decode_step, capture=True))
    model = build(name)
    prompts = [tokens(length=length, seed=length) for length in (7, 5, 7, 11)]
    want = [model.generate(ids, disable_compile=True, **GREEDY) for ids in prompts]
    for _ in range(2):
        assert all(torch.equal(model.generate(i, **GREEDY), w) for i, w in zip(prompts, want, strict=True))
    memories = decode._pools[model]._memories
    assert {m.token.mask.shape[-1] for m in memories} == {8, 16, 24}
    assert len(memories) == 3
    assert not any(m.lent for m in memories)
    with ThreadPoolExecutor(6) as pool:
        got = [pool.submit(model.generate, ids, **GREEDY) for _ in range(4) for ids in prompts]
    assert all(torch.equal(g.result(), w) for g, w in zip(got, want * 4, strict=True))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ["hybrid", "attention-grouped"])
@torch.no_grad()
def test_a_returned_cache_goes_on(name, prompt, steps, small_buffers):
    """By a forward pass, and by `generate` again; whoever is lent the step's memory meanwhile."""
    model, ids = build(name), tokens(length=7)
    given = PROMPTS[prompt](ids)
    caches, texts = [], []
    for disable in (False, True):
        out = model.generate(ids, return_dict_in_generate=True, disable_compile=disable, **GREEDY, **given)
        caches.append(out.past_key_values)
        texts.append(out.sequences)
        model.generate(tokens(length=5, seed=9), **GREEDY)
    assert torch.equal(*texts)
    same(*caches)
    mask = given.get("attention_mask", torch.ones_like(ids))
    whole = torch.cat([mask, mask.new_ones(2, 2 + 8)], dim=1)
    asked = torch.cat([texts[0], tokens(length=1, seed=4)], dim=1)
    for of_forward in (True, False):
        got = []
        for cache in map(copy.deepcopy, caches):
            if of_forward:
                new = {"attention_mask": whole, "past_key_values": cache, "use_cache": True}
                got.append(model(asked[:, -2:], **new).logits)
            else:
                steps.clear()
                got.append(model.generate(asked, attention_mask=whole, past_key_values=cache, **GREEDY))
                assert len(steps) == 8
        close(*got, SUMS if of_forward else 0)


@pytest.mark.parametrize("name", ["hybrid", "attention"])
@torch.no_grad()
def test_caches_take_turns(name):
    """One step, several caches: each goes on from its own text, and a copy is a copy."""
    model, ids = build(name), tokens(rows=3, length=10)
    caches = [prefilled(model, ids[i : i + 1, : 5 + i]) for i in range(3)]
    one_step, kept = decode_step(model, caches[0]), copy_states(caches[0])
    for t in range(3):
        for i, cache in enumerate(caches):
            one_step(model, ids[i : i + 1, 5 + i + t : 6 + i + t], cache)
            if t == 1:
                plain(model, ids[:1, :1], copy_states(cache))
    for i, cache in enumerate(caches):
        same(cache, prefilled(model, ids[i : i + 1, : 8 + i]))
    same(kept, prefilled(model, ids[:1, :5]))


@torch.no_grad()
def test_whatever_else_is_done_with_a_cache():
    """Between steps: cut, reordered, fed to a forward pass, emptied and filled again."""
    model, ids = build("attention"), tokens(length=12)
    cache = prefilled(model, ids[:, :6])
    one_step = decode_step(model, cache)
    one_step(model, ids[:, 6:7], cache)
    cache.crop(-3)
    one_step(model, ids[:, 4:5], cache)
    same(cache, prefilled(model, ids[:, :5]))
    plain(model, ids[:, 5:8], cache)
    one_step(model, ids[:, 8:9], cache)
    same(cache, prefilled(model, ids[:, :9]))
    cache.reorder_cache(torch.tensor([1, 0]))
    one_step(model, ids[[1, 0], 9:10], cache)
    same(cache, prefilled(model, ids[[1, 0], :10]))
    drop_states(cache)
    plain(model, ids[:, :3], cache)
    one_step(model, ids[:, 3:4], cache)
    same(cache, prefilled(model, ids[:, :4]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("most", [0, 2**20])
@torch.no_grad()
def test_a_cache_outlives_its_step(most, cut, device, monkeypatch):
    """Whoever has the memory next; and buffers beyond a limit are not kept for a next call."""
    monkeypatch.setattr(step, "KEPT_KEYS", most)
    model, ids = small_model("attention").to(device), tokens().to(device)
    pool, first, second = step.Pool(), prefilled(model, ids[:, :6]), prefilled(model, ids[:, 4:9])
    one_step = decode_step(model, first, pool, capture=True)
    with_warning(one_step, model, ids[:, 6:7], first)
    if cut:
        first.crop(-cut)  # what is left is a part of the step's memory
    used, buffers = one_step.memory, weakref.ref(one_step.memory.states[1])
    del one_step
    assert (used.key is None) == (most == 0) == (buffers() is None)
    one_step = decode_step(model, second, pool, capture=True)
    assert (one_step.memory is used) == (most > 0)
    for buffer in one_step.memory.keys:
        buffer.fill_(torch.nan)  # as an earlier call with other weights may have left it
    (one_step if most else partial(with_warning, one_step))(model, ids[:, 9:10], second)
    same(first, prefilled(model, ids[:, : 7 - cut]))
    same(second, prefilled(model, ids[:, 4:10]))


@torch.no_grad()
def test_each_layer_frees_what_it_held_before():
    """Else a long text would take twice the memory of its keys while a step begins or gets more room."""
    model = small_model("attention")
    cache = prefilled(model, tokens(length=8))
    freed, before = [], [weakref.ref(layer.keys) for layer in cache.layers]
    take = memory.Keys.take

    def noted(self, layer):
        freed.append([keys() is None for keys in before])
        take(self, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory.Keys, "take", noted)
        one_step = decode_step(model, cache)
        assert one_step.memory.keys == []
        one_step(model, tokens(length=1), cache)
    assert freed == [[False] * 3, [True, False, False], [True, True, False]]


def test_columns_are_a_quarter_more_at_a_time():
    sizes = sorted({memory.columns(n) for n in range(20_000)})
    assert sizes[0] == 256
    assert all(size % 64 == 0 for size in sizes)
    assert all(256 <= b - a <= max(256, a / 4) for a, b in pairwise(sizes))
    assert all(memory.columns(size - 1) == size < memory.columns(size) for size in sizes[:-1])


@torch.no_grad()
def test_a_prefix_cache_keeps_keys_of_its_own(steps):
    model = small_model("hybrid")
    model.config.prefix_cache_bytes = 2**20
    ids, text = tokens(rows=1, length=80), []
    for _ in range(2):
        text.append(model.generate(ids, **GREEDY))
    assert torch.equal(*text)
    assert len(steps) == 16
    kept = [key for each in prefix._caches[model]._texts for key in each.keys.values()]
    assert kept
    assert all(key.untyped_storage().nbytes() == key.nbytes for key in kept), "no views of a step's memory"


@pytest.mark.gpu
@torch.no_grad()
def test_buffers_beyond_the_limit_are_freed(monkeypatch):
    """After each call, whatever the pool keeps."""
    monkeypatch.setattr(step, "KEPT_KEYS", 0)
    model, ids = small_model("hybrid").cuda(), tokens(length=6).cuda()
    want = model.generate(ids, **GREEDY)
    gc.collect()
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        assert torch.equal(model.generate(ids, **GREEDY), want)
    gc.collect()
    assert torch.cuda.memory_allocated() <= held
    assert all(m.key is None for m in decode._pools[model]._memories)
