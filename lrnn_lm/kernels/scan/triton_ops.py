"""The custom ops around the Triton scans: what autograd and torch.compile see of them.

Each scan has two forms. One takes gates and values. The packed one takes the planes of a single projection
and returns their gradient as one tensor, so that nothing is split, copied or padded around it.

Legend: B batch, T time, N blocks or channels, M block size or order.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

PLAIN = (Tensor, torch.nn.Parameter)  # not fake, distributed or otherwise wrapped tensors

Scan = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, str], tuple[Tensor, Tensor]]
PackedScan = Callable[
    [Tensor, int, int, Tensor | None, Tensor | None, str, Tensor | None], tuple[Tensor, Tensor]
]


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


def register(name: str, forward: Callable, backward: Callable) -> Scan:
    """The differentiable custom op `lrnn_lm::name`, opaque to torch.compile, and its backward op.

    forward(gates, values, h0, reset, gate) -> (h, h_last), both new tensors, h_last (B, N, M) fp32;
    backward(grad_h, grad_last, gates, values, h0, h, reset, gate, d_gates, d_values) fills its last two
    arguments and returns (d_h0, None).
    """

    @torch.library.custom_op(f"lrnn_lm::{name}", mutates_args=())
    def scan(
        gates: Tensor, values: Tensor, h0: Tensor | None, reset: Tensor | None, gate: str
    ) -> tuple[Tensor, Tensor]:
        return forward(gates, values, h0, reset, gate)

    @torch.library.custom_op(f"lrnn_lm::{name}_backward", mutates_args=())
    def scan_backward(
        grad_h: Tensor, grad_last: Tensor, gates: Tensor, values: Tensor, h0: Tensor | None, h: Tensor,
        reset: Tensor | None, gate: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        d_gates, d_values = torch.empty_like(gates), values.new_empty(values.shape)
        d_h0, _ = backward(grad_h, grad_last, gates, values, h0, h, reset, gate, d_gates, d_values)
        return d_gates, d_values, d_h0

    @scan.register_fake
    def _(gates, values, h0, reset, gate):
        return values.new_empty(values.shape), _state_like(values, gates.shape[-1] - 1)

    @scan_backward.register_fake
    def _(grad_h, grad_last, gates, values, h0, h, reset, gate):
        state = _state_like(values, gates.shape[-1] - 1)
        return torch.empty_like(gates), values.new_empty(values.shape), state

    def setup_context(ctx, inputs, output):
        gates, values, h0, reset, ctx.gate = inputs  # with h, all that is kept: A is computed again
        ctx.save_for_backward(gates, values, h0, output[0], reset)

    def run_backward(ctx, grad_h, grad_last):
        gates, values, h0, h, reset = ctx.saved_tensors
        d_gates, d_values, d_h0 = scan_backward(grad_h, grad_last, gates, values, h0, h, reset, ctx.gate)
        return d_gates, d_values, d_h0 if h0 is not None else None, None, None

    scan.register_autograd(run_backward, setup_context=setup_context)

    def public(
        gates: Tensor, values: Tensor, h0: Tensor | None, reset: Tensor | None, gate: str
    ) -> tuple[Tensor, Tensor]:
        run = forward if _runs_directly(gates, values) else scan
        return run(gates, values, _in_fp32(h0), reset, gate)

    return public


def register_packed(
    name: str,
    split: Callable[[Tensor, int, int], tuple[Tensor, Tensor]],
    forward: Callable,
    backward: Callable,
    fills: Callable[[Tensor], bool],
) -> PackedScan:
    """`register` for planes (B, T, M + 2, columns).

    split(planes, N, M) -> gates, values; forward and backward as in `register`, with the number of columns as
    one more argument, and backward with whether to return the gates' gradient summed over (B, T) too;
    fills(values): whether backward writes zeros to the columns beyond the rows.

    bias (M+1, rows) fp32 is in the planes already. Its gradient comes out of the kernel that writes the
    planes' gradient, which would otherwise have to be read once more.
    """

    @torch.library.custom_op(f"lrnn_lm::{name}", mutates_args=())
    def scan(
        planes: Tensor, N: int, M: int, h0: Tensor | None, reset: Tensor | None, gate: str,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return forward(*split(planes, N, M), h0, reset, gate, planes.shape[-1])

    # Inductor pads rows of products to whole lines of 128 bytes. Without this tag it would copy them back to
    # the strides that it saw when it traced.
    @torch.library.custom_op(f"lrnn_lm::{name}_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,))
    def scan_backward(
        grad_h: Tensor, grad_last: Tensor, planes: Tensor, N: int, M: int, h0: Tensor | None, h: Tensor,
        reset: Tensor | None, gate: str, summed: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        d_planes = planes.new_empty(planes.shape)
        (gates, values), (d_gates, d_values) = split(planes, N, M), split(d_planes, N, M)
        columns, rows = planes.shape[-1], values[0, 0].numel()
        filled = fills(values)
        if columns > rows and not filled:  # the gradient of padding is zero, and weights read it
            d_planes[..., rows:].zero_()
        h = _as_written(h, columns, filled)
        d_h0, sums = backward(
            grad_h, grad_last, gates, values, h0, h, reset, gate, d_gates, d_values,
            columns if filled else None, summed,
        )  # fmt: skip
        d_bias = _no_bias(planes) if sums is None else sums[:, :rows].contiguous()
        return d_planes, d_h0, d_bias

    @scan.register_fake
    def _(planes, N, M, h0, reset, gate, bias):
        values = split(planes, N, M)[1]
        return rows_like(values, planes.shape[-1]), _state_like(values, M)

    @scan_backward.register_fake
    def _(grad_h, grad_last, planes, N, M, h0, h, reset, gate, summed):
        values = split(planes, N, M)[1]
        rows = values.shape[2:].numel()
        d_bias = values.new_empty(M + 1, rows, dtype=torch.float32) if summed else _no_bias(planes)
        return planes.new_empty(planes.shape), _state_like(values, M), d_bias

    def setup_context(ctx, inputs, output):
        planes, ctx.N, ctx.M, h0, reset, ctx.gate, _ = inputs
        ctx.save_for_backward(planes, h0, output[0], reset)

    def run_backward(ctx, grad_h, grad_last):
        planes, h0, h, reset = ctx.saved_tensors
        summed = ctx.needs_input_grad[-1]  # not for a frozen bias
        d_planes, d_h0, d_bias = scan_backward(
            grad_h, grad_last, planes, ctx.N, ctx.M, h0, h, reset, ctx.gate, summed
        )
        d_h0, d_bias = d_h0 if h0 is not None else None, d_bias if summed else None
        return d_planes, None, None, d_h0, None, None, d_bias

    scan.register_autograd(run_backward, setup_context=setup_context)

    def public(
        planes: Tensor, N: int, M: int, h0: Tensor | None, reset: Tensor | None, gate: str,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return scan(planes, N, M, _in_fp32(h0), reset, gate, _in_fp32(bias))

    return public
