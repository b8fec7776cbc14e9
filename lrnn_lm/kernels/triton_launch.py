"""Host side of the Triton kernels: launch shapes, the rule for chunks of time, and the custom ops around
them.

Nothing is autotuned: block and group sizes follow from the order M alone, so a new B or T neither compiles
nor tunes.

Legend: B batch, T time, N blocks or channels, M block size or order, K = M + 1 gates a row.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

LANES = 32  # one warp a program: the kernels exchange state by warp shuffles only
PLAIN = (Tensor, torch.nn.Parameter)  # not fake, distributed or otherwise wrapped
INTERPRETED = triton.knobs.runtime.interpret  # fixed when the kernels are defined

MIN_STEPS = 1024  # shorter sequences are never cut into chunks
SHORTEST_CHUNK = 64
ROWS_PER_SM = 64  # a scan of as many rows keeps an SM busy
LANES_PER_SM = 256  # what chunks fill an SM to


class Launch:
    """How a kernel with one lane a row is launched: tiles of lanes, one warp each, and the kernel's options.

    Args:
        like: a tensor on the device.
        lanes: lanes of one sequence and one chunk.
        steps: steps a group, i.e. whose loads are in flight together.
    """

    def __init__(self, like: Tensor, lanes: int, steps: int) -> None:
        # The interpreter runs a program at a time: few and wide.
        block = triton.next_power_of_2(max(LANES, lanes)) if INTERPRETED else LANES
        self.tiles = triton.cdiv(lanes, block)
        self.device = on_device(like)
        # Contracting a * b + c is what the error bounds were measured with; newer Triton no longer does so
        # unasked.
        self.options: dict[str, Any] = {
            "STEPS": steps,
            "BLOCK": block,
            "num_warps": 1,
            "enable_fp_fusion": True,
        }

    def grid(self, count: int) -> tuple[int]:
        return (self.tiles * count,)


def lanes_per_row(M: int) -> int:
    """Long rows are shared by two lanes: there are few of them (28 blocks of 16, 242 channels), and each is
    long."""
    return 2 if M >= 12 and M % 2 == 0 else 1


def steps_in_flight(taps: int, T: int, backward: bool) -> int:
    """Steps whose loads a lane with `taps` + 1 gates a step issues together, a power of two.

    More steps keep more bytes in flight, which is what covers HBM's latency. The limit is compile time:
    Triton's coalescing pass is cubic in the operations of the unrolled body, and these choices keep it to
    seconds.
    """
    if T == 1:
        return 1
    if backward:
        return 8 if taps == 1 else 4 if taps <= 8 else 2
    return 16 if taps <= 2 else 8 if taps <= 8 else 4


def on_device(like: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()


def time_chunks(groups: int, rows: int, cost: float, T: int, device: torch.device) -> tuple[int, int]:
    """(steps a chunk, chunks) for `groups` groups of `rows` rows, e.g. B * N blocks of M.

    One chunk reads the gates once and is the choice wherever the rows alone fill the device. Cut time costs 1
    + `cost` times the work: the chunks' transfers (instructions relative to the scan's; infinite: never cut),
    then the scan.
    """
    multiprocessors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    )
    if T < MIN_STEPS or groups * rows * (1 + cost) >= ROWS_PER_SM * multiprocessors:
        return T, 1
    wanted = LANES_PER_SM * multiprocessors // groups
    chunk = max(SHORTEST_CHUNK, triton.cdiv(T, max(1, wanted)))
    return chunk, triton.cdiv(T, chunk)


Forward = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, str], tuple[Tensor, Tensor]]


def register(name: str, forward: Forward, backward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Forward:
    """The differentiable custom op `lrnn_lm::name`, opaque to torch.compile, and its backward op.

    forward(gates, values, h0, reset, gate) -> (h, h_last), both new tensors, h_last (B, N, M) fp32;
    backward(grad_h, grad_last, gates, values, h0, h, reset, gate) -> (d_gates, d_values, d_h0).
    """

    @torch.library.custom_op(f"lrnn_lm::{name}", mutates_args=())
    def scan(
        gates: Tensor, values: Tensor, h0: Tensor | None, reset: Tensor | None, gate: str
    ) -> tuple[Tensor, Tensor]:
        return forward(gates, values, h0, reset, gate)

    @torch.library.custom_op(f"lrnn_lm::{name}_backward", mutates_args=())
    def scan_backward(
        grad_h: Tensor,
        grad_last: Tensor,
        gates: Tensor,
        values: Tensor,
        h0: Tensor | None,
        h: Tensor,
        reset: Tensor | None,
        gate: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backward(grad_h, grad_last, gates, values, h0, h, reset, gate)

    def state_like(gates: Tensor, values: Tensor) -> Tensor:
        return values.new_empty(values.shape[0], values.shape[2], gates.shape[-1] - 1, dtype=torch.float32)

    @scan.register_fake
    def _(gates, values, h0, reset, gate):
        return values.new_empty(values.shape), state_like(gates, values)

    @scan_backward.register_fake
    def _(grad_h, grad_last, gates, values, h0, h, reset, gate):
        return torch.empty_like(gates), values.new_empty(values.shape), state_like(gates, values)

    def setup_context(ctx, inputs, output):
        gates, values, h0, reset, ctx.gate = inputs
        ctx.save_for_backward(gates, values, h0, output[0], reset)

    def run_backward(ctx, grad_h, grad_last):
        gates, values, h0, h, reset = ctx.saved_tensors
        d_gates, d_values, d_h0 = scan_backward(grad_h, grad_last, gates, values, h0, h, reset, ctx.gate)
        return d_gates, d_values, d_h0 if h0 is not None else None, None, None

    scan.register_autograd(run_backward, setup_context=setup_context)

    def public(
        gates: Tensor, values: Tensor, h0: Tensor | None, reset: Tensor | None, gate: str
    ) -> tuple[Tensor, Tensor]:
        # h0 is small: the cast is autograd's, so its gradient comes back in its own dtype.
        h0 = None if h0 is None else h0.float().contiguous()
        plain = type(gates) in PLAIN and type(values) in PLAIN
        if plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return forward(
                gates, values, h0, reset, gate
            )  # decoding: the op's bookkeeping costs 20 us a call
        return scan(gates, values, h0, reset, gate)

    public.__doc__ = f"Triton `lrnn_lm::{name}`: see the function of the same shapes in `reference.py`."
    return public
