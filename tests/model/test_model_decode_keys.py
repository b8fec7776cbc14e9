"""Decoding steps of models with attention: keys with room for tokens to come, and caches that stay true."""

import copy
import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import pytest
import torch
from small_models import close, plain, prefilled, small_model, tokens
from tolerances import TOLERANCE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from lrnn_lm.model import copy_states
from lrnn_lm.model.cache import tokens_seen
from lrnn_lm.model.decoding import decode, generation, memory, prefix, step
from lrnn_lm.model.decoding.decode import Decoder, can_decode, decode_step, fused_obstacle
from lrnn_lm.model.states import drop_states, tensors_of

SUMS = TOLERANCE["other order of sums"]
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
NAMES = ["hybrid", "attention", "attention-qk-norm", "attention-grouped"]
NOT_TURNED = [{"type": "lstm", "width": 9}, {"type": "attention", "num_heads": 2, "use_rope": False}]
TWO_BASES = [{"type": "attention", "num_heads": 2, "rope_theta": theta} for theta in (100.0, 1e4)]
MODELS = {
    **{name: (name, {}) for name in NAMES},
    "not turned": ("hybrid", {"layer_pattern": NOT_TURNED}),
    "two bases": ("hybrid", {"layer_pattern": [*TWO_BASES, {"type": "min_gru", "width": 9}]}),
    "repeated": ("hybrid", {"repeat": 2}),
    "initial states": ("hybrid", {"learn_initial_state": True}),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def build(name):
    base, changes = MODELS[name]
    return small_model(base, **changes)


@pytest.fixture
def steps(monkeypatch):
    """The columns and the graph of each step of our own."""
    calls, one_step = [], step.DecodeStep.__call__

    def noted(self, *args):
        logits, token = one_step(self, *args), self.memory.token
        calls.append((token.mask.shape[-1], self.memory.graph is not None))
        return logits

    monkeypatch.setattr(step.DecodeStep, "__call__", noted)
    return calls


@pytest.fixture
def small_buffers(monkeypatch):
    """Of 8 columns, then 16, 24, ..: a few tokens fill them."""
    monkeypatch.setattr(memory, "LEAST", 8)


def same(ours, theirs, tolerance=SUMS):
    """Two caches, tensor for tensor."""
    assert tokens_seen(ours) == tokens_seen(theirs)
    tables = tensors_of(ours), tensors_of(theirs)
    assert list(tables[0]) == list(tables[1])
    for name, want in tables[1].items():
        close(tables[0][name], want, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_steps_are_the_forward_pass(name, dtype):
    """Logits, states, keys and lengths after each token."""
    model, ids = build(name).to(dtype), tokens(length=12)
    tolerance = {torch.float32: SUMS, torch.float64: 1e-12, torch.bfloat16: 0.3}[dtype]
    ours, theirs = prefilled(model, ids[:, :8]), prefilled(model, ids[:, :8])
    one_step = decode_step(model, ours)
    for t in range(8, 12):
        want = plain(model, ids[:, t : t + 1], theirs)
        close(one_step(model, ids[:, t : t + 1], ours), want, tolerance)
        same(ours, theirs, tolerance)
        assert ours.get_seq_length(next(i for i, kind in enumerate(model.config.layer_types)
                                        if kind == "full_attention")) == t + 1  # fmt: skip


class Operations(TorchDispatchMode):
    """Names of operations, and shapes and places of the tensors they are given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.seen.append((str(function), [tuple(t.shape) for t in tensors]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_step_can_be_captured(name):
    """It asks the device for no number, takes none from the host, and has the same shapes for each token."""
    model, ids = build(name), tokens(length=12)
    cache, seen = prefilled(model, ids[:, :8]), []
    one_step = decode_step(model, cache)
    for t in range(8, 12):
        one_step(model, ids[:, t : t + 1], cache)
        with Operations() as operations:
            one_step.forward(model)
        cache, seen = prefilled(model, ids[:, : t + 2]), [*seen, operations.seen]
    assert seen[0] == seen[1] == seen[2] == seen[3]
    names = {name for name, _ in seen[0]}
    assert "aten.index_copy_.default" in names
    forbidden = (
        "_local_scalar_dense",
        "is_nonzero",
        "nonzero",
        "lift_fresh",
        "equal.default",
        "unique",
        "masked_select",
    )
    assert not [name for name in names for part in forbidden if part in name]


def masked(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"attention_mask": mask}


def packed(ids):
    """Two documents in a row, of which the second goes on; in one row with a jump ahead."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 40]])
    return {"position_ids": positions, "attention_mask": torch.ones_like(ids)}


PROMPTS = {"plain": lambda ids: {}, "padded": masked, "packed": packed}
LOOPS = {  # ours, which is for what is usual, and transformers'
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.7, "top_k": 20},
    "transformers'": {"do_sample": False, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", MODELS)
def test_generate_decodes_through_them(name, prompt, loop, device, steps, small_buffers):
    """Past the end of two buffers."""
    model, ids = build(name).to(device), tokens(length=7).to(device)
    given = {key: value.to(device) for key, value in PROMPTS[prompt](ids.cpu()).items()}
    texts = []
    for disable in (False, True):
        torch.manual_seed(3)
        options = {**GREEDY, **LOOPS[loop], **given, "max_new_tokens": 14, "disable_compile": disable}
        texts.append(model.generate(ids, **options))
    # Every token but the first, which is the prefill's.
    assert steps == [(columns, device == "cuda") for columns in (8, *[16] * 8, *[24] * 4)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["hybrid", "attention"])
def test_our_loop_takes_them(name, monkeypatch):
    """Without waiting for each token; but not with a cache that the caller keeps, or that is static."""
    calls, sample = [], generation.sample
    monkeypatch.setattr(generation, "sample", lambda *args: calls.append(1) or sample(*args))
    model, ids = small_model(name), tokens(length=6)
    want = model.generate(ids, **GREEDY)
    assert calls == [1]
    kept = DynamicCache(config=model.config)
    for options in ({"past_key_values": kept}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, **options, **GREEDY), want)
    again = torch.cat([want, tokens(length=1)], dim=1)
    model.generate(again, past_key_values=kept, **GREEDY)
    assert kept.get_seq_length(1) == 15 + 1 + 8
    returned = model.generate(ids, return_dict_in_generate=True, **GREEDY).past_key_values
    assert torch.equal(model.generate(again, past_key_values=returned, **GREEDY)[:, :16], again)
    assert returned.get_seq_length(1) == 15 + 1 + 8
    assert calls == [1]


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


def with_warning(one_step, model, ids, cache):
    """Where there is no GPU, the first capture says that it failed."""
    if model.device.type == "cuda":
        return one_step(model, ids, cache)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        return one_step(model, ids, cache)


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


def test_what_a_step_cannot_write_goes_the_plain_way(steps):
    """Windows, static and offloaded caches; modules that were changed; what is to be looked at."""
    ids = tokens(length=6)
    assert not can_decode(small_model("attention-window"))
    assert not can_decode(small_model("hybrid-attention-first"))
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert "as plain layers" in fused_obstacle(small_model("hybrid"), 1)
    model = small_model("hybrid")
    want = model.generate(ids, **GREEDY)
    assert len(steps) == 8
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), want)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), want)
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True
    assert not memory.can_hold(offloaded)
    looked_at = {"output_hidden_states": True, "return_dict_in_generate": True}
    assert len(small_model("hybrid").generate(ids, **looked_at, **GREEDY).hidden_states) == 9
    eager = small_model("hybrid")
    eager.set_attn_implementation("eager")
    assert not can_decode(eager)
    out = eager.generate(ids, output_attentions=True, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, want)
    assert [each[0].shape[-1] for each in out.attentions] == list(range(6, 15))
    assert len(steps) == 8


