"""The Triton scans natively: the full grid, long sequences, every gate function, offsets beyond 32 bits.

Outputs are NaN-poisoned throughout, as in `test_triton.py`.
"""

import pytest
import torch
from scans import LENGTHS, SCANS, SIZES, make_inputs
from triton_cases import DEVICE, compare, cut_time, inside, poison, to_device  # noqa: F401  (fixtures)

from lrnn_lm.kernels import GATES, block_diagonal_scan

pytest.importorskip("triton")

gpu = pytest.mark.gpu
PARAMETERS = [pytest.param(scan, marks=gpu) for scan in SCANS]


@pytest.mark.parametrize("scan", PARAMETERS)
@pytest.mark.parametrize("M", SIZES)
def test_grid(scan, M):
    for T in LENGTHS:
        compare(scan, T=T, N=7, M=M)
        compare(scan, torch.bfloat16, T=T, N=7, M=M)


CUT = [(scan, M) for scan in SCANS for M in range(1, 17)]


@pytest.mark.parametrize(("scan", "M"), [pytest.param(*case, marks=gpu) for case in CUT])
def test_every_size_with_chunks(scan, M, monkeypatch):
    cut_time(monkeypatch, 16)
    compare(scan, T=70, N=37, M=M)
    compare(scan, torch.bfloat16, T=70, N=37, M=M)


@pytest.mark.parametrize("scan", PARAMETERS)
@pytest.mark.parametrize("T", [4096, 65_537])
def test_long_sequences(scan, T):
    for M in (2, 4):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = make_inputs(scan, B=1, T=T, N=9, M=M, dtype=dtype, reset_probability=1e-3)
            compare(scan, dtype, inputs=inputs, baseline="torch")


@pytest.mark.parametrize("scan", PARAMETERS)
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_function(scan, gate):
    for dtype in (torch.float32, torch.bfloat16):
        compare(scan, dtype, gate, T=33, N=5, M=4)


@pytest.mark.parametrize("scan", PARAMETERS)
@pytest.mark.parametrize("gate", [g for g in GATES if g != "none"])
def test_state_is_bounded_at_100k_steps(scan, gate):
    """Prop. 1: max |h_t| <= max(max |h_0|, max |v|)."""
    gates, values, h0, _ = to_device(make_inputs(scan, B=1, T=100_000, N=8, M=4, dtype=torch.bfloat16))
    bound = max(values.abs().max(), h0.abs().max())
    h, last = scan(3 * gates, values, h0, gate=gate, backend="triton")
    assert max(h.abs().max(), last.abs().max()) <= bound * (1 + 1e-3)


@pytest.mark.parametrize("scan", PARAMETERS)
def test_offsets_beyond_32_bits(scan):
    """A batch whose gates pass 2^31 elements equals its last sequences scanned alone."""
    B, T, N, M = (530, 1024, 199, 4) if scan is block_diagonal_scan else (530, 1024, 796, 4)
    block = (N, M) if scan is block_diagonal_scan else (N,)
    gates = torch.randn(B, T, M + 1, *block, device=DEVICE, dtype=torch.bfloat16).movedim(2, -1)
    assert gates.numel() > 2**31
    values = torch.randn(B, T, *block, device=DEVICE, dtype=torch.bfloat16)
    gates.requires_grad_()
    h, _ = scan(gates, values, backend="triton")
    h.backward(values)
    tail = gates[-2:].detach().clone().requires_grad_()
    alone, _ = scan(tail, values[-2:], backend="triton")
    alone.backward(values[-2:])
    torch.testing.assert_close(h[-2:], alone, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(gates.grad[-2:], tail.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scan", PARAMETERS)
def test_large_batches_agree_with_chunked_small_ones(scan):
    """The rule that cuts time must not change results beyond rounding."""
    gates, values, h0, _ = to_device(make_inputs(scan, B=1, T=8192, N=300, M=4))
    alone, last = scan(gates, values, h0, backend="triton")
    many = [x.expand(32, *x.shape[1:]) for x in (gates, values, h0)]
    together, lasts = scan(*many, backend="triton")
    torch.testing.assert_close(together[5:6], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lasts[5:6], last, rtol=1e-4, atol=1e-5)
