"""How the Triton kernels are launched: rows a lane, steps a group, groups in flight, chunks of time.

Nothing is autotuned: these follow from shapes and the device by rules whose numbers were measured once on an
H100 (docs/performance.md). A new B or T compiles again only where a rule crosses one of its few steps.

Legend: B batch, T time, N blocks or channels, M block size or order, K = M + 1 gates a row.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

LANES = 32  # one warp a program: the kernels exchange state by warp shuffles only
INTERPRETED = triton.knobs.runtime.interpret  # fixed when the kernels are defined

# Bytes of loads in flight an SM: what covers HBM's latency. More is slower, not faster: copies then come from
# too many places of memory at once.
IN_FLIGHT = {
    False: 48_000,
    True: 40_000,
}  # by whether it is the backward pass, where stores are half of the traffic
MOST_STAGES = 8
# Warps an SM from which two rows a lane pay: wider loads and fewer shuffles a row, but half of the warps.
WARPS_FOR_PAIRS = {False: 2.8, True: 1.9}

MIN_STEPS = 1024  # shorter sequences are never cut into chunks
SHORTEST_CHUNK = 64
ROWS_PER_SM = 64  # a scan of as many rows keeps an SM busy
LANES_PER_SM = 256  # what chunks fill an SM to


class Launch:
    """How a kernel is launched: how many programs of one warp, what a lane owns, and the kernel's options.

    Args:
        columns: rows of one sequence, with padding where that is to be written.
        block: rows of one block: M, or 1 where a block is a channel.
        M, T: block size or order, steps.
        count: sequences times chunks.
        inputs: tensors whose batches the kernel steps over.
        backward: whether it is the backward kernel.
    """

    def __init__(
        self,
        columns: int,
        block: int,
        M: int,
        T: int,
        count: int,
        inputs: tuple[Tensor, ...],
        backward: bool = False,
    ) -> None:
        share = lanes_per_row(M)
        positions = triton.cdiv(columns, block) * triton.next_power_of_2(block) * share
        like = inputs[0]
        warps = positions * count / LANES / multiprocessors(like.device)
        pairs = share == 1 and triton.next_power_of_2(block) == block
        own, steps, stages = plan(M // share, warps, pairs, T, like.element_size(), backward)
        # The interpreter runs a program at a time: few and wide.
        width = triton.next_power_of_2(max(LANES, triton.cdiv(positions, own))) if INTERPRETED else LANES
        self.tiles = triton.cdiv(positions, width * own)
        self.grid = (self.tiles * count,)
        self.device = on_device(like)
        # What the compiler may know of batch strides; those of time and gates it sees.
        align = math.gcd(8, *(x.stride(0) for x in inputs)) if like.shape[0] > 1 else 8
        self.options: dict[str, Any] = {
            "SHARE": share,
            "P": own,
            "STEPS": steps,
            "STAGES": stages,
            "WIDTH": width,
            "ALIGN": align,
            "num_warps": 1,
            # Contracting a * b + c is what the error bounds were measured with; newer Triton no longer does so
            # unasked.
            "enable_fp_fusion": True,
        }


def plan(taps: int, warps: float, pairs: bool, T: int, itemsize: int, backward: bool) -> tuple[int, int, int]:
    """(rows a lane, steps a group, groups in flight and at work) for `warps` warps an SM of one row a lane with
    `taps` + 1 gates.

    Steps are as many as keep a group's gates in registers; groups as many as fill IN_FLIGHT.
    """
    own = 2 if pairs and taps <= 8 and warps / 2 >= WARPS_FOR_PAIRS[backward] else 1
    if T == 1:
        return own, 1, 1
    steps = 8 if taps * own <= (4 if backward and own == 2 else 8) else 4
    loads = taps + (4 if backward else 2)
    group_bytes = warps * LANES * steps * loads * itemsize
    return own, steps, 1 + min(max(round(IN_FLIGHT[backward] / group_bytes), 1), MOST_STAGES - 1)


def lanes_per_row(M: int) -> int:
    """Long rows are shared by two lanes: there are few of them (28 blocks of 16, 242 channels), and each is
    long."""
    return 2 if M >= 12 and M % 2 == 0 else 1


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def on_device(like: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()


def time_chunks(groups: int, rows: int, cost: float, T: int, device: torch.device) -> tuple[int, int]:
    """(steps a chunk, chunks) for `groups` groups of `rows` rows, e.g. B * N blocks of M.

    One chunk reads the gates once and is the choice wherever the rows alone fill the device. Cut time costs 1
    + `cost` times the work: the chunks' transfers (instructions relative to the scan's; infinite: never cut),
    then the scan.
    """
    processors = multiprocessors(device)
    if T < MIN_STEPS or groups * rows * (1 + cost) >= ROWS_PER_SM * processors:
        return T, 1
    wanted = LANES_PER_SM * processors // groups
    chunk = max(SHORTEST_CHUNK, triton.cdiv(T, max(1, wanted)))
    return chunk, triton.cdiv(T, chunk)
