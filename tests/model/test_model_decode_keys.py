"""Decoding steps of models with attention, whose keys have room for tokens to come."""

import os

import pytest
import torch
from decoding_models import DEVICES, GREEDY, MODELS, PROMPTS, SUMS, build, same
from small_models import close, plain, prefilled, small_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from lrnn_lm.model.decoding import generation, memory
from lrnn_lm.model.decoding.decode import Decoder, can_decode, decode_step, fused_obstacle


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
