"""Calls of `generate` at the same time, one inside another, and after one that failed: exact texts."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from small_models import close, prefilled, small_model, states, tokens, with_warning
from tolerances import TOLERANCE
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from lrnn_lm.model.decoding import step
from lrnn_lm.model.decoding.decode import decode_step

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WAYS = {
    "our loop": {},
    "transformers' loop": {"repetition_penalty": 1.2},
    "beams": {"num_beams": 2},
    "static": {"cache_implementation": "static"},
}
ROWS = [*((name, way) for name in ("bd_lru", "hybrid") for way in WAYS), ("lstm", "our loop"),
        ("attention", "our loop")]  # fmt: skip


def on(device, name):
    return small_model(name).to(device)


def prompts(model, count=8):
    """Of different rows and lengths: some share a step's shape, some do not."""
    return [tokens(1 + i % 2, 3 + i % 3, seed=i).to(model.device) for i in range(count)]


def write(model, ids, **options):
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, **options}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return (out if isinstance(out, torch.Tensor) else out.sequences).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "way"), ROWS)
def test_threads(name, way, device):
    if (name, way, device) == ("hybrid", "static", "cuda"):
        pytest.skip("transformers compiles it there, as for any model: it takes minutes")
    model = on(device, name)
    want = [write(model, ids, **WAYS[way]) for ids in prompts(model)]
    assert len({str(text) for text in want}) == len(want)
    assert not hasattr(model, "_compiled_call")  # transformers compiles only for who asks
    with ThreadPoolExecutor(16) as pool:
        got = [pool.submit(write, model, ids, **WAYS[way]) for _ in range(2) for ids in prompts(model)]
    assert [future.result() for future in got] == want * 2


POOL = 32  # streams that torch hands out in turn


def on_streams(model, calls, workers=16):
    """Each prompt's text in turn, every call in a stream of its own."""

    def alone(ids):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.default_stream())
            return write(model, ids, max_new_tokens=12)

    with ThreadPoolExecutor(workers) as pool:
        got = [pool.submit(alone, prompts(model)[i % 8]) for i in range(calls)]
    return [future.result() for future in got]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "fused"),
    [("bd_lru", True), ("h_lru", True), ("bd_lru", False), ("lstm", False), ("hybrid", False)],
)
def test_threads_with_streams_of_their_own(name, fused, monkeypatch):
    """Of more calls than torch has streams, and with two shapes, so that steps are captured all the time."""
    if not fused:
        monkeypatch.setattr("lrnn_lm.model.decoding.decode.fused_obstacle", lambda *_: "not in this test")
    model, calls = on("cuda", name), 10 * POOL
    want = [write(model, ids, max_new_tokens=12) for ids in prompts(model)]
    got = on_streams(model, calls)
    wrong = [i for i in range(calls) if got[i] != want[i % 8]]
    assert not wrong


@pytest.mark.gpu
def test_models_with_streams_of_their_own():
    """Their graphs share the workspace of cuBLAS."""
    models = [on("cuda", "lstm"), on("cuda", "mamba2"), on("cuda", "hybrid")]
    want = [[write(model, ids, max_new_tokens=12) for ids in prompts(model)] for model in models]
    with ThreadPoolExecutor(3) as pool:
        got = [pool.submit(on_streams, model, 2 * POOL, 4) for model in models]
    assert [future.result() for future in got] == [texts * (2 * POOL // 8) for texts in want]


@pytest.mark.gpu
def test_nobody_else_has_the_stream_of_captures():
    device = on("cuda", "bd_lru").device
    stream = step._capture_stream(device)
    assert stream == step._capture_stream(device)
    handed_out = [torch.cuda.Stream(device, priority) for priority in (0, -1) for _ in range(2 * POOL)]
    assert stream.cuda_stream not in {one.cuda_stream for one in handed_out}
    assert stream.cuda_stream not in (0, torch.cuda.default_stream(device).cuda_stream)


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch):
    """The text is right, the stream is the caller's again, and random numbers are drawn."""
    model, device = on("cuda", "bd_lru"), torch.device("cuda")
    want = model.generate(tokens(1, 5).cuda(), max_new_tokens=9, do_sample=False)
    forward = step.DecodeStep.forward

    def asks(self, model):
        logits = forward(self, model)
        assert bool(logits.isfinite().all())
        return logits

    monkeypatch.setattr(step.DecodeStep, "forward", asks)
    stream, model = torch.cuda.current_stream(), on("cuda", "bd_lru")
    torch.manual_seed(1)
    drawn = torch.rand(4, device=device)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert torch.equal(model.generate(tokens(1, 5).cuda(), max_new_tokens=9, do_sample=False), want)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.rand(4, device=device), drawn)
    assert model.generate(tokens(1, 5).cuda(), max_new_tokens=9, do_sample=True).shape[1] == want.shape[1]


