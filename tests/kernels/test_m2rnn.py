"""The matrix-to-matrix RNN: each backend against the reference in fp64, outputs and all gradients."""

from math import tanh

import pytest
import torch
from scans import assert_close, drawing, in_fp64, with_gradients
from triton_cases import TOLERANCES, inside, poison, to_device  # noqa: F401  (fixtures)

from lrnn_lm.kernels import BACKENDS, m2rnn_scan, reference
from lrnn_lm.kernels.scan import m2rnn

NAMES = ("y", "last", "queries", "keys", "values", "weight", "keep", "h0")


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 8 steps, so that a short row has several."""
    monkeypatch.setattr(m2rnn, "CHUNK", 8)


def make_inputs(B=2, T=19, H=2, K=5, V=3, dtype=torch.float32, resets=0.15) -> list:
    generator, draw = drawing(1000 * B + 10 * T + K)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    given = [draw(B, T, H, size).to(dtype) for size in (K, K, V)]
    given += [x.to(exact) for x in (draw(H, V, V) / V**0.5, draw(B, T, H).sigmoid(), draw(B, H, K, V))]
    return [*given, torch.rand(B, T, generator=generator) < resets if resets else None]


def run(inputs: list, function=m2rnn_scan, **options) -> list[torch.Tensor]:
    """Both outputs, and gradients of a random weighing of them."""
    *numbers, reset = inputs
    return with_gradients(lambda *given: function(*given, reset, **options), numbers)


def compare(inputs: list, tolerance: float, **options) -> None:
    given = to_device(inputs) if options["backend"] == "triton" else inputs
    assert_close(NAMES, run(given, **options), run(in_fp64(inputs), reference.m2rnn_scan), tolerance)


def test_two_steps_by_hand():
    """One head of one row and column: numbers."""
    numbers = ([2, 3], [1, -1], [0.5, 2], [0.25, 0.5])
    q, k, v, keep = (torch.tensor(x).double().view(1, 2, 1, 1) for x in numbers)
    one = torch.ones(1, 1, 1, 1).double()
    y, last = m2rnn_scan(q, k, v, 0.7 * one[0], keep[..., 0], one)
    first = 0.25 + 0.75 * tanh(0.7 + 0.5)
    second = 0.5 * first + 0.5 * tanh(0.7 * first - 2)
    assert y.flatten().tolist() == pytest.approx([2 * first, 3 * second])
    assert last.item() == pytest.approx(second)


@pytest.mark.parametrize("resets", [0.0, 0.15])
def test_torch_in_fp64(resets):
    compare(make_inputs(dtype=torch.float64, resets=resets), 1e-9, backend="torch")


@pytest.mark.parametrize(("T", "K", "V"), [(1, 16, 16), (9, 4, 16), (24, 32, 5), (19, 17, 3)])
def test_triton(short_chunks, T, K, V):
    compare(make_inputs(T=T, K=K, V=V), 3e-6, backend="triton")


def test_triton_in_a_whole_chunk_and_a_step():
    compare(make_inputs(B=1, H=1, T=m2rnn.CHUNK + 1), 3e-6, backend="triton")


def test_bf16_inputs_and_no_resets():
    """Only queries, keys, values, outputs and their gradients are rounded; gates and states are fp32."""
    compare(make_inputs(dtype=torch.bfloat16, resets=0.0), TOLERANCES[torch.bfloat16], backend="triton")


def test_autocast_rounds_no_state():
    inputs = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = m2rnn_scan(*inputs)
    assert all(map(torch.equal, got, m2rnn_scan(*inputs)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_at_all(backend):
    *tensors, reset = make_inputs(B=0)
    y, last, *gradients = run(to_device([*tensors, reset]), backend=backend)
    assert len(y) == len(last) == 0
    assert all(x.shape == g.shape and not g.any() for x, g in zip(tensors, gradients, strict=True))


def test_scanning_in_two_parts():
    *given, h0, reset = make_inputs(dtype=torch.float64)
    weight = given.pop(3)

    def part(steps: slice, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, keep = (x[:, steps] for x in given)
        return m2rnn_scan(q, k, v, weight, keep, state, reset[:, steps])

    y, last = part(slice(None), h0)
    first, state = part(slice(7), h0)
    second, after = part(slice(7, None), state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), y)
    torch.testing.assert_close(after, last)


@pytest.mark.parametrize(("change", "message"), [
    ({"backend": "cuda"}, "unknown backend 'cuda'; known: auto, reference, torch, triton"),
    ({"weight": torch.zeros(2, 3, 4)}, "weight has shape"),
    ({"keep": torch.zeros(2, 19, 2, 1)}, "keep has shape"),
    ({"queries": torch.zeros(2, 19, 10)}, "queries has shape"),
    ({"keys": torch.zeros(2, 19, 2, 5, dtype=torch.int64)}, "keys has dtype"),
])  # fmt: skip
def test_mistakes(change, message):
    *tensors, _, _ = make_inputs()
    with pytest.raises(ValueError, match=message):
        m2rnn_scan(**{**dict(zip(NAMES[2:], tensors, strict=False)), **change})


@pytest.mark.parametrize(("dtype", "K", "V", "message"), [
    (torch.float64, 4, 4, "too coarse for fp64"),
    (torch.float32, 4, 65, "a head of 4 x 65 is above 8192 numbers or 64 columns"),
    (torch.float32, 129, 33, "a head of 129 x 33 is above"),
])  # fmt: skip
def test_triton_says_why_not(dtype, K, V, message):
    inputs = make_inputs(T=1, dtype=dtype, K=K, V=V, resets=0.0)
    with pytest.raises(ValueError, match=message):
        m2rnn_scan(*to_device(inputs), backend="triton")
