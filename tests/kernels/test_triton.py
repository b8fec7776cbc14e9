"""The Triton scans against the specification at small shapes: in the interpreter, or natively on a GPU, for
which `test_triton_grid.py` has the full grid.

Outputs are NaN-poisoned throughout: an element that a kernel leaves unwritten fails its comparison.
"""

import math
from functools import partial

import pytest
import torch
from scans import SCANS, TOLERANCE, make_inputs, relative_error, run
from triton_cases import DEVICE, GPU, compare, cut_time, inside, poison, to_device  # noqa: F401  (fixtures)

from lrnn_lm.kernels import GATES, block_diagonal_scan, higher_order_scan, plane_width, scan_packed

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(
    GPU, reason="small shapes for the interpreter; the gpu tests run the full grid"
)


@pytest.fixture(params=[0, 5], ids=["whole", "chunks"])
def chunks(request, monkeypatch):
    """Runs a test without and with time cut into chunks of five steps."""
    if request.param:
        cut_time(monkeypatch, request.param)


@pytest.fixture
def rule(monkeypatch):
    """Sets a number of the rules that launches follow; plans made by other rules are forgotten."""
    from lrnn_lm.kernels.scan import triton_launch, triton_scans

    triton_scans.plan_launch.cache_clear()
    yield partial(monkeypatch.setattr, triton_launch)
    triton_scans.plan_launch.cache_clear()


@interpreted
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(
    ("T", "N", "M"),
    [(1, 3, 2), (2, 5, 3), (9, 2, 8), (17, 1, 1), (18, 3, 4), (9, 2, 16)],
)
def test_small_shapes(scan, T, N, M):
    compare(scan, T=T, N=N, M=M, B=1 if M > 5 else 2)


@pytest.mark.parametrize(("M", "chunk"), [(1, 11), (3, 5), (8, 11), (16, 5)])
def test_an_input_gate_without_logits(M, chunk, monkeypatch):
    """Gates (.., M): those of a softmax whose input gate has the logit 0, and their gradients."""
    cut_time(monkeypatch, chunk)
    gates, *others = make_inputs(block_diagonal_scan, T=11, N=2, M=M)
    gates[..., M] = 0.0
    compare(block_diagonal_scan, inputs=[gates[..., :M], *others])
    torch.testing.assert_close(
        block_diagonal_scan(gates[..., :M], *others, backend="reference"),
        block_diagonal_scan(gates, *others, backend="reference"),
    )


@interpreted
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("T", "M"), [(11, 1), (12, 3), (10, 4)])
def test_chunks_of_time(scan, T, M, monkeypatch):
    cut_time(monkeypatch, 5)
    compare(scan, T=T, N=2, M=M)


@interpreted
def test_chunks_of_blocks_that_have_a_warp_each(monkeypatch):
    cut_time(monkeypatch, 4)
    compare(block_diagonal_scan, T=11, N=2, M=9, gate="tanh")


@interpreted
@pytest.mark.parametrize("M", [4, 16])
def test_nothing_of_a_document_reaches_the_next_chunk(M, monkeypatch):
    """Not even NaN: a start clears what came before in every block size, cut or not."""
    gates, values, _, _ = make_inputs(block_diagonal_scan, T=12, N=2, M=M)
    reset = torch.zeros(gates.shape[:2], dtype=torch.bool)
    reset[:, 6] = True
    wanted = block_diagonal_scan(gates, values, None, reset)[0][:, 6:]
    with torch.no_grad():
        gates[:, 5] = torch.nan
        cut_time(monkeypatch, 4)
        got = block_diagonal_scan(gates, values, None, reset, backend="triton")[0][:, 6:]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@interpreted
def test_chunks_with_columns_over_several_programs(monkeypatch):
    cut_time(monkeypatch, 4)
    compare(higher_order_scan, T=7, N=2, M=9, B=1)


@interpreted
@pytest.mark.parametrize("scan", SCANS)
def test_several_programs_a_sequence(scan, rule):
    rule("INTERPRETED", False)  # blocks of one warp, as on a GPU
    compare(scan, T=3, N=43, M=3, B=1)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("T", "N", "M"), [(19, 5, 1), (10, 3, 2), (9, 18, 4), (6, 2, 8)])
