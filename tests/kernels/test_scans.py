"""Every backend against the specification, and the specification against closed forms."""

from itertools import pairwise

import pytest
import torch
from scans import LENGTHS, NAMES, SCANS, SIZES, TOLERANCE, assert_close, in_fp64, make_inputs, run

from lrnn_lm.kernels import BACKENDS, GATES, block_diagonal_scan, higher_order_scan, normalise, torch_scan

FAST = [name for name in BACKENDS if name not in ("reference", "triton")]  # triton has its own file


def compare(scan, backend, dtype, gate="softmax", **shape):
    inputs = make_inputs(scan, dtype=dtype, **shape)
    wanted = run(scan, in_fp64(inputs), gate, "reference")
    assert_close(NAMES, run(scan, inputs, gate, backend), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("T", LENGTHS)
def test_lengths(scan, backend, T):
    compare(scan, backend, torch.float64, T=T, N=3, M=4)
    compare(scan, backend, torch.float32, T=T, N=3, M=2)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("M", SIZES)
def test_block_sizes(scan, backend, M):
    compare(scan, backend, torch.float32, T=37, N=5, M=M)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("gate", GATES)
def test_gates(scan, backend, gate):
    compare(scan, backend, torch.float64, gate, T=23, N=3, M=3)
    compare(scan, backend, torch.bfloat16, gate, T=23, N=3, M=3)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("scan", SCANS)
def test_extreme_logits(scan, backend):
    gates, values, h0, reset = make_inputs(scan, T=19, N=3, M=4, dtype=torch.float32)
    for special in (80.0 * gates.sign(), torch.zeros_like(gates), torch.full_like(gates, -80.0)):
        for gate in ("softmax", "sigmoid", "relu", "tanh"):
            for x in run(scan, [special, values, h0, reset], gate, backend)[:3]:
                assert x.isfinite().all()


def test_reset_everywhere_and_nowhere():
    for scan in SCANS:
        for probability in (0.0, 1.0):
            compare(scan, "torch", torch.float64, T=9, N=2, M=3, reset_probability=probability)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("scan", SCANS)
def test_reset_equals_separate_documents(scan, backend):
    gates, values, _, _ = make_inputs(scan, T=30, N=3, M=4, dtype=torch.float64)
    starts = [0, 7, 8, 20, 30]
    reset = torch.zeros(gates.shape[:2], dtype=torch.bool)
    reset[:, starts[1:-1]] = True
    whole, last = scan(gates, values, None, reset, backend=backend)
    parts = [scan(gates[:, a:b], values[:, a:b], backend=backend) for a, b in pairwise(starts)]
    torch.testing.assert_close(whole, torch.cat([h for h, _ in parts], 1))
    torch.testing.assert_close(last, parts[-1][1])


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("cut", [1, 2, 11, 29])
def test_split_scan_is_the_whole_scan(scan, backend, cut):
    gates, values, h0, reset = make_inputs(scan, T=30, N=3, M=4, dtype=torch.float64)
    whole, last = scan(gates, values, h0, reset, backend=backend)
    first, carried = scan(gates[:, :cut], values[:, :cut], h0, reset[:, :cut], backend=backend)
    second, end = scan(gates[:, cut:], values[:, cut:], carried, reset[:, cut:], backend=backend)
    torch.testing.assert_close(whole, torch.cat([first, second], 1))
    torch.testing.assert_close(last, end)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_documents_that_start_where_a_slab_does(scan, steps, offset, monkeypatch):
    """The torch scan walks time in slabs: a start just before, at, and just after the start of each."""
    inputs = make_inputs(scan, T=20, N=3, M=4, dtype=torch.float64)
    inputs[3] = torch.zeros_like(inputs[3])
    inputs[3][0, [t + offset for t in range(steps, 19, 2 * steps)]] = True  # row 1 has one document
    monkeypatch.setattr(torch_scan, "SLAB_BYTES", steps * 4 * inputs[0][:, 0].numel())
    assert [part.start for part in torch_scan._slabs(inputs[0])] == list(range(0, 20, steps))
    want = run(scan, inputs, "softmax", "reference")
    assert_close(NAMES, run(scan, inputs, "softmax", "torch"), want, TOLERANCE[torch.float64])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_second_derivatives_are_refused(scan, backend, number):
    gates, values, h0, reset = make_inputs(scan, T=5, N=2, M=2, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (gates, values, h0)]
    h, _ = scan(*inputs, reset, backend=backend)
    (first,) = torch.autograd.grad(h.square().sum(), inputs[number], create_graph=True)
    with pytest.raises(RuntimeError, match=r"scans have no second derivatives.*backend='reference'"):
        torch.autograd.grad(first.square().sum(), inputs)


@pytest.mark.parametrize("scan", SCANS)
def test_strides_do_not_matter_and_inputs_stay_untouched(scan):
    for B in (1, 2):  # with one sequence, time-first and batch-first memory are the same
        inputs = make_inputs(scan, B=B, T=13, N=6, M=3, dtype=torch.float32)
        gates, values, h0, reset = inputs
        wanted = run(scan, inputs, "softmax", "torch")
        copies = [x.clone() for x in inputs]
        strange = [
            gates.movedim(2, -1).contiguous().movedim(-1, 2),
            values.repeat(1, 1, 2, *[1] * (values.ndim - 3)),
        ]
        strange[1] = strange[1][:, :, :6]
        for got, want in zip(run(scan, [*strange, h0, reset], "softmax", "torch"), wanted, strict=True):
            torch.testing.assert_close(got, want)
        grad = torch.randn_like(values).transpose(0, 1).contiguous().transpose(0, 1)
        kept = grad.clone()
        x = gates.clone().requires_grad_()
        scan(x, values, h0, None, gate="none", backend="torch")[0].backward(grad)
        assert torch.equal(grad, kept), "the incoming gradient was written to"
        assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True)), "an input was written to"


