"""Time of a step by kind and by name of kernel, from torch's profiler.

The kind follows from the kernel's name: names of cuBLAS, cuDNN and flash attention rarely change, Inductor's
begin with `triton_`, this project's are those of the scans.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = (  # the first that fits
    ("scan", r"^((wide_)?(block|channel)_transfer|forward|backward)_kernel|_scan_"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("products", r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitk|s16816|wgmma|aten::(add|b)?mm|aten::mv"),
    ("optimizer", r"multi_tensor|adam|lpnorm|foreach"),
    ("compiled elementwise", r"^triton_"),  # also those that cast or join on the way
    ("copies", r"memcpy|memset|copy_|aten::cat|CatArray"),
)
OTHER = "other elementwise"
# Spans that programs name, on a GPU's timeline too: what is in them is counted by itself.
NAMED = ("Optimizer.", "ProfilerStep", "## Call", "Torch-Compiled Region", "CompiledFunction", "nccl:")


def kernel_times(call: Callable[[], Any], device: torch.device, most: int = 12) -> dict[str, Any]:
    """Milliseconds of one call by kind, and of its `most` longest kernels (operators, on a CPU).

    Returns {"busy_ms", "kinds": {kind: ms}, "kernels": [[name, calls, ms]]}; on a GPU `busy_ms` is less than
    the step where the device waits.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    times: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in recorded.key_averages():
        on_device = event.device_type != DeviceType.CPU
        if on_device != (device.type == "cuda") or event.key.startswith(NAMED):
            continue
        taken = event.self_device_time_total if on_device else event.self_cpu_time_total  # us
        if taken > 0:
            times[event.key][0] += event.count
            times[event.key][1] += taken / 1e3
    kinds: dict[str, float] = defaultdict(float)
    for name, (_, ms) in times.items():
        kinds[kind_of(name)] += ms
    longest = sorted(times.items(), key=lambda item: -item[1][1])[:most]
    return {
        "busy_ms": round(sum(ms for _, ms in times.values()), 3),
        "kinds": {kind: round(ms, 3) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])},
        "kernels": [[name[:90], int(calls), round(ms, 3)] for name, (calls, ms) in longest],
    }


def kind_of(name: str) -> str:
    """The kind of a kernel or operator."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)
