"""The block-diagonal GRU in Triton, on the host: launches of `gru_kernels.py`, and its scans; see `gru.py`.

Legend: B batch, T time, N blocks, M block size.
"""

from typing import Any

import torch
from torch import Tensor

from ..triton_device import INTERPRETED, LANES, cdiv, multiprocessors, next_power_of_2, on_device
from .gru_kernels import linearise_kernel, walk_backward_kernel, walk_kernel
from .triton_launch import groups_in_flight, reset_flags
from .triton_scans import _backward, _forward

PROGRAMS_PER_SM = 8  # of the kernels whose steps do not wait for each other
SHORTEST_CHUNK = 32


def _launch(kernel: Any, h0: Tensor, T: int, chunks: int, tensors: tuple, loads: int, **options: Any) -> None:
    """Launch a kernel on rows like h0 (B, N, M). loads: numbers of 4 bytes that a row reads a step."""
    B, N, M = h0.shape
    MP = next_power_of_2(M)
    # The interpreter runs one program after another, so give it few and wide ones.
    width = next_power_of_2(max(LANES, N * MP)) if INTERPRETED else LANES
    tiles = cdiv(N * MP, width)
    # Fewer where a step keeps many registers: at M = 16 the walk back needs nearly all of a lane.
    steps = 1 if T == 1 else (8 if M <= 8 else 4) if loads < 5 else 4 if M <= 4 else 2
    warps = tiles * B * chunks / multiprocessors(h0.device)
    stages = groups_in_flight(warps * LANES * steps * loads * 4, backward=loads > 4)
    with on_device(h0):
        kernel[(tiles * B * chunks,)](
            *tensors, T=T, tiles=tiles, N=N, M=M, MP=MP, STEPS=steps, STAGES=stages, WIDTH=width, num_warps=1,
            enable_fp_fusion=True, **options,
        )  # fmt: skip


def _time_chunks(h0: Tensor, T: int) -> dict[str, int]:
    """Chunks of time for kernels whose steps do not wait: as many as fill the device."""
    B, N, M = h0.shape
    warps = B * cdiv(N * next_power_of_2(M), LANES)
    wanted = max(1, PROGRAMS_PER_SM * multiprocessors(h0.device) // warps)
    chunk = max(SHORTEST_CHUNK, cdiv(cdiv(T, wanted), 8) * 8)
    return {"chunk": chunk, "n_chunks": cdiv(T, chunk)}


def _flags(inputs: Tensor, reset: Tensor | None) -> dict[str, Any]:
    return {"flags": inputs if reset is None else reset_flags(reset), "HAS_RESET": reset is not None}


def _steps_backward(
    inputs: Tensor, weight: Tensor, bias: Tensor, h0: Tensor, reset: Tensor | None, h: Tensor, grad: Tensor,
    chunks: dict[str, int], **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, N, M = h.shape
    d_inputs, n_chunks = torch.empty_like(inputs), chunks["n_chunks"]
    # A row for each sequence and chunk, not atomics: two runs give the same bits.
    sums = h.new_empty(B * n_chunks, 3 * M + 4, N, M)
    tensors = {"start": h0, "h_in": h, "grad": grad, "d_inputs": d_inputs, "sums_out": sums}
    _launch(
        walk_backward_kernel, h0, T, n_chunks, (inputs, weight, bias), 5, **chunks, **tensors,
        **_flags(inputs, reset), **options,
    )  # fmt: skip
    return d_inputs, *gradients_of_sums(sums, 3)


def gradients_of_sums(sums: Tensor, G: int) -> tuple[Tensor, Tensor]:
    """Gradients of weight (G, N, M, M) and bias (4, N, M) from kernels' sums (programs, G M + 4, N, M)."""
    d_weight, d_bias = sums.sum(dim=0).split([sums.shape[1] - 4, 4])
    d_weight = d_weight.unflatten(0, (G, -1)).permute(0, 2, 3, 1)
    return d_weight.clone(memory_format=torch.contiguous_format), d_bias.clone()


class TritonGRU:
    """The functions that `gru.py` needs; `TorchGRU` there has them in plain torch."""

    @staticmethod
    def walk(
        inputs: Tensor, weight: Tensor, bias: Tensor, h0: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """h (B, T, N, M) and the last (B, N, M)."""
        B, T = inputs.shape[:2]
        h, last = h0.new_empty(B, T, *h0.shape[1:]), torch.empty_like(h0)
        tensors = {"start": h0, "h_out": h, "last": last, **_flags(inputs, reset)}
        _launch(walk_kernel, h0, T, 1, (inputs, weight, bias), 3, **tensors)
        return h, last

    @staticmethod
    def linearise(
        inputs: Tensor, weight: Tensor, bias: Tensor, h0: Tensor, reset: Tensor | None, h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[J, 1] (B, T, N, M, M+1) at the states h, and f(h_{t-1}) - h_t (B, T, N, M)."""
        B, T, N, M = h.shape
        planes, error, chunks = h.new_empty(B, T, M + 1, N, M), torch.empty_like(h), _time_chunks(h0, T)
        tensors = {"start": h0, "h_in": h, "planes": planes, "error": error, **_flags(inputs, reset)}
        _launch(linearise_kernel, h0, T, chunks["n_chunks"], (inputs, weight, bias), 5, **chunks, **tensors)
        return planes.permute(0, 1, 3, 4, 2), error

    @staticmethod
    def scan(gates: Tensor, values: Tensor, h0: Tensor, reset: Tensor | None) -> Tensor:
        """d (B, T, N, M) of `d_t = J_t d_{t-1} + values`."""
        return _forward(gates, values, h0, reset, "none", cut=True)[0]

    @staticmethod
    def reverse_scan(
        grad: Tensor, grad_last: Tensor, gates: Tensor, h0: Tensor, h: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """s (B, T, N, M) of `s_t = grad_t + J_{t+1}^T s_{t+1}`, and dL/dh0."""
        # The gradient of the values, whose weight is 1, is s; that of the gates comes with it, unused.
        s, ones = torch.empty_like(h), h.new_ones(()).expand(h.shape)
        d_gates = torch.empty_like(gates)
        d_h0, _ = _backward(grad, grad_last, gates, ones, h0, h, reset, "none", d_gates, s, cut=True)
        return s, d_h0

    @staticmethod
    def walk_backward(
        inputs: Tensor, weight: Tensor, bias: Tensor, h0: Tensor, reset: Tensor | None, h: Tensor,
        grad: Tensor, grad_last: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of inputs, weight, bias and h0, walking back in time."""
        d_h0 = torch.empty_like(h0)
        chunks = {"chunk": h.shape[1], "n_chunks": 1}
        given = inputs, weight, bias, h0, reset
        return *_steps_backward(*given, h, grad, chunks, stop=grad_last, d_start=d_h0, CHAIN=True), d_h0

    @staticmethod
    def steps_backward(
        inputs: Tensor, weight: Tensor, bias: Tensor, h0: Tensor, reset: Tensor | None, h: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of inputs, weight and bias from s = dL/dh of every step."""
        chunks = _time_chunks(h0, h.shape[1])
        return _steps_backward(
            inputs, weight, bias, h0, reset, h, s, chunks, stop=h0, d_start=h0, CHAIN=False
        )