@pytest.mark.parametrize("scan", SCANS)
def test_the_last_state_keeps_no_slab_alive(scan):
    """It lies in memory of its own, in the order of (B, N, M), and so does h0's gradient."""
    gates, values, h0, reset = make_inputs(scan, T=50, N=3, M=4)
    h0.requires_grad_()
    for starts in (reset, None):
        h, last = scan(gates, values, h0, starts, backend="torch")
        for state in (last, *torch.autograd.grad(h.sum() + last.sum(), h0)):
            assert state.is_contiguous()
            assert state.untyped_storage().nbytes() == state.nbytes


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("gate", ["softmax", "tanh", "none"])
def test_gradcheck(scan, gate):
    gates, values, h0, reset = make_inputs(scan, B=1, T=5, N=2, M=2, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (gates, values, h0)]
    assert torch.autograd.gradcheck(lambda *x: scan(*x, reset, gate, backend="torch"), inputs)


def test_block_diagonal_closed_form():
    """A constant one-hot transition is a rotation of the block."""
    M, T = 3, 7
    logits = torch.full((1, T, 1, M, M + 1), -200.0, dtype=torch.float64)
    for i in range(M):
        logits[..., i, (i - 1) % M] = 200.0
    h0 = torch.tensor([[[1.0, 2.0, 3.0]]], dtype=torch.float64)
    h, _ = block_diagonal_scan(logits, torch.zeros(1, T, 1, M, dtype=torch.float64), h0, backend="reference")
    for t in range(T):
        torch.testing.assert_close(h[0, t, 0], h0[0, 0].roll(t + 1))


def test_higher_order_closed_form():
    """Fibonacci with unnormalised gates: h_t = h_{t-1} + h_{t-2} needs each coefficient at time t."""
    gates = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64).expand(1, 10, 1, 3)
    values = torch.zeros(1, 10, 1, dtype=torch.float64)
    values[0, 0] = 1
    h, last = higher_order_scan(gates, values, gate="none", backend="reference")
    assert h.flatten().tolist() == [1, 1, 2, 3, 5, 8, 13, 21, 34, 55]
    assert last.flatten().tolist() == [55, 34]


