"""The fused kernels of a decoding step against the scans' specification and torch's layers."""

from itertools import product

import pytest
import torch
from torch.nn import functional
from triton_cases import inside  # noqa: F401  (a fixture)

from lrnn_lm.kernels import GATES, block_diagonal_scan, higher_order_scan

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def in_dtypes(*shapes):
    """Each shape in fp32, the first in bf16 and fp16 too: casts more, no branch."""
    half = product(shapes[:1], [torch.bfloat16, torch.float16])
    return [(*shape, d) for shape, d in [*product(shapes, [torch.float32]), *half]]


EPS = 1e-6


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(got, want, dtype):
    assert got.shape == want.shape
    assert got.isfinite().all()
    assert (got.double() - want.double()).norm() <= TOLERANCES[dtype] * want.double().norm()


class Few:
    """kernels/decode/fused_step.py."""

    def linear(self, x, weight, **options):
        from lrnn_lm.kernels.decode.fused_step import linear_step

        return linear_step(x, weight, **options)

    def mix(self, *arguments):
        from lrnn_lm.kernels.decode.fused_step import mix_step

        return mix_step(*arguments)


class Many:
    """kernels/decode/fused_tiles.py, in the other's terms."""

    def __init__(self):
        from lrnn_lm.kernels.decode import fused_tiles

        self.kernels, self.workspace = fused_tiles, fused_tiles.Workspace(torch.device(DEVICE))

    def before(self, x, norm):
        """x on its way to a norm, its squares summed by tile: as a product that adds nothing leaves it."""
        nothing = x.new_zeros(x.shape[1], 8)
        stream = self.kernels.begin(x, norm)
        stream = self.kernels.residual_step(x.new_zeros(len(x), 8), nothing, stream, norm, self.workspace)
        assert torch.equal(stream.x, x)
        assert stream.squares.shape[1] > 1
        return stream

    def linear(self, x, weight, norm=None, eps=0.0, residual=None, gated=False):
        if residual is None:
            return self.kernels.normed_step(self.before(x, norm), eps, weight, gated)
        after = noise(weight.shape[0], seed=5, dtype=x.dtype)
        stream = self.kernels.begin(residual, after)
        stream = self.kernels.residual_step(x, weight, stream, after, self.workspace)
        close(stream.scaled, stream.x * after, x.dtype)
        close(stream.squares.sum(dim=1), stream.x.double().square().sum(dim=1), torch.float32)
        assert not self.workspace.arrivals.any()
        return stream.x

    def mix(self, x, norm, *arguments):
        return self.kernels.mix_step(self.before(x, norm), *arguments)


@pytest.fixture(params=[Few, Many], ids=["few", "many"])
def kernels(request):
    return request.param()


@pytest.mark.parametrize(
    ("B", "D", "OUT", "dtype"), in_dtypes((3, 64, 33), (1, 40, 17), (20, 70, 16), (2, 700, 5))
)
def test_products(kernels, B, D, OUT, dtype):
    check_products(kernels, B, D, OUT, dtype)


def test_products_of_more_sequences_than_a_tile_has():
    check_products(Many(), 70, 260, 40, torch.bfloat16)


def check_products(kernels, B, D, OUT, dtype):
    x, norm, residual = (
        noise(B, D, dtype=dtype),
        noise(D, seed=1, dtype=dtype),
        noise(B, OUT, seed=2, dtype=dtype),
    )
    weight, both = noise(OUT, D, seed=3, dtype=dtype), noise(2 * OUT, D, seed=4, dtype=dtype)
    normed = functional.rms_norm(x.double(), (D,), norm.double(), EPS)
    for _ in range(2):  # a workspace is used again
        got = kernels.linear(x, weight, residual=residual)
        close(got, residual.double() + x.double() @ weight.double().t(), dtype)
    close(kernels.linear(x, weight, norm=norm, eps=EPS), normed @ weight.double().t(), dtype)
    gate, up = (normed @ both.double().t()).chunk(2, dim=1)
    close(kernels.linear(x, both, norm=norm, eps=EPS, gated=True), functional.silu(gate) * up, dtype)


