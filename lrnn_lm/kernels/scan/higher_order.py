"""H-LRU in Triton, the host's side: outputs, launches, chunks of time, and the custom ops.

The kernels are in `higher_order_kernels.py`.

Legend: B batch, T time, N channels, M order.
"""

import torch
from torch import Tensor

from .block_diagonal import chunk_starts
from .chunk_transfer import channel_transfer
from .chunk_transfer import channel_transfer_cost as transfer_cost
from .higher_order_kernels import backward_kernel, forward_kernel
from .triton_launch import Launch, reset_flags, time_chunks
from .triton_ops import register, register_packed, rows_like


def _ages(reset: Tensor) -> Tensor:
    """(B, T) int32: steps since the document began; before the first start, older than any order."""
    steps = torch.arange(reset.shape[1], device=reset.device)
    start = torch.where(reset, steps, -(1 << 20)).cummax(dim=1).values
    return (steps - start).to(torch.int32)


def _forward(
    gates: Tensor,
    values: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    B, T, N = values.shape
    M = gates.shape[-1] - 1
    h, last = rows_like(values, columns), values.new_empty(B, N, M, dtype=torch.float32)
    chunk, n_chunks = time_chunks(B * N, 1, transfer_cost(M, gate), T, values.device)
    if n_chunks > 1:
        transfer = channel_transfer(gates, values, reset, gate, chunk, n_chunks, reverse=False)
        h0 = chunk_starts(transfer, h0)
    launch = Launch(columns or N, 1, M, T, B * n_chunks, (gates, values))
    with launch.device:
        forward_kernel[launch.grid](
            gates, values, h0, reset_flags(reset), h, last,
            T, chunk, n_chunks, launch.tiles, gates.stride(0), values.stride(0),
            G_T=gates.stride(1), G_N=gates.stride(2), G_K=gates.stride(3),
            V_T=values.stride(1), V_N=values.stride(2), H_T=h.stride(1), COLUMNS=columns or N,
            N=N, TAPS=M // launch.options["SHARE"], GATE=gate,
            HAS_START=h0 is not None, HAS_RESET=reset is not None, **launch.options,
        )  # fmt: skip
    return h, last


def _backward(
    grad: Tensor, grad_last: Tensor, gates: Tensor, values: Tensor, h0: Tensor | None, h: Tensor,
    reset: Tensor | None, gate: str, d_gates: Tensor, d_values: Tensor, columns: int | None = None,
    summed: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dL/dh0 (B, N, M), and where `summed` dz summed over sequences and steps, (M+1, columns), both fp32."""
    B, T, N = values.shape
    M = gates.shape[-1] - 1
    d_start = values.new_empty(B, N, M, dtype=torch.float32)
    stop = grad_last.contiguous()
    sums = None
    chunk, n_chunks = time_chunks(B * N, 1, transfer_cost(M, gate), T, values.device)
    if n_chunks > 1:
        transfer = channel_transfer(gates, grad, reset, gate, chunk, n_chunks, reverse=True)
        stop = chunk_starts(transfer, stop).flip(1).contiguous()
    if summed:
        sums = values.new_empty(B * n_chunks, M + 1, columns or N, dtype=torch.float32)
    launch = Launch(columns or N, 1, M, T, B * n_chunks, (gates, values, grad, d_gates), backward=True)
    with launch.device:
        backward_kernel[launch.grid](
            gates, values, h, grad, h0, stop, None if reset is None else _ages(reset),
            d_gates, d_values, d_start, sums, T, chunk, n_chunks, launch.tiles,
            gates.stride(0), values.stride(0), grad.stride(0), d_gates.stride(0),
            G_T=gates.stride(1), G_N=gates.stride(2), G_K=gates.stride(3),
            V_T=values.stride(1), V_N=values.stride(2), O_T=grad.stride(1), O_N=grad.stride(2),
            D_T=d_gates.stride(1), D_N=d_gates.stride(2), D_K=d_gates.stride(3),
            E_T=d_values.stride(1), H_T=h.stride(1), COLUMNS=columns or N,
            N=N, TAPS=M // launch.options["SHARE"], GATE=gate,
            HAS_START=h0 is not None, HAS_RESET=reset is not None,
            HAS_SUMS=summed, **launch.options,
        )  # fmt: skip
    return d_start, None if sums is None else sums.sum(dim=0)


def _split(planes: Tensor, N: int, M: int) -> tuple[Tensor, Tensor]:
    """Gates (B, T, N, M+1) and values (B, T, N) of planes (B, T, M+2, columns)."""
    return planes[:, :, : M + 1, :N].transpose(2, 3), planes[:, :, M + 1, :N]


higher_order_scan = register("h_scan_triton", _forward, _backward)
packed_higher_order_scan = register_packed(
    "h_packed_triton", _split, _forward, _backward, fills=lambda M: True
)
