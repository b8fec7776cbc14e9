"""What the tests of every scan share: the grid, the table of tolerances, inputs, a run with all gradients."""

import torch
from torch import Tensor

from lrnn_lm.kernels import block_diagonal_scan, higher_order_scan

SCANS = (block_diagonal_scan, higher_order_scan)
LENGTHS = (1, 2, 7, 63, 64, 65, 100, 257)
SIZES = (1, 2, 3, 4, 5, 8, 16)

# relative L2 error of an output or a gradient against the specification in fp64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 2e-3}


def make_inputs(
    scan, B: int = 2, T: int = 16, N: int = 3, M: int = 2, dtype=torch.float32, reset_probability: float = 0.1
) -> list[Tensor]:
    """Random gates, values, h0 and reset of one scan; the state is fp32 unless everything is fp64."""
    generator = torch.Generator().manual_seed(B * 1000 + T * 100 + N * 10 + M)
    block = (N, M) if scan is block_diagonal_scan else (N,)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    gates, values, h0 = draw(B, T, *block, M + 1), draw(B, T, *block), draw(B, N, M)
    reset = torch.rand(B, T, generator=generator) < reset_probability
    return [gates.to(dtype), values.to(dtype), h0.to(state_dtype), reset]


def run(scan, inputs: list[Tensor], gate: str, backend: str) -> list[Tensor]:
    """[h, h_last, dgates, dvalues, dh0] of a random weighing of both outputs."""
    gates, values, h0, reset = inputs
    gates, values, h0 = (x.detach().clone().requires_grad_() for x in (gates, values, h0))
    h, h_last = scan(gates, values, h0, reset, gate, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = []
    for x in (h, h_last):  # numbers that every dtype holds exactly: all backends get the same gradient
        weights.append(torch.randn(x.shape, generator=generator).bfloat16().to(x))
    ((h * weights[0]).sum() + (h_last * weights[1]).sum()).backward()
    return [h.detach(), h_last.detach(), gates.grad, values.grad, h0.grad]


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, infinite where got is not finite."""
    if not got.isfinite().all():
        return float("inf")
    scale = want.double().norm()
    return float((got.double() - want.double()).norm() / (scale if scale > 0 else 1))