def test_higher_order_takes_coefficients_at_time_t():
    """Time-varying taps tell our recurrence from the transposed-companion one, which reads a_{i,t-i+1}."""
    torch.manual_seed(0)
    gates, values = torch.randn(1, 6, 1, 3, dtype=torch.float64), torch.randn(1, 6, 1, dtype=torch.float64)
    p = normalise(gates, "softmax")[0, :, 0]
    h: list[float] = []
    for t in range(6):
        past = [h[t - i] if t >= i else 0.0 for i in (1, 2)]
        h.append(float(p[t, 0] * past[0] + p[t, 1] * past[1] + p[t, 2] * values[0, t, 0]))
    for backend in ("reference", *FAST):
        got, _ = higher_order_scan(gates, values, backend=backend)
        torch.testing.assert_close(got[0, :, 0], torch.tensor(h, dtype=torch.float64))


def test_order_one_is_block_size_one():
    gates, values, h0, reset = make_inputs(higher_order_scan, T=20, N=4, M=1, dtype=torch.float64)
    h, _ = higher_order_scan(gates, values, h0, reset)
    d, _ = block_diagonal_scan(gates.unsqueeze(-2), values.unsqueeze(-1), h0, reset)
    torch.testing.assert_close(h, d.squeeze(-1))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("gate", [g for g in GATES if g != "none"])
def test_state_is_bounded(scan, gate):
    """Prop. 1: max |h_t| <= max(max |h_0|, max |v|), at tens of thousands of steps."""
    gates, values, h0, _ = make_inputs(scan, B=1, T=30_000, N=2, M=3, dtype=torch.float32)
    bound = max(values.abs().max(), h0.abs().max())
    h, last = scan(3 * gates, values, h0, gate=gate)
    assert max(h.abs().max(), last.abs().max()) <= bound * (1 + 1e-5)


def test_gates_sum_to_at_most_one():
    z = torch.randn(1000, 7, dtype=torch.float64) * 20
    for gate in GATES[:-1]:
        assert normalise(z, gate).abs().sum(-1).max() <= 1 + 1e-12
    assert (normalise(z, "tanh") < 0).any()


def test_mistakes_are_told():
    gates, values, h0, reset = make_inputs(block_diagonal_scan, T=4, N=2, M=2, dtype=torch.float32)
    for arguments, words in (
        ((gates, values[:, :3]), "gates has shape"),
        ((gates, values, h0[:1]), "h0 has shape"),
        ((gates, values, h0, reset.float()), "reset is a bool mask"),
        ((gates, values, h0, reset, "softmix"), "unknown gate"),
        ((gates, values, h0, reset, "softmax", "cuda"), "unknown backend"),
        ((gates[:, :0], values[:, :0]), "at least one step"),
    ):
        with pytest.raises(ValueError, match=words):
            block_diagonal_scan(*arguments)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scan", SCANS)
def test_what_is_kept_for_the_backward_is_the_inputs_and_h(scan, backend):
    """Memory is linear in T, with no M^2 term beyond the gates: nothing of A or its products is kept."""
    kept = {}
    gates, values, h0, reset = make_inputs(scan, T=40, N=3, M=8)
    gates.requires_grad_()

    def pack(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        h, _ = scan(gates, values, h0, reset, backend=backend)
    assert sum(kept.values()) <= sum(x.numel() for x in (gates, values, h0, reset, h))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("empty", ["B", "N"])
def test_nothing_to_scan(scan, backend, empty):
    inputs = make_inputs(scan, **{"B": 2, "N": 3, empty: 0}, T=5, M=2)
    outputs = run(scan, inputs, "softmax", backend)
    assert outputs[0].shape == inputs[1].shape
    assert outputs[2].shape == inputs[0].shape


def test_whole_numbers_are_refused():
    gates, values = torch.zeros(1, 2, 1, 1, 2), torch.ones(1, 2, 1, 1)
    with pytest.raises(ValueError, match=r"values has dtype torch.int64; expected floating-point"):
        block_diagonal_scan(gates, values.long())
    with pytest.raises(ValueError, match="gates has dtype"):
        block_diagonal_scan(gates.long(), values)