@pytest.mark.gpu
def test_threads_that_draw_while_others_capture():
    """A capture forbids other threads to draw random numbers: the two take turns."""
    model = on("cuda", "bd_lru")
    with ThreadPoolExecutor(8) as pool:
        got = [pool.submit(write, model, tokens(1 + i % 6, 4).cuda(), do_sample=True) for i in range(96)]
    assert all(len(row) == 11 for future in got for row in future.result())


class FakeStream:
    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


class FakeTensor:
    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream)


def test_a_stream_takes_over_from_another(monkeypatch):
    """It waits, and keeps what both use from being freed; on the same stream nothing is done."""
    device, first, second = torch.device("cuda", 0), FakeStream(), FakeStream()
    current, tensor = [first], FakeTensor()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[0])
    last = step.after(None, device, [tensor])
    assert step.after(last, device, [tensor]) is first
    assert (first.waited, tensor.streams) == ([], [])
    current[0] = second
    assert step.after(last, device, [tensor]) is second
    assert (first.waited, second.waited, tensor.streams) == ([], [first], [second])
    assert step.after(None, torch.device("cpu")) is None


def test_replays_take_turns(monkeypatch):
    """Whatever the memory: each waits for the stream of the one before, and holds the lock."""
    device, streams = torch.device("cuda", 0), [FakeStream(), FakeStream()]
    monkeypatch.setattr(step, "_turn", {})
    for stream in (streams[0], streams[1], streams[1], streams[0]):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, stream=stream: stream)
        step._take_turn(device)
    assert [stream.waited for stream in streams] == [[streams[1]], [streams[0]]]
    model, ids = small_model("bd_lru"), tokens(length=6)
    cache = prefilled(model, ids[:, :5])
    one_step = decode_step(model, cache, step.Pool(), capture=True)

    class Graph:
        def replay(self):
            assert step.turns.locked()

    one_step.memory.graph = Graph()
    one_step(model, ids[:, 5:], cache)
    assert not step.turns.locked()


@pytest.mark.parametrize("error", [0, 2])
def test_the_stream_of_captures_is_the_drivers(error, monkeypatch):
    """Non-blocking, made once a device; an error of the driver's is told as one."""
    made = []

    def create(stream, flags):
        made.append(flags.value)
        stream._obj.value = 4096
        return error

    driver = SimpleNamespace(cuStreamCreate=create, hipStreamCreateWithFlags=create)
    monkeypatch.setattr(step.ctypes, "CDLL", lambda _: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: (pointer, device))
    device = torch.device("cuda", 99)
    make = step._capture_stream.__wrapped__
    if error:
        with pytest.raises(RuntimeError, match="error 2"):
            make(device)
    else:
        assert make(device) == (4096, device)
    assert made == [1]
    with pytest.raises(ValueError, match="cpu"):
        make(torch.device("cpu"))


class StopError(Exception):
    pass


class Raises:
    """A streamer that fails at its third call."""

    def __init__(self):
        self.calls = 0

    def put(self, _):
        self.calls += 1
        if self.calls == 3:
            raise StopError

    def end(self):
        pass