@pytest.mark.parametrize(
    ("B", "processors", "split", "pieces"), [(70, 20, 4, 3), (70, 9, 2, 6), (5, 7, 3, 4), (5, 132, 11, 1)]
)
def test_programs_that_share_outputs(B, processors, split, pieces, monkeypatch):
    """Few outputs for a device of many processors: the parts add up, on a GPU too to the same bits each time.

    The last share reaches beyond the inputs, of 11 pieces.
    """
    from lrnn_lm.kernels.decode import fused_tiles

    monkeypatch.setattr(fused_tiles, "multiprocessors", lambda device: processors)
    D, OUT = 1408, 40
    how = fused_tiles.plan(fused_tiles.RESIDUAL, B, D, OUT, 1, 4, torch.device(DEVICE))
    assert how.split == split
    assert how.block * pieces * split >= D > how.block * pieces * (split - 1)
    many, x, weight, residual = Many(), noise(B, D), noise(OUT, D, seed=1), noise(B, OUT, seed=2)
    got = [many.linear(x, weight, residual=residual) for _ in range(3)]
    close(got[0], residual.double() + x.double() @ weight.double().t(), torch.float32)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_pieces_fit_the_shared_memory(kilobytes, monkeypatch):
    """Of an RTX 4090, an A100 and an H100: gates of M + 2 planes, padded, are the widest."""
    from lrnn_lm.kernels.decode import fused_tiles

    monkeypatch.setattr(fused_tiles, "SHARED_MEMORY", kilobytes * 1024)
    for outputs, planes in [(16, 6), (8, 10), (16, 18), (4, 18), (32, 4), (16, 16)]:
        for B in (1, 16, 17, 200):
            like = fused_tiles.MIX._replace(outputs=outputs)
            how = fused_tiles.plan(like, B, 768, 1000, planes, 2, torch.device("cpu"))
            assert how.stages * (how.rows + outputs * planes) * how.block * 2 <= kilobytes * 1024
            assert how.rows <= 16 or outputs * planes <= fused_tiles.WIDEST


@pytest.mark.parametrize("size", [1e4, 1e-5])
def test_a_norm_of_inputs_near_the_ends_of_half_precision(size):
    """Inputs times the norm's weights, without its factor, are beyond fp16 at either end."""
    from lrnn_lm.kernels.decode.fused_step import linear_step

    x, weight = noise(2, 64, dtype=torch.float16) * size, noise(9, 64, seed=1, dtype=torch.float16)
    norm = noise(64, seed=2, dtype=torch.float16) * (8 if size > 1 else 1 / 8)
    wanted = functional.rms_norm(x.double(), (64,), norm.double(), 1e-14) @ weight.double().t()
    close(linear_step(x, weight, norm, 1e-14), wanted, torch.float16)


@pytest.mark.parametrize("window", [False, True], ids=["bd", "h"])
@pytest.mark.parametrize(("B", "N", "M", "dtype"), in_dtypes((4, 9, 7), (1, 7, 4), (3, 19, 1), (18, 3, 16)))
def test_a_step_is_a_scan_of_one(kernels, B, N, M, window, dtype):
    check_step(kernels, B, N, M, window, "softmax", dtype)


@pytest.mark.parametrize("window", [False, True], ids=["bd", "h"])
def test_steps_of_more_sequences_than_a_tile_has(window):
    check_step(Many(), 70, 5, 2, window, "softmax", torch.bfloat16)


@pytest.mark.parametrize("window", [False, True], ids=["bd", "h"])
def test_weights_that_do_not_fit_the_registers(window):
    check_step(Few(), 2, 3, 16, window, "softmax", torch.float32, D=600)


@pytest.mark.parametrize("gate", [name for name in GATES if name != "softmax"])
@pytest.mark.parametrize("window", [False, True], ids=["bd", "h"])
def test_gate_functions(kernels, gate, window):
    check_step(kernels, 2, 5, 4, window, gate, torch.float32)


def check_step(kernels, B, N, M, window, gate, dtype, D=70):
    rows = N if window else N * M
    x, norm = noise(B, D, dtype=dtype), noise(D, seed=1, dtype=dtype)
    weight, bias = (
        noise(rows * (M + 2), D, seed=2, dtype=dtype) / 4,
        noise(rows * (M + 2), seed=3, dtype=dtype),
    )
    state = noise(B, N, M, seed=4)
    projected = (
        functional.rms_norm(x.double(), (D,), norm.double(), EPS) @ weight.double().t() + bias.double()
    )
    planes = projected.view(B, 1, M + 2, rows)
    gates, values = planes[:, :, : M + 1], planes[:, :, M + 1]
    if window:
        _, after = higher_order_scan(
            gates.transpose(2, 3), values, state.double(), gate=gate, backend="reference"
        )
        wanted = after.transpose(1, 2).flatten(1)
    else:
        gates = gates.unflatten(-1, (N, M)).permute(0, 1, 3, 4, 2)
        h, after = block_diagonal_scan(
            gates, values.unflatten(-1, (N, M)), state.double(), gate=gate, backend="reference"
        )
        wanted = h.flatten(1)
    out = kernels.mix(x, norm, EPS, weight, bias, state, gate, window)
    close(out, wanted, dtype)
    close(state, after, dtype)
