"""Shapes of the scans that are measured (the paper's sizes), and the least bytes that each must move.

Legend: B batch, T time, N blocks or channels, M block size or order.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrnn_lm.kernels import block_diagonal_scan, higher_order_scan, plane_width, scan_packed


@dataclass(frozen=True)
class Shape:
    """A scan: `family` is a mixer's registry name."""

    family: str
    M: int
    N: int

    def label(self) -> str:
        return f"{'BD' if self.family == 'bd_lru' else 'H'}-LRU M={self.M} N={self.N}"

    def values_shape(self, B: int, T: int) -> tuple[int, ...]:
        return (B, T, self.N, self.M) if self.family == "bd_lru" else (B, T, self.N)

    def scan(self, gates: Tensor, values: Tensor, backend: str) -> Tensor:
        run = block_diagonal_scan if self.family == "bd_lru" else higher_order_scan
        return run(gates, values, backend=backend)[0]

    def planes(self, B: int, T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Random gates and values as the mixers' projection writes them, (B, T, M + 2, columns)."""
        bd = self.family == "bd_lru"
        columns = plane_width(self.N * self.M, self.M) if bd else plane_width(self.N)
        return torch.randn(B, T, self.M + 2, columns, device=device, dtype=dtype)

    def scan_planes(self, planes: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = (self.N, self.M) if self.family == "bd_lru" else (self.N,)
        return scan_packed(planes, rows, bias=bias)[0]

    def moved_bytes(self, B: int, T: int, itemsize: int) -> tuple[int, int]:
        """Least bytes of a forward pass (gates, values, h) and of a backward one (these, dh, dgates,
        dvalues)."""
        values = torch.Size(self.values_shape(B, T)).numel() * itemsize
        gates = values * (self.M + 1)
        return gates + 2 * values, 2 * gates + 4 * values

    def mixer(self) -> dict[str, Any]:
        size = "block_size" if self.family == "bd_lru" else "order"
        return {"type": self.family, "num_blocks": self.N, size: self.M}


PAPER_SHAPES = (
    *(Shape("bd_lru", M, N) for M, N in ((1, 2112), (2, 844), (4, 302), (8, 96), (16, 28))),
    *(Shape("h_lru", M, N) for M, N in ((2, 2112), (4, 1024), (8, 512), (16, 242))),
)
CPU_SHAPES = (Shape("bd_lru", 4, 64), Shape("h_lru", 4, 64))