def test_two_rows_a_lane(scan, T, N, M, rule):
    """What large batches run: here for small ones."""
    rule("MOST_LANES", 1)
    rule("WARPS_FOR_PAIRS", {False: 0.0, True: 0.0})
    compare(scan, T=T, N=N, M=M, B=1 if M > 4 else 2)
    if M == 2:
        compare(scan, torch.bfloat16, T=T, N=N, M=M)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("most", "T", "N", "M"), [(1, 5, 3, 12), (2, 6, 2, 8), (4, 9, 18, 4), (4, 7, 3, 6)])
def test_lanes_that_share_a_row(scan, most, T, N, M, rule):
    """None in large batches, up to four in small ones."""
    rule("MOST_LANES", most)
    rule("LEAST_TAPS", 1)
    compare(scan, T=T, N=N, M=M, B=1)


@pytest.mark.parametrize(
    ("scan", "M", "fixed"),
    [*((scan, M, False) for scan in SCANS for M in (1, 3, 12)),
     (block_diagonal_scan, 2, True), (block_diagonal_scan, 12, True)],
)  # fmt: skip
def test_packed_planes(scan, M, fixed):
    """The same bits as from gates and values; padding changes nothing, and its gradient is zero.

    `fixed`: without the input gate's plane.
    """
    gates, values, h0, reset = to_device(make_inputs(scan, B=2, T=5, N=3, M=M))
    K = M if fixed else M + 1
    gates = gates[..., :K].contiguous()
    wanted = run(scan, [gates, values, h0, reset], "softmax", "triton")
    rows = values[0, 0].numel()
    planes = torch.full((2, 5, K + 1, rows + 5), 1e4, device=DEVICE)
    planes[:, :, :K, :rows] = gates.flatten(2, -2).transpose(2, 3)
    planes[:, :, K, :rows] = values.flatten(2)

    bias = torch.zeros(K, rows, device=DEVICE)  # in the planes already, whatever it is

    def from_planes(planes, bias, h0, reset, gate, backend):
        return scan_packed(planes, values.shape[2:], h0, reset, gate, bias)

    h, last, d_planes, d_bias, d_h0 = run(from_planes, [planes, bias, h0, reset], "softmax", "triton")
    d_gates = d_planes[:, :, :K, :rows].transpose(2, 3).view(gates.shape)
    d_values = d_planes[:, :, K, :rows].view(values.shape)
    for x, want in zip((h, last, d_gates, d_values, d_h0), wanted, strict=True):
        torch.testing.assert_close(x, want, rtol=1e-6, atol=1e-6)
    assert not d_planes[..., rows:].any()
    wanted_sum = d_planes[:, :, :K, :rows].sum(dim=(0, 1))
    torch.testing.assert_close(d_bias, wanted_sum, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scan", "M"), [(block_diagonal_scan, 2), (block_diagonal_scan, 12), (higher_order_scan, 2)]
)
def test_gradients_of_a_bias_over_chunks(scan, M, monkeypatch):
    """Summed in each chunk of time, then over them; for lanes that share a row as well."""
    cut_time(monkeypatch, 5)
    rows = (2, M) if scan is block_diagonal_scan else (2,)
    used = math.prod(rows)
    planes = torch.randn(2, 13, M + 2, used + 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bias = torch.zeros(M + 1, used, device=DEVICE, requires_grad=True)
    h, _ = scan_packed(planes.requires_grad_(), rows, bias=bias)
    d_planes, d_bias = torch.autograd.grad(h.square().sum(), [planes, bias])
    wanted = d_planes[:, :, :-1, :-3].sum(dim=(0, 1))
    torch.testing.assert_close(d_bias, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("M", [2, 3])
def test_packed_planes_of_one_step(scan, M):
    """A lone step's rows lie as far apart as any."""
    planes = torch.randn(3, 1, M + 2, 4 * M + 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows = (4, M) if scan is block_diagonal_scan else (4,)
    used = planes[..., : math.prod(rows)]
    gates = used[:, :, :-1].transpose(2, 3).unflatten(2, rows)
    wanted = scan(gates, used[:, :, -1].unflatten(2, rows), backend="torch")
    for x, want in zip(scan_packed(planes, rows), wanted, strict=True):
        torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", SCANS)
def test_packed_planes_whose_state_was_kept_without_its_padding(scan):
    """As `save_on_cpu` keeps it: what lies behind in memory is not read."""
    planes = torch.randn(2, 5, 5, 15, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()

    def amid_nan(x):
        memory = torch.full((x.numel() + 99,), torch.nan, device=DEVICE)
        return memory[: x.numel()].copy_(x.flatten()).view(x.shape)

    def time_first(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 2 else x

    for M in (2, 3):  # blocks of three are not read as one run
        rows = (3, M) if scan is block_diagonal_scan else (3,)
        (want,) = torch.autograd.grad(scan_packed(planes[:, :, : M + 2], rows)[0].sum(), planes)
        for other in (amid_nan, time_first):
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, other):
                h = scan_packed(planes[:, :, : M + 2], rows)[0]
            assert torch.equal(torch.autograd.grad(h.sum(), planes)[0], want)


def test_widths_of_planes():
    assert plane_width(302 * 4, 4) == 1216
    assert plane_width(2112) == 2112
    assert plane_width(242) == 256
    assert plane_width(32, 4) == 32  # would double
    assert plane_width(15, 3) == 15  # blocks of three are not read as one run


def test_planes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"at least 6"):
        scan_packed(torch.zeros(1, 2, 4, 5), (3, 2))
    for gate, planes in (("softmax", 2), ("tanh", 3)):  # only a softmax may leave out the input gate's
        with pytest.raises(ValueError, match=r"expected \(B, T, 4"):
            scan_packed(torch.zeros(1, 2, planes, 6), (3, 2), gate=gate)
    with pytest.raises(ValueError, match=r"expected \(B, T, 3, at least 6"):  # no tap
        scan_packed(torch.zeros(1, 2, 2, 6), (6,))
    with pytest.raises(ValueError, match=r"expected \(1, 2, 3, 2, 3\)"):
        block_diagonal_scan(torch.zeros(1, 2, 3, 2, 2), torch.zeros(1, 2, 3, 2), gate="tanh")


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("gate", GATES)
def test_gate_functions(scan, gate):
    compare(scan, gate=gate, T=5, N=3, M=3)
    gates, values, h0, reset = make_inputs(scan, B=3, T=2, N=1, M=2)
    for row, z in zip(gates, (80.0, 0.0, -80.0), strict=True):  # saturated, all equal, closed
        row.copy_(z * row.sign())
    for x in run(scan, to_device([gates, values, h0, reset]), gate, "triton")[:3]:
        assert x.isfinite().all()


def test_small_logits_keep_their_digits():
    """tanh near zero: 1 - exp(-2z) would lose them."""
    gates, values, h0, reset = make_inputs(higher_order_scan, T=4, N=3, M=2)
    compare(higher_order_scan, gate="tanh", inputs=[1e-3 * gates, values, h0, reset])


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(scan, dtype):
    compare(scan, dtype, T=10, N=3, M=3)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("T", [5, 2000])  # 2000: where time may be cut
@pytest.mark.parametrize("empty", ["B", "N"])
def test_nothing_to_scan(scan, T, empty):
    inputs = make_inputs(scan, **{"B": 2, "N": 3, empty: 0}, T=T, M=2)
    outputs = run(scan, to_device(inputs), "softmax", "triton")
    assert outputs[0].shape == inputs[1].shape
    assert outputs[2].shape == inputs[0].shape


@pytest.mark.parametrize("scan", SCANS)
def test_resets_everywhere_and_nowhere(scan, monkeypatch):
    cut_time(monkeypatch, 5)
    for probability in (0.0, 1.0):
        compare(scan, T=6, N=2, M=2, reset_probability=probability)


@pytest.mark.parametrize("scan", SCANS)
def test_without_initial_state_or_resets(scan, chunks):
    gates, values, h0, _ = make_inputs(scan, T=7, N=2, M=2)
    gates, values = to_device([gates, values])
    wanted = scan(gates.double(), values.double(), backend="reference")
    leaves = [gates.clone().requires_grad_(), values.clone().requires_grad_()]
    got = scan(*leaves, backend="triton")
    explicit = run(scan, [gates, values, torch.zeros_like(h0, device=DEVICE), None], "softmax", "triton")
    for x, want in zip(got, wanted, strict=True):
        assert relative_error(x.detach().cpu(), want.cpu()) <= TOLERANCE[torch.float32]
    torch.testing.assert_close(got[0].detach(), explicit[0])
    got[0].square().sum().backward()
    exact = [x.double().requires_grad_() for x in (gates, values)]
    scan(*exact, backend="reference")[0].square().sum().backward()
    for x, want in zip(leaves, exact, strict=True):
        assert relative_error(x.grad.cpu(), want.grad.cpu()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("scan", SCANS)
def test_any_strides(scan, monkeypatch):
    """Planes of gates with n fastest, time outermost, a slice of a wider projection, an expanded gradient,
    and a mask of documents that is another's transpose."""
    cut_time(monkeypatch, 5)
    gates, values, h0, reset = to_device(make_inputs(scan, T=7, N=3, M=2, reset_probability=0.3))
    wanted = run(scan, [gates, values, h0, reset], "softmax", "triton")
    planes = gates.movedim(-1, 2).contiguous().movedim(2, -1)
    time_first = gates.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.stack([values, values], dim=-1)[..., 1]
    turned = reset.t().contiguous().t()
    assert reset.any()
    for layout in (planes, time_first):
        for x, want in zip(run(scan, [layout, wide, h0, turned], "softmax", "triton"), wanted, strict=True):
            torch.testing.assert_close(x, want)
    leaf = planes.clone().requires_grad_()
    scan(leaf, values, h0, reset, backend="triton")[0].sum().backward()  # the gradient has strides of zero
    exact = planes.double().requires_grad_()
    scan(exact, values.double(), h0.double(), reset, backend="reference")[0].sum().backward()
    assert relative_error(leaf.grad.cpu(), exact.grad.cpu()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("scan", SCANS)
def test_a_launch_is_planned_once_a_shape(scan, monkeypatch):
    from lrnn_lm.kernels.scan import chunk_transfer, triton_scans

    cut_time(monkeypatch, 5)
    made = []
    for _ in range(2):
        run(scan, to_device(make_inputs(scan, T=6, N=2, M=1)), "softmax", "triton")
        plans = triton_scans.plan_launch, chunk_transfer.plan_transfer
        made.append([plan.cache_info().misses for plan in plans])
    assert made[0] == made[1]


@pytest.mark.parametrize("scan", SCANS)
def test_single_steps_are_the_scan(scan):
    gates, values, h0, reset = to_device(make_inputs(scan, T=5, N=3, M=3))
    whole, last = scan(gates, values, h0, reset, backend="triton")
    state = h0
    for t in range(5):
        now = slice(t, t + 1)
        h, state = scan(gates[:, now], values[:, now], state, reset[:, now], backend="triton")
        torch.testing.assert_close(h, whole[:, now])
    torch.testing.assert_close(state, last)


@pytest.mark.gpu  # the interpreter runs one program after the other
@pytest.mark.parametrize("scan", SCANS)
def test_two_runs_same_bits(scan, monkeypatch):
    cut_time(monkeypatch, 5)
    inputs = to_device(make_inputs(scan, T=7, N=2, M=2, dtype=torch.bfloat16))
    for a, b in zip(*(run(scan, inputs, "softmax", "triton") for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_operators_keep_torch_library_rules():
    """Schema, fake shapes and strides, and autograd registration of the op, for both scans."""
    from lrnn_lm.kernels.scan import triton_scans  # noqa: F401 registers them

    operator = torch.ops.lrnn_lm.scan_triton.default
    for scan in SCANS:
        gates, values, h0, reset = to_device(make_inputs(scan, B=1, T=2, N=2, M=2))
        gates = gates.movedim(-1, 2).contiguous().movedim(2, -1).requires_grad_()
        torch.library.opcheck(
            operator,
            (gates, values.requires_grad_(), h0.requires_grad_(), reset, "softmax"),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_refusals_say_why(monkeypatch):
    gates, values, _, _ = make_inputs(block_diagonal_scan, T=2, N=2, M=2)
    with pytest.raises(ValueError, match="fp64"):
        block_diagonal_scan(gates.double().to(DEVICE), values.double().to(DEVICE), backend="triton")
    wide = torch.zeros(1, 2, 3, 18, device=DEVICE)
    with pytest.raises(ValueError, match="order 17"):
        higher_order_scan(wide, wide[..., 0], backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="tensors are on cpu"):
        block_diagonal_scan(gates, values, backend="triton")
