"""How the Triton scans are launched: rows a lane, steps a group, groups in flight, chunks of time.

Nothing is autotuned. Everything follows from shapes and the device by rules whose numbers were measured on an
H100 (docs/performance.md), so a new B or T compiles again only where a rule crosses one of its few steps.

Legend: B batch, T time, N blocks or channels, M block size or order, K = M + 1 gates a row.
"""

import math
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..triton_device import INTERPRETED, LANES, cdiv, multiprocessors, next_power_of_2

# Bytes of loads in flight an SM, by whether it is the backward pass: enough to cover the latency of HBM. More
# is slower, as copies then come from too many places of memory at once.
IN_FLIGHT = {False: 48_000, True: 40_000}
MOST_STAGES = 8
PLANS = 512  # kept of each kind; a new B, T or layout makes one
# Warps an SM from which two rows a lane are faster: wider loads and fewer shuffles a row, but half the warps.
WARPS_FOR_PAIRS = {False: 2.8, True: 2.2}

# Warps an SM below which more lanes share a row, up to MOST_LANES. Each has less to do a step, but their sums
# must be added by shuffles, so none gets fewer than LEAST_TAPS.
WARPS_FOR_SHARING = 3.8
MOST_LANES, LEAST_TAPS = 4, 4

MIN_STEPS = 1024  # shorter sequences are never cut into chunks
SHORTEST_CHUNK = 64
MOST_STEPS = 16  # chunks are multiples of it, so that every group of steps is whole
ROWS_PER_SM = 96  # rows that keep an SM busy without chunks
# Lanes an SM to aim for, one a block and chunk, by a block's rows rounded up: the fastest of a sweep at B 1.
# More hide the latency of the transfers; fewer leave wide loads to the scan and fewer chunks to join.
LANES_PER_SM = {1: 256, 2: 112, 4: 512, 8: 128, 16: 32}


class Layout(NamedTuple):
    """What a plan depends on of a tensor: plans are kept by it, as making one takes as long as a launch."""

    shape: torch.Size
    strides: tuple[int, ...]
    itemsize: int
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Self:
        return cls(x.shape, x.stride(), x.itemsize, x.device)


def launch_options(
    columns: int, block: int, M: int, T: int, count: int, inputs: tuple[Layout, ...], backward: bool
) -> dict[str, Any]:
    """How many programs (`tiles`) a sequence and chunk has, what a lane owns, and the kernel's options.

    Args:
        columns: rows of one sequence, with padding where that is written.
        block: rows of one block: M, or 1 where a block is a channel.
        M, T: block size or order, steps.
        count: sequences times chunks.
        inputs: tensors of which the kernel reads or writes a batch.
        backward: whether it is the backward kernel.
    """
    like, whole = inputs[0], next_power_of_2(block)
    positions = cdiv(columns, block) * whole
    warps = positions * count / LANES / multiprocessors(like.device)
    share, own, steps, stages = plan(M, block, warps, T, like.itemsize, backward)
    positions *= share
    # The interpreter runs one program after another, so give it few and wide ones.
    width = next_power_of_2(max(LANES, cdiv(positions, own))) if INTERPRETED else LANES
    return {
        "tiles": cdiv(positions, width * own), "SHARE": share, "P": own, "STEPS": steps, "STAGES": stages,
        "WIDTH": width, "ALIGN": batch_alignment(*inputs), "num_warps": 1,
        # a * b + c in one rounding: the error bounds were measured with it. Newer Triton needs asking.
        "enable_fp_fusion": True,
    }  # fmt: skip


def in_order(kernel: Any, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What follows the tensors in a kernel's signature, and its options."""
    # Triton binds arguments faster by position than by name.
    names = [name for name in kernel.arg_names if name in arguments]
    return tuple(arguments.pop(name) for name in names), arguments


class Plan(NamedTuple):
    """How rows and steps are dealt out to lanes."""

    share: int  # lanes a row
    own: int  # rows a lane
    steps: int  # a group
    stages: int  # groups in flight, and the one at work


def plan(M: int, block: int, warps: float, T: int, itemsize: int, backward: bool) -> Plan:
    """A plan for M taps a row in blocks of `block` rows; `warps`: an SM, were a lane to own one row."""
    share = lanes_per_row(M, next_power_of_2(block), warps)
    taps, warps = M // share, warps * share
    pairs = share == 1 and taps <= 8 and next_power_of_2(block) == block
    own = 2 if pairs and warps / 2 >= WARPS_FOR_PAIRS[backward] else 1
    if T == 1:
        return Plan(share, own, 1, 1)
    windows = block == 1 and M > 1  # the backward pass of an H-LRU keeps two windows
    # As many steps as keep the gates of a group in registers.
    steps = 8 if taps * own <= (4 if backward and (own == 2 or windows) else 8) else 4
    loads = taps + (4 if backward else 2)
    group_bytes = warps * LANES * steps * loads * itemsize
    return Plan(share, own, steps, groups_in_flight(group_bytes, backward))


def lanes_per_row(M: int, whole: int, warps: float) -> int:
    """Lanes that share a row of M taps; `whole`: lanes of a block, were each to own one row."""
    # Two where the taps would not fit in one lane's registers, more where warps are few. A block stays in one
    # warp.
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
    """Groups of steps whose loads are in flight, plus the one at work; `group_bytes`: of one group, an SM."""
    return 1 + min(max(round(IN_FLIGHT[backward] / group_bytes), 1), MOST_STAGES - 1)


def batch_alignment(*inputs: Layout) -> int:
    """The largest power of two up to 8 that divides all batch strides."""
    # The compiler sees the other strides, which are constants. Without this one no load would be wider than
    # an element, nor prefetched.
    return math.gcd(8, *(x.strides[0] for x in inputs)) if inputs[0].shape[0] > 1 else 8


def stride_arguments(of_blocks: bool, **inputs: Layout) -> dict[str, int]:
    """Strides by their names in the kernels: of `G` g_b of the batch, G_T of time, G_N of blocks or channels
    and, of BD-LRU, G_I of rows."""
    found = {}
    for name, x in inputs.items():
        found |= {f"{name.lower()}_b": x.strides[0], f"{name}_T": x.strides[1], f"{name}_N": x.strides[2]}
        if of_blocks:
            # With one row any number would do: the block stride lets the kernel see contiguous rows.
            found[f"{name}_I"] = x.strides[3 if x.shape[3] > 1 else 2]
    return found


def reset_flags(reset: Tensor | None) -> Tensor | None:
    """reset (B, T) of any strides as the kernels read it: int32, row after row."""
    return None if reset is None else reset.to(torch.int32, memory_format=torch.contiguous_format)


def time_chunks(groups: int, rows: int, cost: float, T: int, device: torch.device) -> tuple[int, int]:
    """(steps a chunk, chunks) for `groups` groups of `rows` rows, e.g. B * N blocks of M.

    cost: instructions of the chunks' transfers, relative to those of the scan; infinite: never cut time.
    """
    # One chunk reads the gates once, and is right wherever the rows alone fill the device. Cut time costs 1 +
    # `cost` times the work: the transfers, then the scan.
    processors = multiprocessors(device)
    if T < MIN_STEPS or groups * rows * (1 + cost) >= ROWS_PER_SM * processors:
        return T, 1
    wanted = LANES_PER_SM[next_power_of_2(rows)] * processors // groups
    chunk = cdiv(T, max(1, wanted))
    # Whole groups of steps, as the steps left over are taken one by one.
    chunk = max(SHORTEST_CHUNK, cdiv(chunk, MOST_STEPS) * MOST_STEPS)
    return chunk, cdiv(T, chunk)
