"""Both scans in Triton, on the host: launches, chunks of time, and the custom ops around them.

The kernels are in `block_diagonal_kernels.py` and `higher_order_kernels.py`. The number of axes says which
scan it is: gates (B, T, N, M, M+1) and values (B, T, N, M) of BD-LRU, (B, T, N, M+1) and (B, T, N) of H-LRU.

Custom ops are what autograd and torch.compile see, one for both scans. The packed one takes the planes of a
single projection and returns their gradient as one tensor, so that nothing is split, copied or padded around
it.

Legend: B batch, T time, N blocks or channels, M block size or order.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..derivatives import differentiable_once
from ..torch_scan import document_age, register_scan
from ..triton_device import next_power_of_2, on_device
from .block_diagonal_kernels import backward_kernel as block_backward_kernel
from .block_diagonal_kernels import forward_kernel as block_forward_kernel
from .chunk_transfer import block_transfer_cost, channel_transfer_cost, transfer
from .higher_order_kernels import backward_kernel as channel_backward_kernel
from .higher_order_kernels import forward_kernel as channel_forward_kernel
from .triton_gates import INPUT_AT_ZERO
from .triton_launch import PLANS, Layout, in_order, launch_options, reset_flags, stride_arguments, time_chunks

PLAIN = (Tensor, torch.nn.Parameter)  # not fake, distributed or otherwise wrapped tensors


class _Kind(NamedTuple):
    """What the two scans differ in; see `chunk_transfer.py` for the last."""

    forward_kernel: Any
    backward_kernel: Any
    transfer_cost: Callable[[int, str], float]


_BLOCKS = _Kind(block_forward_kernel, block_backward_kernel, block_transfer_cost)
_CHANNELS = _Kind(channel_forward_kernel, channel_backward_kernel, channel_transfer_cost)


def _kind(values: Tensor) -> _Kind:
    return _BLOCKS if values.ndim == 4 else _CHANNELS


def _size(gates: Tensor | Layout, values: Tensor | Layout) -> int:
    """M, the block size or order."""
    return values.shape[3] if len(values.shape) == 4 else gates.shape[-1] - 1


def _kernel_gate(gates: Tensor, values: Tensor, gate: str) -> str:
    """The gate function as kernels name it: gates (.., M) of BD-LRU have no plane for the input gate."""
    return INPUT_AT_ZERO if gates.shape[-1] == _size(gates, values) else gate


@lru_cache(maxsize=PLANS)
def plan_launch(
    inputs: tuple[Layout, ...], n_chunks: int, columns: int | None, **given: Any
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """The grid, the arguments behind the tensors, and the options of a kernel.

    inputs: gates, values and, of the backward pass, dL/dh and dz; given: arguments by their names there.
    """
    gates, values, *rest = inputs
    (B, T, N), block, M = values.shape[:3], values.shape[3:].numel(), _size(gates, values)
    columns, of_blocks = columns or N * block, len(values.shape) == 4
    found = given | launch_options(columns, block, M, T, B * n_chunks, inputs, backward=bool(rest))
    found |= {"M": M, "MP": next_power_of_2(M)} if of_blocks else {"TAPS": M // found["SHARE"]}
    found |= stride_arguments(of_blocks, **dict(zip("GVOD", inputs, strict=False)))
    found |= {"T": T, "n_chunks": n_chunks, "N": N, "COLUMNS": columns, "G_K": gates.strides[-1]}
    kind = _BLOCKS if of_blocks else _CHANNELS
    kernel = kind.backward_kernel if rest else kind.forward_kernel
    return (found["tiles"] * B * n_chunks,), *in_order(kernel, found)


def _chunks(gates: Tensor, values: Tensor, gate: str, cut: bool = False) -> tuple[int, int]:
    """(steps a chunk, chunks) of time; `cut`: also where the gate alone does not allow it."""
    B, T, N = values.shape[:3]
    cost = _kind(values).transfer_cost(_size(gates, values), "identity" if cut else gate)
    return time_chunks(B * N, values.shape[3:].numel(), cost, T, values.device)


def _forward(
    gates: Tensor,
    values: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    columns: int | None = None,
    cut: bool = False,
) -> tuple[Tensor, Tensor]:
    B, _, N = values.shape[:3]
    gate = _kernel_gate(gates, values, gate)
    h = rows_like(values, columns)  # its steps lie `columns` apart, as the planes do
    last = values.new_empty(B, N, _size(gates, values), dtype=torch.float32)
    chunk, n_chunks = _chunks(gates, values, gate, cut)
    if n_chunks > 1:  # few rows: first what each chunk does to the state, then all chunks side by side
        maps = transfer(gates, values, reset, gate, chunk, n_chunks, reverse=False)
        h0 = _chunk_starts(maps, h0)
    if not _fills_columns(values):
        columns = None
    _launch_forward(gates, values, h0, reset, gate, h, last, chunk, n_chunks, columns)
    return h, last


def _launch_forward(gates, values, start, reset, gate, h, last, chunk, n_chunks, columns=None) -> None:
    grid, planned, options = plan_launch(
        (Layout.of(gates), Layout.of(values)), n_chunks, columns, chunk=chunk, GATE=gate, H_T=h.stride(1),
        HAS_START=start is not None, HAS_RESET=reset is not None,
    )  # fmt: skip
    kernel = _kind(values).forward_kernel
    with on_device(values):
        kernel[grid](gates, values, start, reset_flags(reset), h, last, *planned, **options)


def _chunk_starts(maps: Tensor, initial: Tensor | None) -> Tensor:
    """The state before each chunk, (B, C, N, M) fp32.

    maps (B, C, N, M, M+1) fp32: a chunk takes the state x to maps[..., :M] x + maps[..., M].
    """
    # A chunk is one step of a BD-LRU without normalisation, so the same kernel scans over the chunks.
    B, C, N, M, _ = maps.shape
    after, last = maps.new_empty(B, C, N, M), maps.new_empty(B, N, M)
    ones = maps.new_ones(()).expand(B, C, N, M)
    _launch_forward(maps, ones, initial, None, "none", after, last, C, 1)
    first = maps.new_zeros(B, 1, N, M) if initial is None else initial.unsqueeze(1)
    return torch.cat([first, after[:, :-1]], dim=1)


def _backward(
    grad: Tensor, grad_last: Tensor, gates: Tensor, values: Tensor, h0: Tensor | None, h: Tensor,
    reset: Tensor | None, gate: str, d_gates: Tensor, d_values: Tensor, columns: int | None = None,
    summed: bool = False, cut: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dL/dh0 (B, N, M), and where `summed` dz summed over sequences and steps, (M+1, columns), both fp32."""
    B, _, N = values.shape[:3]
    block, M = values.shape[3:].numel(), _size(gates, values)
    kind, gate = _kind(values), _kernel_gate(gates, values, gate)
    d_start = values.new_empty(B, N, M, dtype=torch.float32)
    stop, columns, sums = grad_last.contiguous(), columns or N * block, None
    chunk, n_chunks = _chunks(gates, values, gate, cut)
    if n_chunks > 1:  # the same backwards: the transposed maps, the last chunk first
        maps = transfer(gates, grad, reset, gate, chunk, n_chunks, reverse=True)
        stop = _chunk_starts(maps, stop).flip(1).contiguous()
    if summed:  # a row for each sequence and chunk, not atomics: two runs give the same bits
        sums = values.new_empty(B * n_chunks, M + 1, columns, dtype=torch.float32)
    if reset is not None:  # an H-LRU's taps reach back M steps, so they need to know the document's age
        reset = reset_flags(reset) if kind is _BLOCKS else document_age(reset).to(torch.int32)
    inputs = tuple(map(Layout.of, (gates, values, grad, d_gates)))
    grid, planned, options = plan_launch(
        inputs, n_chunks, columns, chunk=chunk, GATE=gate, H_T=h.stride(1), E_T=d_values.stride(1),
        D_K=d_gates.stride(-1), HAS_START=h0 is not None, HAS_RESET=reset is not None, HAS_SUMS=summed,
    )  # fmt: skip
    with on_device(values):
        kind.backward_kernel[grid](
            gates, values, h, grad, h0, stop, reset, d_gates, d_values, d_start, sums, *planned, **options
        )
    return d_start, None if sums is None else sums[:, : gates.shape[-1]].sum(dim=0)


