"""The decoding step: the same numbers as the forward pass, and caches that stay true whoever reads them."""

import pytest
import torch
from small_models import RECURRENT, close, plain, prefilled, small_model, states, tokens
from tolerances import TOLERANCE
from transformers import CompileConfig, DynamicCache

from lrnn_lm.model import copy_states
from lrnn_lm.model.cache import tokens_seen
from lrnn_lm.model.decoding import memory, step
from lrnn_lm.model.decoding.decode import Decoder, can_decode, decode_step, has_tiles
from lrnn_lm.model.states import tensors_of

SUMS = TOLERANCE["other order of sums"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_steps_are_the_forward_pass(name):
    model, ids = small_model(name), tokens(length=12)
    ours, theirs = prefilled(model, ids[:, :8]), prefilled(model, ids[:, :8])
    one_step = decode_step(model, ours)
    for t in range(8, 12):
        want = plain(model, ids[:, t : t + 1], theirs)
        assert torch.equal(one_step(model, ids[:, t : t + 1], ours), want)
        for a, b in zip(states(ours), states(theirs), strict=True):
            assert torch.equal(a, b)
        assert tokens_seen(ours) == tokens_seen(theirs) == t + 1


def test_amd_gpus_do_without_what_is_nvidias(monkeypatch):
    """Nothing here has run on one (docs/gpu.md)."""
    model = small_model("bd_lru").bfloat16()
    assert has_tiles(model)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not has_tiles(model)
    device = pytest.importorskip("lrnn_lm.kernels.triton_device", reason="needs Triton")
    monkeypatch.setattr(device, "INTERPRETED", False)
    assert not device.starts_early(torch.device("cuda"))


@torch.no_grad()
def test_a_step_outlives_inference_mode():
    """Its states are written outside of it as well as inside."""
    model, ids = small_model("bd_lru"), tokens(length=4)
    with torch.inference_mode():
        want = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), want)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, **GREEDY), want)


@pytest.mark.parametrize("name", ["bd_lru-all", "h_lru", "lstm", "hybrid"])
def test_generate_decodes_through_it(name, monkeypatch):
    model, ids = small_model(name), tokens(length=6)
    calls, one_step = [], step.DecodeStep.__call__
    monkeypatch.setattr(step.DecodeStep, "__call__", lambda *args: calls.append(1) or one_step(*args))
    got = model.generate(ids, **GREEDY)
    assert len(calls) == 5, "every token but the first, which is the prefill's"
    assert torch.equal(got, model.generate(ids, disable_compile=True, **GREEDY))
    assert len(calls) == 5


@pytest.mark.parametrize("way", ["greedy", "sampled", "top"])
@pytest.mark.parametrize("ends", [None, [3, 11, 17, 29, 41, 44], [5]], ids=str)
def test_our_loop_writes_what_transformers_does(way, ends):
    """Rows that end at different times, padded prompts, streams: token for token, sampled ones too."""
    options = {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "temperature": 1.7},
        "top": {"do_sample": True, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    }[way]
    options |= {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": ends}
    for name, rows, length in (("bd_lru", 1, 6), ("bd_lru", 3, 4), ("hybrid", 3, 6)):
        model, ids = small_model(name), tokens(rows=rows, length=length)
        mask = torch.ones_like(ids)
        mask[0, : length - 2] = 0
        texts, streams = [], []
        for disable in (False, True):
            streamer = TokenStream() if rows == 1 else None
            torch.manual_seed(3)
            texts.append(
                model.generate(
                    ids, attention_mask=mask, disable_compile=disable, streamer=streamer, **options
                )
            )
            streams.append(streamer and streamer.seen)
        assert torch.equal(*texts)
        assert streams[0] == streams[1]


class TokenStream:
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.flatten().tolist())

    def end(self):
        self.seen.append("end")


@torch.no_grad()
def test_caches_take_turns():
    """One step, several caches: each goes on from its own text, and a copy is a copy."""
    model, ids = small_model("bd_lru"), tokens(rows=3, length=10)
    caches = [prefilled(model, ids[i : i + 1, :5]) for i in range(3)]
    one_step = decode_step(model, caches[0])
    kept = copy_states(caches[0])
    for t in range(5, 9):
        for i in (0, 1, 2):
            if not (i == 1 and t == 8):
                one_step(model, ids[i : i + 1, t : t + 1], caches[i])
        if t == 7:
            copied = copy_states(caches[1])
    del caches[2]
    one_step(model, ids[1:2, 8:9], caches[1])
    for cache, upto, row in ((caches[0], 9, 0), (caches[1], 9, 1), (kept, 5, 0), (copied, 8, 1)):
        assert tokens_seen(cache) == upto
        for got, want in zip(states(cache), states(prefilled(model, ids[row : row + 1, :upto])), strict=True):
            close(got, want, SUMS)
    want = plain(model, ids[:1, 9:], prefilled(model, ids[:1, :9]))
    close(plain(model, ids[:1, 9:], caches[0]), want, SUMS)  # and the forward pass goes on from any of them


