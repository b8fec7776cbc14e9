"""Compiles every kernel for Hopper without a GPU, through the host code that launches them.

The interpreter never sees what a compiler may refuse (a constexpr assigned twice, an argument that is None)
or how arguments bind to a launch. Here the driver is one that knows its target and launches nothing. Run as a
script, in a process where TRITON_INTERPRET is not set.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

COMPILED: list[str] = []


class CompileOnly:
    """What triton asks a driver before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead(kernel: JITFunction, grid):
    """`kernel[grid]` that compiles and returns; notes what was not in the kernel's cache."""

    def call(*args, **kwargs) -> None:
        before = sum(len(cache[0]) for cache in kernel.device_caches.values())
        kernel.run(*args, grid=grid, warmup=True, **kwargs)
        if sum(len(cache[0]) for cache in kernel.device_caches.values()) > before:
            COMPILED.append(kernel.__name__)

    return call


def launch_all(M: int, T: int, gate: str, states: bool, chunk: int | None = None) -> None:
    from lrnn_lm.kernels import block_diagonal, higher_order

    B, N = 2, 5
    h0 = torch.zeros(B, N, M) if states else None
    reset = torch.zeros(B, T, dtype=torch.bool) if states else None
    for module, block in ((block_diagonal, (N, M)), (higher_order, (N,))):
        module.time_chunks = lambda *_: (chunk or T, -(-T // (chunk or T)))
        gates = torch.zeros(B, T, M + 1, *block, dtype=torch.bfloat16).movedim(2, -1)
        values = torch.zeros(B, T, *block, dtype=torch.bfloat16)
        h, last = module._forward(gates, values, h0, reset, gate)
        module._backward(
            values, last, gates, values, h0, h, reset, gate, torch.empty_like(gates),
            torch.empty_like(values), summed=states,
        )  # fmt: skip


if __name__ == "__main__":
    driver.set_active(CompileOnly())
    JITFunction.__getitem__ = compile_instead
    launch_all(2, 40, "softmax", states=False)
    assert len(COMPILED) == 4, COMPILED
    launch_all(2, 96, "softmax", states=False)
    assert len(COMPILED) == 4, "another T compiled again"
    launch_all(3, 40, "tanh", states=True, chunk=16)
    launch_all(2, 1, "silu", states=True)
    print(f"compiled {len(COMPILED)} kernels for sm_90")
