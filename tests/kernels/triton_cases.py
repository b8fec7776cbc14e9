"""What both files of tests of the Triton scans share: a comparison with the specification, on any device."""

from collections.abc import Iterator

import pytest
import torch
from scans import NAMES, TOLERANCE, assert_close, in_fp64, make_inputs, run

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

# The interpreter cuts fp32 to bf16 by truncation where a GPU rounds to nearest: twice the error of one cast.
TOLERANCES = TOLERANCE if GPU else {**TOLERANCE, torch.bfloat16: 2 * TOLERANCE[torch.bfloat16]}


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """`torch.empty` returns NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def inside() -> Iterator[None]:
    """The interpreter refuses an address outside of a kernel's tensors; for a GPU, compute-sanitizer."""
    if GPU:
        yield
        return
    pytest.importorskip("triton")
    import memcheck

    with memcheck.checked():
        yield


def cut_time(monkeypatch, chunk: int) -> None:
    from lrnn_lm.kernels.scan import triton_scans

    cut = lambda groups, rows, cost, T, device: (chunk, -(-T // chunk))  # noqa: E731
    monkeypatch.setattr(triton_scans, "time_chunks", cut)


def to_device(inputs):
    return [x.to(DEVICE) if x is not None else None for x in inputs]


def compare(scan, dtype=torch.float32, gate="softmax", inputs=None, baseline="reference", **shape):
    inputs = make_inputs(scan, dtype=dtype, **shape) if inputs is None else inputs
    wanted = run(scan, in_fp64(inputs), gate, baseline)
    assert_close(NAMES, run(scan, to_device(inputs), gate, "triton"), wanted, TOLERANCES[dtype])
