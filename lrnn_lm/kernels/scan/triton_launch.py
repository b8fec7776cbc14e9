"""How the Triton kernels are launched: rows a lane, steps a group, groups in flight, chunks of time.

Nothing is autotuned: these follow from shapes and the device by rules whose numbers were measured once on an
H100 (docs/performance.md). A new B or T compiles again only where a rule crosses one of its few steps.

Legend: B batch, T time, N blocks or channels, M block size or order, K = M + 1 gates a row.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..triton_device import INTERPRETED, LANES, multiprocessors, on_device

# Bytes of loads in flight an SM: what covers HBM's latency. More is slower, not faster: copies then come from
# too many places of memory at once.
IN_FLIGHT = {
    False: 48_000,
    True: 40_000,
}  # by whether it is the backward pass, where stores are half of the traffic
MOST_STAGES = 8
# Warps an SM from which two rows a lane pay: wider loads and fewer shuffles a row, but half of the warps.
WARPS_FOR_PAIRS = {False: 2.8, True: 2.2}

# Warps an SM below which more lanes share a row, up to MOST_LANES: each then has less to do a step, but they
# must add up, so that none should have fewer than LEAST_TAPS.
WARPS_FOR_SHARING = 3.8
MOST_LANES, LEAST_TAPS = 4, 4

MIN_STEPS = 1024  # shorter sequences are never cut into chunks
SHORTEST_CHUNK = 64
MOST_STEPS = 16  # what groups of steps divide
ROWS_PER_SM = 96  # a scan of as many rows keeps an SM busy enough
# Lanes that chunks fill an SM with, one a block and chunk, by a block's rows rounded up: what a sweep at B 1
# liked best. Many hide the transfers' latency; few leave wide loads to the scan, and less to relay.
LANES_PER_SM = {1: 256, 2: 112, 4: 512, 8: 128, 16: 32}


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
        like, whole = inputs[0], triton.next_power_of_2(block)
        positions = triton.cdiv(columns, block) * whole
        warps = positions * count / LANES / multiprocessors(like.device)
        share, own, steps, stages = plan(M, block, warps, T, like.element_size(), backward)
        positions *= share
        # The interpreter runs a program at a time: few and wide.
        width = triton.next_power_of_2(max(LANES, triton.cdiv(positions, own))) if INTERPRETED else LANES
        self.tiles = triton.cdiv(positions, width * own)
        self.grid = (self.tiles * count,)
        self.device = on_device(like)
        self.options: dict[str, Any] = {
            "SHARE": share,
            "P": own,
            "STEPS": steps,
            "STAGES": stages,
            "WIDTH": width,
            "ALIGN": batch_alignment(*inputs),
            "num_warps": 1,
            # Contracting a * b + c is what the error bounds were measured with; newer Triton no longer does
            # so unasked.
            "enable_fp_fusion": True,
        }


class Plan(NamedTuple):
    """share: lanes a row; own: rows a lane; steps a group; stages: groups in flight and at work."""

    share: int
    own: int
    steps: int
    stages: int


def plan(M: int, block: int, warps: float, T: int, itemsize: int, backward: bool) -> Plan:
    """How M taps a row in blocks of `block` rows are launched; `warps` is how many there would be an SM with
    one lane a row.

    Steps are as many as keep a group's gates in registers; groups as many as fill IN_FLIGHT.
    """
    share = lanes_per_row(M, triton.next_power_of_2(block), warps)
    taps, warps = M // share, warps * share
    pairs = share == 1 and taps <= 8 and triton.next_power_of_2(block) == block
    own = 2 if pairs and warps / 2 >= WARPS_FOR_PAIRS[backward] else 1
    if T == 1:
        return Plan(share, own, 1, 1)
    windows = block == 1 and M > 1  # an H-LRU's backward pass keeps two
    steps = 8 if taps * own <= (4 if backward and (own == 2 or windows) else 8) else 4
    loads = taps + (4 if backward else 2)
    group_bytes = warps * LANES * steps * loads * itemsize
    return Plan(share, own, steps, groups_in_flight(group_bytes, backward))


def lanes_per_row(M: int, whole: int, warps: float) -> int:
    """Lanes that share a row: two where its taps would not fit one lane's registers, more where warps are
    few. A block, `whole` lanes with one a row, stays in one warp.
    """
    share = 2 if M >= 12 and M % 2 == 0 else 1
    while (
        share < MOST_LANES
        and warps * share < WARPS_FOR_SHARING
        and M % (2 * share) == 0
        and M // (2 * share) >= LEAST_TAPS
        and 2 * share * whole <= LANES
    ):
        share *= 2
    return share


def groups_in_flight(group_bytes: float, backward: bool) -> int:
    """Groups of steps whose loads are under way, and the one at work; `group_bytes`: of one group, an SM."""
    return 1 + min(max(round(IN_FLIGHT[backward] / group_bytes), 1), MOST_STAGES - 1)


def batch_alignment(*inputs: Tensor) -> int:
    """What batch strides are multiples of, up to 8, as the compiler may know; those of time and gates it
    sees. Without it no load is wider than an element, nor fetched ahead.
    """
    return math.gcd(8, *(x.stride(0) for x in inputs)) if inputs[0].shape[0] > 1 else 8


def reset_flags(reset: Tensor | None) -> Tensor | None:
    """reset (B, T) of any strides as the kernels read it: int32, row after row."""
    return None if reset is None else reset.to(torch.int32, memory_format=torch.contiguous_format)


def time_chunks(groups: int, rows: int, cost: float, T: int, device: torch.device) -> tuple[int, int]:
    """(steps a chunk, chunks) for `groups` groups of `rows` rows, e.g. B * N blocks of M.

    One chunk reads the gates once and is the choice wherever the rows alone fill the device. Cut time costs 1
    + `cost` times the work: the chunks' transfers (instructions relative to the scan's; infinite: never cut),
    then the scan.
    """
    processors = multiprocessors(device)
    if T < MIN_STEPS or groups * rows * (1 + cost) >= ROWS_PER_SM * processors:
        return T, 1
    wanted = LANES_PER_SM[triton.next_power_of_2(rows)] * processors // groups
    chunk = triton.cdiv(T, max(1, wanted))
    # Whole groups of steps: the steps left over are walked through one by one.
    chunk = max(SHORTEST_CHUNK, triton.cdiv(chunk, MOST_STEPS) * MOST_STEPS)
    return chunk, triton.cdiv(T, chunk)