def _fills_columns(values: Tensor) -> bool:
    """Whether the kernels write the columns beyond the rows too: where rows lie one after the other."""
    return values.ndim == 3 or next_power_of_2(values.shape[3]) == values.shape[3]


def _split(planes: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gates (B, T, *rows, K) and values (B, T, *rows) of planes (B, T, K+1, columns): views."""
    found = planes[..., : math.prod(rows)].view(*planes.shape[:-1], *rows)
    return found[:, :, :-1].movedim(2, -1), found[:, :, -1]


# The custom ops ---------------------------------------------------------------------------------------


def rows_like(values: Tensor, columns: int | None) -> Tensor:
    """A new tensor shaped as `values`: contiguous, or with its steps `columns` elements apart."""
    if columns is None:
        return values.new_empty(values.shape)
    return _rows_of(values.new_empty(*values.shape[:2], columns), values.shape)


def _rows_of(padded: Tensor, shape: torch.Size) -> Tensor:
    """The first columns of padded (B, T, columns), as `shape`."""
    # as_strided, because a view would forget the stride of a lone step.
    T, columns = padded.shape[1:]
    return padded.as_strided(shape, (T * columns, columns, *shape[3:], 1))


def _as_written(h: Tensor, columns: int, padded: bool) -> Tensor:
    """h in the forward kernel's layout; `padded`: whether the padding is read too."""
    # A hook on saved tensors (offloading, compression) may give h back in another layout.
    T, rows = h.shape[1], h.shape[2:].numel()
    step = columns if padded or h.stride(1) == columns else rows
    layout = (T * step, step, *h.shape[3:], 1)  # strides; those of axes of size 1 do not matter
    if all(size == 1 or had == want for size, had, want in zip(h.shape, h.stride(), layout, strict=True)):
        return h
    return _rows_of(functional.pad(h.flatten(2), (0, step - rows)).contiguous(), h.shape)


def _state_like(values: Tensor, M: int) -> Tensor:
    return values.new_empty(values.shape[0], values.shape[2], M, dtype=torch.float32)


def _in_fp32(small: Tensor | None) -> Tensor | None:
    # Outside of the op, so that autograd casts the gradient back to the tensor's own dtype.
    return None if small is None else small.float().contiguous()


def _no_bias(planes: Tensor) -> Tensor:
    return planes.new_empty(0, dtype=torch.float32)


def _runs_directly(*tensors: Tensor) -> bool:
    # In decoding, without gradients or a compiler, the op's bookkeeping would cost 20 us a call for nothing.
    plain = all(type(x) in PLAIN for x in tensors)
    return plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


@torch.library.custom_op("lrnn_lm::scan_triton", mutates_args=())
def _scan(
    gates: Tensor, values: Tensor, h0: Tensor | None, reset: Tensor | None, gate: str
) -> tuple[Tensor, Tensor]:
    return _forward(gates, values, h0, reset, gate)


@torch.library.custom_op("lrnn_lm::scan_triton_backward", mutates_args=())
def _scan_backward(
    grad_h: Tensor, grad_last: Tensor, gates: Tensor, values: Tensor, h0: Tensor | None, h: Tensor,
    reset: Tensor | None, gate: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_gates, d_values = torch.empty_like(gates), values.new_empty(values.shape)
    d_h0, _ = _backward(grad_h, grad_last, gates, values, h0, h, reset, gate, d_gates, d_values)
    return d_gates, d_values, d_h0


def _fake(gates, values, h0, reset, gate):
    return values.new_empty(values.shape), _state_like(values, _size(gates, values))


def _fake_backward(grad_h, grad_last, gates, values, h0, h, reset, gate):
    state = _state_like(values, _size(gates, values))
    return torch.empty_like(gates), values.new_empty(values.shape), state


register_scan(_scan, _scan_backward, _fake, _fake_backward)


def triton_scan(
    gates: Tensor, values: Tensor, h0: Tensor | None, reset: Tensor | None, gate: str
) -> tuple[Tensor, Tensor]:
    """`reference.block_diagonal_scan` or `reference.higher_order_scan`, by the number of axes."""
    run = _forward if _runs_directly(gates, values) else _scan
    return run(gates, values, _in_fp32(h0), reset, gate)


@torch.library.custom_op("lrnn_lm::packed_triton", mutates_args=())
def _packed(
    planes: Tensor, rows: Sequence[int], h0: Tensor | None, reset: Tensor | None, gate: str,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(*_split(planes, rows), h0, reset, gate, planes.shape[-1])


# Inductor pads rows of products to whole lines of 128 bytes. Without this tag it would copy them back to the
# strides that it saw when it traced.
@torch.library.custom_op(
    "lrnn_lm::packed_triton_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def _packed_backward(
    grad_h: Tensor, grad_last: Tensor, planes: Tensor, rows: Sequence[int], h0: Tensor | None, h: Tensor,
    reset: Tensor | None, gate: str, summed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_planes = planes.new_empty(planes.shape)
    (gates, values), (d_gates, d_values) = _split(planes, rows), _split(d_planes, rows)
    columns, used, filled = planes.shape[-1], math.prod(rows), _fills_columns(values)
    if columns > used and not filled:  # the gradient of padding is zero, and weights read it
        d_planes[..., used:].zero_()
    h = _as_written(h, columns, filled)
    d_h0, sums = _backward(
        grad_h, grad_last, gates, values, h0, h, reset, gate, d_gates, d_values,
        columns if filled else None, summed,
    )  # fmt: skip
    return d_planes, d_h0, _no_bias(planes) if sums is None else sums[:, :used].contiguous()


@_packed.register_fake
def _(planes, rows, h0, reset, gate, bias):
    gates, values = _split(planes, rows)
    return rows_like(values, planes.shape[-1]), _state_like(values, _size(gates, values))


@_packed_backward.register_fake
def _(grad_h, grad_last, planes, rows, h0, h, reset, gate, summed):
    gates, values = _split(planes, rows)
    d_bias = _no_bias(planes)
    if summed:
        d_bias = d_bias.new_empty(gates.shape[-1], math.prod(rows))
    return planes.new_empty(planes.shape), _state_like(values, _size(gates, values)), d_bias


def _setup_packed_context(ctx, inputs, output):
    planes, ctx.rows, h0, reset, ctx.gate, _ = inputs
    ctx.save_for_backward(planes, h0, output[0], reset)


def _run_packed_backward(ctx, grad_h, grad_last):
    planes, h0, h, reset = ctx.saved_tensors
    summed = ctx.needs_input_grad[-1]  # not for a frozen bias
    d_planes, d_h0, d_bias = _packed_backward(
        grad_h, grad_last, planes, ctx.rows, h0, h, reset, ctx.gate, summed
    )
    return d_planes, None, None if h0 is None else d_h0, None, None, d_bias if summed else None


_packed.register_autograd(_run_packed_backward, setup_context=_setup_packed_context)
differentiable_once(_packed_backward)


def triton_scan_packed(
    planes: Tensor, rows: Sequence[int], h0: Tensor | None, reset: Tensor | None, gate: str,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`triton_scan` of planes (B, T, K+1, columns): K of gates, then the values.

    rows: (N, M) of BD-LRU, (N,) of H-LRU. bias (K, rows) is in the planes already. Its gradient comes out of
    the kernel that writes the planes' gradient, which would otherwise have to be read once more.
    """
    return _packed(planes, rows, _in_fp32(h0), reset, gate, _in_fp32(bias))