class RaisingProcessor(Raises, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.put(input_ids)
        return scores


class RaisingCriterion(Raises, StoppingCriteria):
    def __call__(self, input_ids, scores):
        self.put(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


FAILURES = {
    "processor": lambda: {"logits_processor": LogitsProcessorList([RaisingProcessor()])},
    "criterion": lambda: {"stopping_criteria": StoppingCriteriaList([RaisingCriterion()])},
    "streamer": lambda: {"streamer": Raises()},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("bd_lru", kind) for kind in FAILURES), ("hybrid", "processor"), ("hybrid", "streamer")],
)
def test_after_an_exception(name, kind, device):
    """Also while the exception lives, and with it the frames of the call."""
    model = on(device, name)
    batch = [ids[:1] for ids in prompts(model)]
    want = [write(model, ids) for ids in batch]
    raised = []
    for ids, text in zip(batch, want, strict=True):
        with pytest.raises(StopError) as error:
            write(model, ids, **FAILURES[kind]())
        raised.append(error)
        assert write(model, ids) == text
    with ThreadPoolExecutor(8) as pool:
        failing = [pool.submit(write, model, ids, **FAILURES[kind]()) for ids in batch]
        got = [pool.submit(write, model, ids) for ids in batch]
    assert [future.result() for future in got] == want
    assert all(isinstance(future.exception(), StopError) for future in failing)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["our loop", "transformers' loop"])
@pytest.mark.parametrize("name", ["bd_lru", "hybrid"])
def test_a_call_inside_a_call(name, way, device):
    model = on(device, name)
    batch = [ids[:1] for ids in prompts(model)]
    want = [write(model, ids, **WAYS[way]) for ids in batch]
    inner = []

    class Nested(Raises):
        def put(self, _):
            if len(inner) < len(batch):
                inner.append(write(model, batch[len(inner)], **WAYS[way]))

    assert write(model, batch[0], streamer=Nested(), **WAYS[way]) == want[0]
    assert inner == want[: len(inner)]
    assert len(inner) >= 7


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_cache_outlives_its_step(device):
    """A returned cache is its caller's own, whoever has the step's memory next."""
    model, ids = on(device, "bd_lru"), tokens().to(device)
    pool = step.Pool()
    first, second = prefilled(model, ids[:, :4]), prefilled(model, ids[:, 4:9])
    one_step = decode_step(model, first, pool, capture=True)
    with_warning(one_step, model, ids[:, 4:5], first)
    memory = one_step.memory
    del one_step
    assert not memory.lent
    assert all(a is not b for a, b in zip(states(first), memory.states, strict=True))
    one_step = decode_step(model, second, pool, capture=True)
    assert one_step.memory is memory
    one_step(model, ids[:, 9:10], second)
    for cache, want in ((first, ids[:, :5]), (second, ids[:, 4:10])):
        for a, b in zip(states(cache), states(prefilled(model, want)), strict=True):
            close(a, b, TOLERANCE["other order of sums"])


@torch.no_grad()
def test_captured_steps_are_few():
    """Each is lent once; calls beyond KEPT run uncaptured; other shapes take the place of the oldest."""
    model, pool = small_model("bd_lru"), step.Pool()
    caches = [prefilled(model, tokens(rows=1 + i, length=4)) for i in range(step.KEPT + 2)]
    lent = [decode_step(model, caches[0], pool, capture=True) for _ in range(step.KEPT + 1)]
    assert len({id(one.memory) for one in lent}) == step.KEPT + 1
    assert [one.memory.key is None for one in lent] == [False] * step.KEPT + [True]
    memories = [one.memory for one in lent[:-1]]
    del lent
    assert not any(memory.lent for memory in memories)
    again = decode_step(model, caches[0], pool, capture=True).memory
    assert any(again is memory for memory in memories)
    for cache in caches[1 : step.KEPT]:
        decode_step(model, cache, pool, capture=True)
    assert decode_step(model, caches[0], pool, capture=True).memory is again
    for cache in caches[1:]:
        decode_step(model, cache, pool, capture=True)
    assert decode_step(model, caches[0], pool, capture=True).memory is not again
