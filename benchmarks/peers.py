"""The paper's own implementation inside a whole model: torch's associative scan as a backend of the scans.

The backend exists only while a benchmark uses it; `auto` never chooses it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lrnn_lm.kernels import dispatch

from .kernel_peers import associative_scan, companion_scan

ASSOCIATIVE = "associative"


def _check(h0: Tensor | None, reset: Tensor | None, gate: str) -> None:
    if h0 is not None or reset is not None or gate != "softmax":
        raise ValueError(
            "the associative formulation is timed on whole documents from zero, with softmax gates"
        )


def _block_diagonal(
    gates: Tensor, values: Tensor, h0: Tensor | None, reset: Tensor | None, gate: str
) -> tuple[Tensor, Tensor]:
    _check(h0, reset, gate)
    h = associative_scan(gates, values)
    return h, h[:, -1].float()


def _higher_order(
    gates: Tensor, values: Tensor, h0: Tensor | None, reset: Tensor | None, gate: str
) -> tuple[Tensor, Tensor]:
    _check(h0, reset, gate)
    h = companion_scan(gates, values)
    M = gates.shape[-1] - 1
    last = torch.nn.functional.pad(h[:, -M:].float(), (0, 0, max(0, M - h.shape[1]), 0))
    return h, last.flip(1).transpose(1, 2)


@contextmanager
def associative_backend(name: str) -> Iterator[None]:
    """Within it, backend `associative` is there if that is the name; else nothing is changed."""
    if name != ASSOCIATIVE:
        yield
        return
    dispatch.BACKENDS[ASSOCIATIVE] = _block_diagonal, _higher_order
    try:
        yield
    finally:
        del dispatch.BACKENDS[ASSOCIATIVE]
