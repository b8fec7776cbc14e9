"""What the tests of every scan share: the grid, the table of tolerances, inputs, a run with all gradients."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lrnn_lm.kernels import block_diagonal_scan, higher_order_scan

SCANS = (block_diagonal_scan, higher_order_scan)
LENGTHS = (1, 2, 7, 63, 64, 65, 100, 257)
SIZES = (1, 2, 3, 4, 5, 8, 16)
NAMES = ("h", "h_last", "gates", "values", "h0")

# relative L2 error of an output or a gradient against the specification in fp64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 2e-3}


def drawing(seed: int) -> tuple[torch.Generator, Callable[..., Tensor]]:
    """A generator, and a function that draws normal numbers of a shape from it in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_inputs(
    scan, B: int = 2, T: int = 16, N: int = 3, M: int = 2, dtype=torch.float32, reset_probability: float = 0.1
) -> list[Tensor]:
    """Random gates, values, h0 and reset of one scan; the state is fp32 unless everything is fp64."""
    generator, draw = drawing(B * 1000 + T * 100 + N * 10 + M)
    block = (N, M) if scan is block_diagonal_scan else (N,)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    gates, values, h0 = draw(B, T, *block, M + 1), draw(B, T, *block), draw(B, N, M)
    reset = torch.rand(B, T, generator=generator) < reset_probability
    return [gates.to(dtype), values.to(dtype), h0.to(state_dtype), reset]


def run(scan, inputs: list[Tensor], gate: str, backend: str) -> list[Tensor]:
    """[h, h_last, dgates, dvalues, dh0] of a random weighing of both outputs."""
    *numbers, reset = inputs
    return with_gradients(lambda *given: scan(*given, reset, gate, backend=backend), numbers)


def with_gradients(
    function: Callable[..., Iterable[Tensor]], inputs: Iterable[Tensor | None]
) -> list[Tensor]:
    """The outputs of a function, and the gradients of a random weighing of them, in the inputs' layout."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    # Numbers that every dtype holds exactly: all backends get the same gradient.
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
    loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    return [*(x.detach() for x in outputs), *gradients]


def in_fp64(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [x.double() if x is not None and x.is_floating_point() else x for x in inputs]


def assert_close(names: Iterable[str], got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    """names: of outputs and inputs, in the order of `with_gradients`; those at the end may be left out."""
    for (x, y), name in zip(zip(got, want, strict=True), names, strict=False):
        assert x.shape == y.shape, name
        error = relative_error(x.cpu(), y)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, infinite where got is not finite."""
    if not got.isfinite().all():
        return float("inf")
    scale = want.double().norm()
    return float((got.double() - want.double()).norm() / (scale if scale > 0 else 1))