@pytest.mark.parametrize("place", ["mixer", "mixer.q_proj", "mixer.out_proj", "mixer.k_norm"])
def test_a_hooked_part_of_attention_is_called(place, steps):
    model, ids, calls = small_model("attention-qk-norm"), tokens(length=6), []
    want = model.generate(ids, **GREEDY)
    steps.clear()
    model.model.layers[1].get_submodule(place).register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(ids, **GREEDY), want)
    assert not steps
    assert len(calls) == 9


@torch.no_grad()
def test_keys_of_another_dtype_are_the_models_to_read(monkeypatch):
    """As autocast left them: the forward pass widens them, and steps go on from there."""
    model, ids = small_model("hybrid"), tokens(length=8)
    caches = [prefilled(model, ids[:, :6]) for _ in range(2)]
    for cache in caches:
        layer = cache.layers[1]
        layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
    decoder = Decoder(model)
    for t, settled in ((6, False), (7, True)):
        got = decoder(ids[:, t : t + 1], past_key_values=caches[0], use_cache=True).logits
        close(got, plain(model, ids[:, t : t + 1], caches[1]), SUMS)
        assert decoder.settled(caches[0]) == settled


@torch.no_grad()
def test_a_row_that_begins_late():
    """A row of padding alone has no state yet: its first token starts it, and the step after is ours."""
    model, ids = small_model("hybrid"), tokens(length=7)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    decoder = Decoder(model)
    for t in (4, 5, 6):
        asked = {"past_key_values": cache, "attention_mask": mask[:, : t + 1], "use_cache": True}
        got = decoder(ids[:, t : t + 1], **asked).logits
        close(got[0], model(ids[:1, 4 : t + 1]).logits[0, -1:], SUMS)
        close(got[1], model(ids[1:, : t + 1]).logits[0, -1:], SUMS)
        assert decoder.settled(cache) == (t > 4)


def test_a_static_cache_is_transformers_to_compile(monkeypatch):
    """On a GPU: our step cannot write it, so transformers gets to compile the forward pass."""
    compiled = []
    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", lambda *_: True)
    monkeypatch.setattr(
        PreTrainedModel, "get_compiled_call", lambda self, config: compiled.append(config) or self.__call__
    )
    model, ids = small_model("hybrid"), tokens(length=6)
    want = model.generate(ids, **GREEDY)
    assert compiled == []
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), want)
    assert len(compiled) == 1


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cuda_graph(name, dtype):
    model, ids = build(name).to("cuda", dtype), tokens(length=12).cuda()
    ours, theirs = prefilled(model, ids[:, :8]), prefilled(model, ids[:, :8])
    one_step = decode_step(model, ours)
    for t in range(8, 12):
        want = plain(model, ids[:, t : t + 1], theirs)
        close(one_step(model, ids[:, t : t + 1], ours), want, SUMS if dtype == torch.float32 else 0.3)
    assert one_step.memory.graph is not None
    same(ours, theirs, SUMS if dtype == torch.float32 else 0.3)


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
