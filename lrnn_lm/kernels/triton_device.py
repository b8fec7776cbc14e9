"""What every Triton kernel here needs to know of its device and of Triton."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 32  # threads of a warp
INTERPRETED = triton.knobs.runtime.interpret  # fixed when the kernels are defined
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x LOG2E), which GPUs have an instruction for


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. On the host triton's own takes 3 us a call: kernels may call it too."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n of at least 1; see `cdiv`."""
    return 1 << (n - 1).bit_length()


@cache
def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; an H100's 132 elsewhere, so that compiling without a GPU makes the same choices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def starts_early(device: torch.device) -> bool:
    """Whether a kernel can start before the one ahead of it ends (programmatic dependent launch)."""
    nvidia = not INTERPRETED and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


def on_device(like: Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one: that is where Triton launches."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()


def settle_cache_keys(module: dict[str, Any]) -> None:
    """Hash a module's kernels in order of definition; `module`: its globals.

    Called at the end of every module whose kernels call functions of other modules. Otherwise a kernel's key
    would depend on what ran before it in the process, and other processes would compile it again.
    """
    # In Triton 3.6 `DependenciesFinder._update_hash` (triton/runtime/jit.py) reads the `used_global_vals` of
    # a called function before its `cache_key` fills them; they are complete only if another kernel that calls
    # the function was hashed before. Delete this when torch 2.11 (Triton 3.6) is no longer supported: Triton
    # 3.9 takes the `cache_key` first.
    for function in list(module.values()):
        if isinstance(function, triton.JITFunction):
            _ = function.cache_key