@pytest.mark.parametrize(
    ("name", "joints"), [("bd_lru", 6), ("h_lru", 6), ("lstm", 3), ("hybrid", 5), ("attention-grouped", 3)]
)
@pytest.mark.parametrize("first", [8, 11])
@torch.no_grad()
def test_a_graph_is_the_step(name, joints, first, monkeypatch):
    """With CUDA's graph replaced by calls: what warms up is undone, and joint weights change no number.

    Keys have room for 12 tokens, so a capture may find room for one more.
    """
    monkeypatch.setattr(memory, "LEAST", 12)
    model, ids = small_model(name), tokens(length=12)
    ours, theirs = prefilled(model, ids[:, :first]), prefilled(model, ids[:, :first])
    ours_step = decode_step(model, ours, capture=True)
    replayed = []

    class Graph:
        def replay(self):
            replayed.append(1)
            ours_step.memory.logits = ours_step.forward(model)

    fakes = {"stream": _Nothing, "graph": _Nothing, "CUDAGraph": Graph}
    for attribute, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, attribute, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(step, "_capture_stream", _Stream)
    for t in range(first, 12):
        want = plain(model, ids[:, t : t + 1], theirs)
        close(ours_step(model, ids[:, t : t + 1], ours), want, SUMS)
    for key, want in tensors_of(theirs).items():
        close(tensors_of(ours)[key], want, SUMS)
    assert len(replayed) == 12 - first
    assert sum(one is not None for pair in ours_step.memory.joint for one in pair) == joints


class _Stream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        assert isinstance(other, _Stream)


class _Nothing:
    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@pytest.mark.parametrize("name", ["bd_lru", "hybrid"])
@torch.no_grad()
def test_without_a_graph_it_still_decodes(name):
    if torch.cuda.is_available():
        pytest.skip("capturing works here")
    model, ids = small_model(name), tokens(length=8)
    cache, other = prefilled(model, ids[:, :7]), prefilled(model, ids[:, :7])
    one_step = decode_step(model, cache, capture=True)
    with pytest.warns(UserWarning, match="without a CUDA graph: there are none on cpu"):
        got = one_step(model, ids[:, 7:], cache)
    close(got, plain(model, ids[:, 7:], other), SUMS)


def test_what_a_step_does_not_know_goes_the_plain_way():
    ids = tokens(length=6)
    assert not can_decode(small_model("bd_lru").train())
    hooked = small_model("bd_lru")
    seen = []
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert not can_decode(hooked)
    hooked.generate(ids, **GREEDY)
    assert len(seen) == 6
    model = small_model("bd_lru")
    out = model.generate(ids, output_hidden_states=True, return_dict_in_generate=True, **GREEDY)
    assert len(out.hidden_states) == 6
    assert all(len(layers) == 4 for layers in out.hidden_states)


@pytest.mark.parametrize("name", ["bd_lru", "hybrid"])
@torch.no_grad()
def test_a_row_that_begins_late(name):
    """A row of padding alone has no state yet: its first token starts it, and the step after is ours."""
    model, ids = small_model(name), tokens(length=7)
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


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_compiled_forward_that_is_asked_for(everywhere):
    """`compile_config` has transformers compile the forward pass, where it would for other models."""
    torch.compiler.reset()
    model, ids = small_model("bd_lru", num_hidden_layers=1), tokens(length=6)
    config = CompileConfig(backend="aot_eager", fullgraph=True)
    config._compile_all_devices = everywhere
    assert torch.equal(model.generate(ids, compile_config=config, **GREEDY), model.generate(ids, **GREEDY))
    assert hasattr(model, "_compiled_call") == everywhere


def test_a_given_cache_comes_back_continued():
    model, ids = small_model("h_lru"), tokens(length=6)
    cache = DynamicCache(config=model.config)
    out = model.generate(ids, past_key_values=cache, **GREEDY)
    want = prefilled(model, out[:, :-1])
    for got, state in zip(states(cache), states(want), strict=True):
        close(got, state, SUMS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bd_lru", "h_lru", "lstm", "mamba2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [None, False])
@torch.no_grad()
def test_cuda_graph(name, dtype, fused):
    model, ids = small_model(name).to("cuda", dtype), tokens(length=12).cuda()
    ours, theirs = prefilled(model, ids[:, :8]), prefilled(model, ids[:, :8])
    one_step = decode_step(model, ours, fused=fused)
    assert one_step.fused == (fused is None and name in ("bd_lru", "h_lru"))
    for t in range(8, 12):
        want = plain(model, ids[:, t : t + 1], theirs)
        close(one_step(model, ids[:, t : t + 1], ours), want, SUMS if dtype == torch.float32 else 0.3)
    assert one_step.memory.graph is not None
    if dtype == torch.float32:
        assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids, disable_compile=True, **GREEDY))
