"""BD-LRU in Triton, the host's side: outputs, launches, chunks of time, and the custom ops.

The kernels are in `block_diagonal_kernels.py`.

Legend: B batch, T time, N blocks, M block size.
"""

import torch
import triton
from torch import Tensor

from .block_diagonal_kernels import backward_kernel, forward_kernel
from .chunk_transfer import block_transfer, row_stride
from .chunk_transfer import block_transfer_cost as transfer_cost
from .triton_launch import Launch, reset_flags, time_chunks
from .triton_ops import register, register_packed, rows_like


def _forward(
    gates: Tensor,
    values: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    B, T, N, M = values.shape
    h, last = rows_like(values, columns), values.new_empty(B, N, M, dtype=torch.float32)
    chunk, n_chunks = time_chunks(B * N, M, transfer_cost(M, gate), T, values.device)
    if n_chunks > 1:
        transfer = block_transfer(gates, values, reset, gate, chunk, n_chunks, reverse=False)
        h0 = chunk_starts(transfer, h0)
    _launch_forward(gates, values, h0, reset, gate, h, last, chunk, n_chunks, columns if _fills(M) else None)
    return h, last


def strides(prefix: str, x: Tensor) -> dict[str, int]:
    """Of time, blocks and rows, by their names in the kernels; a lone row keeps the order unbroken."""
    return {f"{prefix}_T": x.stride(1), f"{prefix}_N": x.stride(2), f"{prefix}_I": row_stride(x)}


def _launch_forward(gates, values, start, reset, gate, h, last, chunk, n_chunks, columns=None) -> None:
    B, T, N, M = values.shape
    launch = Launch(columns or N * M, M, M, T, B * n_chunks, (gates, values))
    with launch.device:
        forward_kernel[launch.grid](
            gates, values, start, reset_flags(reset), h, last,
            T, chunk, n_chunks, launch.tiles, gates.stride(0), values.stride(0),
            G_K=gates.stride(4), **strides("G", gates), **strides("V", values), H_T=h.stride(1),
            COLUMNS=columns or N * M, N=N, M=M, MP=triton.next_power_of_2(M), GATE=gate,
            HAS_START=start is not None, HAS_RESET=reset is not None, **launch.options,
        )  # fmt: skip


def chunk_starts(transfer: Tensor, initial: Tensor | None) -> Tensor:
    """The state before each chunk, (B, C, N, M) fp32: a scan over the chunks, by the same kernel,
    unnormalised.

    transfer (B, C, N, M, M+1) fp32: a chunk takes the state x to transfer[..., :M] x + transfer[..., M].
    """
    B, C, N, M, _ = transfer.shape
    after, last = transfer.new_empty(B, C, N, M), transfer.new_empty(B, N, M)
    ones = transfer.new_ones(()).expand(B, C, N, M)
    _launch_forward(transfer, ones, initial, None, "none", after, last, C, 1)
    first = transfer.new_zeros(B, 1, N, M) if initial is None else initial.unsqueeze(1)
    return torch.cat([first, after[:, :-1]], dim=1)


def _backward(
    grad: Tensor, grad_last: Tensor, gates: Tensor, values: Tensor, h0: Tensor | None, h: Tensor,
    reset: Tensor | None, gate: str, d_gates: Tensor, d_values: Tensor, columns: int | None = None,
    summed: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dL/dh0 (B, N, M), and where `summed` dz summed over sequences and steps, (M+1, columns), both fp32."""
    B, T, N, M = values.shape
    padded = triton.next_power_of_2(M)
    d_start = values.new_empty(B, N, M, dtype=torch.float32)
    stop = grad_last.contiguous()
    sums = None
    chunk, n_chunks = time_chunks(B * N, M, transfer_cost(M, gate), T, values.device)
    if n_chunks > 1:
        transfer = block_transfer(gates, grad, reset, gate, chunk, n_chunks, reverse=True)
        stop = chunk_starts(transfer, stop).flip(1).contiguous()
    if summed:
        sums = values.new_empty(B * n_chunks, M + 1, columns or N * M, dtype=torch.float32)
    launch = Launch(columns or N * M, M, M, T, B * n_chunks, (gates, values, grad, d_gates), backward=True)
    with launch.device:
        backward_kernel[launch.grid](
            gates, values, h, grad, h0, stop, reset_flags(reset),
            d_gates, d_values, d_start, sums, T, chunk, n_chunks, launch.tiles,
            gates.stride(0), values.stride(0), grad.stride(0), d_gates.stride(0),
            G_K=gates.stride(4), D_K=d_gates.stride(4), **strides("G", gates), **strides("V", values),
            **strides("O", grad), **strides("D", d_gates), H_T=h.stride(1), E_T=d_values.stride(1),
            COLUMNS=columns or N * M, N=N, M=M, MP=padded, GATE=gate,
            HAS_START=h0 is not None, HAS_RESET=reset is not None,
            HAS_SUMS=summed, **launch.options,
        )  # fmt: skip
    return d_start, None if sums is None else sums.sum(dim=0)


def _split(planes: Tensor, N: int, M: int) -> tuple[Tensor, Tensor]:
    """Gates (B, T, N, M, M+1) and values (B, T, N, M) of planes (B, T, M+2, columns)."""
    rows = planes[..., : N * M].unflatten(-1, (N, M))
    return rows[:, :, : M + 1].permute(0, 1, 3, 4, 2), rows[:, :, M + 1]


def _fills(M: int) -> bool:
    """Whether rows lie one after the other, so that the kernel sees the columns beyond them."""
    return triton.next_power_of_2(M) == M


block_diagonal_scan = register("bd_scan_triton", _forward, _backward)
packed_block_diagonal_scan = register_packed("bd_packed_triton", _split, _forward, _backward, _fills)
