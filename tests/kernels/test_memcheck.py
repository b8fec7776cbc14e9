"""The checker of addresses itself, and scans of widths that end within a line of memory under it."""

import pytest
import torch
from triton_cases import GPU, cut_time

from lrnn_lm.kernels import scan_packed
from lrnn_lm.kernels.dispatch import plane_width

triton = pytest.importorskip("triton")
if GPU:
    pytest.skip("the interpreter's; a GPU has compute-sanitizer", allow_module_level=True)

import memcheck  # noqa: E402  (it needs triton)
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402


@triton.jit
def shifted(x, y, by, COUNT: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr):
    """y[lane + TO] = x[lane + FROM] where by <= lane < COUNT - by."""
    lane = tl.arange(0, COUNT)
    inside = (lane >= by) & (lane < COUNT - by)
    tl.store(y + lane + TO, tl.load(x + lane + FROM, mask=inside, other=0.0), mask=inside)


@triton.jit
def unmasked(x, y, COUNT: tl.constexpr):
    tl.store(y + tl.arange(0, COUNT), tl.load(x + tl.arange(0, COUNT)))


@triton.jit
def hinted(x, y, at, ALIGN: tl.constexpr):
    tl.store(y, tl.load(x + tl.multiple_of(at, ALIGN)))


@triton.jit
def added(x, at):
    tl.atomic_add(x + at, 1.0)


@triton.jit
def gathered(y, by, COUNT: tl.constexpr):
    lane = tl.arange(0, COUNT)
    tl.store(y + lane, tl.gather(lane.to(tl.float32), lane - by, 0))


def launch(kernel, *arguments):
    with memcheck.checked() as launched:
        kernel[(1,)](*arguments)
    return launched


def test_what_is_masked_may_lie_anywhere():
    """All of a view's storage counts: what lies beside it is padding."""
    x, y = torch.arange(16.0), torch.zeros(8)
    assert launch(shifted, x[4:12], y, 1, 8, 1, -1) == ["shifted"]
    assert y.tolist() == [6, 7, 8, 9, 10, 11, 0, 0]
    launch(shifted, x[4:12], y, 0, 8, 4, 0)
    assert y.tolist() == x[8:].tolist()


@pytest.mark.parametrize(
    ("kernel", "arguments", "message"),
    [
        (shifted, (0, 8, 1, 0), "shifted reads element 8 of x, which has 8 of 4 bytes: 1 of 8 lanes"),
        (shifted, (1, 8, -3, 0), "shifted reads address"),
        (shifted, (0, 8, 0, 1), "shifted writes element 8 of y"),
        (shifted, (0, 8, 0, -1), "shifted writes element 1 before y"),
        (unmasked, (16,), "unmasked reads element 8 of x"),
        (hinted, (6, 4), "hinted: 6 is no multiple of"),
    ],
)
def test_what_is_told(kernel, arguments, message):
    x, y = torch.zeros(8), torch.zeros(8)
    with pytest.raises(InterpreterError, match=message):
        launch(kernel, x, y, *arguments)


def test_atomics_and_gathers():
    x = torch.zeros(4)
    launch(added, x, 3)
    launch(gathered, x, 0, 4)
    with pytest.raises(InterpreterError, match="added updates element 4 of x"):
        launch(added, x, 4)
    with pytest.raises(InterpreterError, match="gathered gathers from beyond 4 lanes"):
        launch(gathered, x, 1, 4)


@pytest.mark.parametrize(("N", "M"), [(201, 4), (77, 1)])
@pytest.mark.parametrize("chunk", [8, 11])
def test_planes_with_padding(N, M, chunk, monkeypatch):
    """N = 201 blocks of 4: 804 rows in 832 columns; time in one piece and in chunks, one of them short."""
    cut_time(monkeypatch, chunk)
    planes = torch.randn(2, 11, M + 2, plane_width(N * M, M)).requires_grad_()
    bias = torch.zeros(M + 1, N * M, requires_grad=True)
    with memcheck.checked() as launched:
        reset = torch.zeros(2, 11, dtype=torch.bool)
        h, last = scan_packed(planes, (N, M), torch.zeros(2, N, M), reset, bias=bias)
        (h.square().sum() + last.sum()).backward()
    assert {"forward_kernel", "backward_kernel"} <= set(launched)
    assert ("block_transfer_kernel" in launched) == (chunk == 8)
