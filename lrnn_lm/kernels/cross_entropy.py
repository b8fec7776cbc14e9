"""Cross-entropy of rows of logits and its gradient in Triton: two reads and one write of the logits.

A program owns a row. It sums the row's exponentials, then overwrites the logits with softmax minus one-hot.
The second read is from the L2 cache: a row has 100 KB at V 50280 in bf16.

Legend: R rows (tokens), V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_device import INTERPRETED, LOG2E, on_device

LN2 = tl.constexpr(0.6931471805599453)
BLOCK = 256 if INTERPRETED else 8192
WARPS = 16


@triton.jit
def _nats_kernel(
    logits, labels, nats, squares, Z_LOSS, STRIDE: tl.constexpr, V: tl.constexpr, IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """nats (R,) and squares (R,) of log Z, fp32, of each row; the row of logits (R, V), STRIDE apart, becomes
    the gradient of nats + Z_LOSS squares."""
    # V and STRIDE are constants because what divides them decides how wide the loads are. Pieces are [BLOCK].
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * STRIDE
    label = tl.load(labels + row)
    lanes = tl.arange(0, BLOCK)
    if label == IGNORE:  # a row without a target: no loss, and its gradient is zero
        tl.store(nats + row, 0.0)
        tl.store(squares + row, 0.0)
        for start in range(0, V, BLOCK):
            tl.store(at + start + lanes, tl.zeros([BLOCK], logits.dtype.element_ty), mask=start + lanes < V)
    else:
        # A label outside 0 .. V-1 gives NaN, not a wrong number.
        hit = tl.load(at + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
        # One pass for both maximum and sum: the sum so far is rescaled when a larger logit comes. In powers
        # of two.
        most, total = -float("inf"), 0.0
        for start in range(0, V, BLOCK):
            x = tl.load(
                at + start + lanes, mask=start + lanes < V, other=-float("inf"), eviction_policy="evict_last"
            )
            x = x.to(tl.float32) * LOG2E
            larger = tl.maximum(most, tl.max(x, axis=0))
            total = total * tl.exp2(most - larger) + tl.sum(tl.exp2(x - larger), axis=0)
            most = larger
        log_z = most + tl.log2(total)
        tl.store(nats + row, log_z * LN2 - hit)
        tl.store(squares + row, log_z * LN2 * (log_z * LN2))
        scale = 1.0 + 2.0 * Z_LOSS * (log_z * LN2)  # d log Z / d logit is softmax
        for start in range(0, V, BLOCK):  # last use of the row: the cache may drop it, and what is written
            inside = start + lanes < V
            x = tl.load(at + start + lanes, mask=inside, other=0.0, eviction_policy="evict_first")
            p = scale * tl.exp2(x.to(tl.float32) * LOG2E - log_z) - tl.where(start + lanes == label, 1.0, 0.0)
            tl.store(
                at + start + lanes, p.to(logits.dtype.element_ty), mask=inside, eviction_policy="evict_first"
            )


def nats_and_squares_in_place(
    logits: Tensor, labels: Tensor, ignore: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Summed nats () in fp32 of logits (R, V), and the sum () of log^2 Z over rows with a target.

    logits become the gradient of nats + z_loss squares. labels (R,) int64; rows of label `ignore` count for
    nothing, their gradient is zero. A label outside the vocabulary makes the sum NaN.
    """
    R, V = logits.shape
    labels = labels.contiguous()  # a column of a batch's labels is not
    nats, squares = torch.empty(2, R, device=logits.device, dtype=torch.float32)
    with on_device(logits):
        _nats_kernel[(R,)](
            logits, labels, nats, squares, float(z_loss), STRIDE=logits.stride(0), V=V, IGNORE=ignore,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return nats.sum(), squares.sum()
