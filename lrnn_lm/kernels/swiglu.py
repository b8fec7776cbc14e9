"""silu(gate) * up and its gradient in Triton, where one projection has written gate and up side by side.

Why not the compiler: its backward kernel writes both gradients as one tensor by computing each element's
inputs for either half, so it reads them twice (4.2 of 71 ms a step of the 212M hybrid, docs/performance.md).

Legend: R rows (tokens), F the SwiGLU's width. Tiles are [ROWS, COLS].
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .derivatives import differentiable_once, save_inputs
from .triton_device import INTERPRETED, cdiv, on_device

TILE = (64, 64) if INTERPRETED else (4, 512)  # rows, columns
WARPS = 4  # 16 numbers a lane: two loads of 16 bytes in bf16


@triton.jit
def _places(R, F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Row (int64, as offsets may pass 2^31) [ROWS, 1] and column [1, COLS] of a tile; which lie inside."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    return rows, columns, (rows < R) & (columns < F)


@triton.jit
def swiglu_forward_kernel(joint, h, R, F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """h (R, F) of joint (R, 2 F), gate then up; computed in fp32, rounded once."""
    rows, columns, inside = _places(R, F, ROWS, COLS)
    at = joint + rows * (2 * F) + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(h + rows * F + columns, y.to(h.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(joint, d_h, d_joint, R, F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """d_joint (R, 2 F) of joint and d_h (R, F): each number is read and written once."""
    rows, columns, inside = _places(R, F, ROWS, COLS)
    offset = rows * (2 * F) + columns
    gate = tl.load(joint + offset, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(joint + offset + F, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_h + rows * F + columns, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    d_gate = d * up * s * (1.0 + gate * (1.0 - s))  # d silu / d gate = s (1 + gate (1 - s))
    dtype = d_joint.dtype.element_ty
    tl.store(d_joint + offset, d_gate.to(dtype), mask=inside)
    tl.store(d_joint + offset + F, (d * gate * s).to(dtype), mask=inside)


def _launch(kernel: Any, joint: Tensor, *others: Tensor) -> None:
    # A compiler calls a wrapped kernel from the code that it writes, without an operator in between.
    kernel = kernel if INTERPRETED else wrap_triton(kernel)
    R, F = joint.shape[:-1].numel(), joint.shape[-1] // 2
    with on_device(joint):
        kernel[cdiv(R, TILE[0]), cdiv(F, TILE[1])](
            joint, *others, R, F=F, ROWS=TILE[0], COLS=TILE[1], num_warps=WARPS
        )  # fmt: skip


@triton_op("lrnn_lm::swiglu", mutates_args={})
def swiglu(joint: Tensor) -> Tensor:
    """silu(gate) * up, (.., F), of joint (.., 2 F): gate then up. Differentiable once."""
    joint = joint.contiguous()
    h = joint.new_empty(*joint.shape[:-1], joint.shape[-1] // 2)
    _launch(swiglu_forward_kernel, joint, h)
    return h


@triton_op("lrnn_lm::swiglu_backward", mutates_args={})
def _swiglu_backward(d_h: Tensor, joint: Tensor) -> Tensor:
    d_h, joint = d_h.contiguous(), joint.contiguous()
    d_joint = torch.empty_like(joint)
    _launch(swiglu_backward_kernel, joint, d_h, d_joint)
    return d_joint


swiglu.register_autograd(
    lambda ctx, d_h: _swiglu_backward(d_h, *ctx.saved_tensors),
    setup_context=save_inputs,
)
differentiable_once(_swiglu_backward)
