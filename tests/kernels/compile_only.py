"""Compiles every kernel for Hopper without a GPU, through the host code that launches them.

The interpreter never sees what a compiler may refuse (a constexpr assigned twice, an argument that is None)
or how arguments bind to a launch. Here the driver is one that knows its target and launches nothing. Run as a
script, `compile_only.py smallest | everything`, in a process where TRITON_INTERPRET is not set; it prints the
names of the kernels that it compiled.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

COMPILED: list[str] = []
SHARED_MEMORY = 232_448  # bytes that a program may have on Hopper
CUBINS: list[bytes] = []  # of each


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
        compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
        if sum(len(cache[0]) for cache in kernel.device_caches.values()) > before:
            COMPILED.append(f"{kernel.__module__.rsplit('.', 1)[-1]}.{kernel.__name__}")
            CUBINS.append(compiled.asm["cubin"])
            assert compiled.metadata.shared <= SHARED_MEMORY, (COMPILED[-1], compiled.metadata.shared)

    return call


def stack_bytes(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", said.stdout)[1])


def check_spilled(first: int, most: int) -> None:
    """Lanes of the kernels from `first` on take at most so many bytes for what registers do not hold."""
    spilled = [*zip(COMPILED[first:], map(stack_bytes, CUBINS[first:]), strict=True)]
    assert max(size for _, size in spilled) <= most, spilled


def launch_step(D: int, inner: int, M: int, dtype: torch.dtype, N: int = 64) -> None:
    """Every kernel of a fused decoding step of a sequence, with early weights as on the target."""
    from lrnn_lm.kernels.decode.fused_step import linear_step, mix_step

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    x, norm = empty(1, D), empty(D)
    for window in (False, True):
        rows = (M + 2) * (N if window else N * M)
        mix_step(x, norm, 1e-6, empty(rows, D), empty(rows), torch.empty(1, N, M), "softmax", window)
    linear_step(empty(1, N * M), empty(D, N * M), residual=x)
    linear_step(x, empty(2 * inner, D), norm, 1e-6, gated=True)
    linear_step(empty(1, inner), empty(D, inner), residual=x)
    linear_step(x, empty(50_280, D), norm, 1e-6)


def launch_tiles(B: int, D: int, inner: int, M: int, N: int = 64) -> None:
    """Every kernel of a fused decoding step of B sequences."""
    from lrnn_lm.kernels.decode.fused_tiles import Stream, Workspace, mix_step, normed_step, residual_step

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16)

    squares, workspace = torch.empty(B, triton.cdiv(D, 32)), Workspace(torch.device("cpu"))
    stream = Stream(empty(B, D), empty(B, D), squares)
    for window in (False, True):
        rows = (M + 2) * (N if window else N * M)
        mix_step(stream, 1e-6, empty(rows, D), empty(rows), torch.empty(B, N, M), "softmax", window)
    residual_step(empty(B, N * M), empty(D, N * M), stream, empty(D), workspace)
    normed_step(stream, 1e-6, empty(2 * inner, D), gated=True)
    normed_step(stream, 1e-6, empty(50_280, D))


def launch_all(
    M: int, T: int, gate: str, states: bool, chunk: int | None = None, fixed: bool = False
) -> None:
    """`fixed`: a BD-LRU whose input gate has no logits."""
    from lrnn_lm.kernels.scan import triton_scans

    B, N = 2, 5
    h0 = torch.zeros(B, N, M) if states else None
    reset = torch.zeros(B, T, dtype=torch.bool) if states else None
    triton_scans.time_chunks = lambda *_: (chunk or T, -(-T // (chunk or T)))
    for block in ((N, M), (N,)):
        K = M if fixed and len(block) == 2 else M + 1
        gates = torch.zeros(B, T, K, *block, dtype=torch.bfloat16).movedim(2, -1)
        values = torch.zeros(B, T, *block, dtype=torch.bfloat16)
        h, last = triton_scans._forward(gates, values, h0, reset, gate)
        triton_scans._backward(
            values, last, gates, values, h0, h, reset, gate, torch.empty_like(gates),
            torch.empty_like(values), summed=states,
        )  # fmt: skip


def launch_matrix(M: int, dtype: torch.dtype, T: int, states: bool, V: int = 64, K: int = 64) -> None:
    """Every kernel of the scan of a matrix-valued state."""
    from lrnn_lm.kernels.scan import matrix

    B, H = 2, 2
    gates = torch.zeros(B, T, M + 1, H, K)
    transitions, writes = gates[:, :, :M].permute(0, 1, 3, 4, 2), gates[:, :, M]
    values, queries = torch.zeros(B, T, H, V, dtype=dtype), torch.zeros(B, T, H, K, dtype=dtype)
    h0 = torch.zeros(B, H, K, V) if states else None
    reset = torch.zeros(B, T, dtype=torch.bool) if states else None
    y, last = matrix._scan(transitions, writes, values, queries, h0, reset, None)
    matrix._scan_backward(y, last, transitions, writes, values, queries, h0, reset, None)


def launch_erase(M: int, dtype: torch.dtype, V: int = 64, K: int = 64) -> None:
    """Every kernel of the same scan where writes erase."""
    from lrnn_lm.kernels.scan.matrix import matrix_scan_triton

    B, T, H = 2, 33, 2
    gates = torch.zeros(B, T, M + 1, H, K, requires_grad=True)
    transitions, writes = gates[:, :, :M].permute(0, 1, 3, 4, 2), gates[:, :, M]
    values = torch.zeros(B, T, H, V, dtype=dtype)
    y, last = matrix_scan_triton(
        transitions, writes, values, writes.to(dtype), torch.zeros(B, H, K, V), None, writes
    )
    (y.sum() + last.sum()).backward()


def launch_gru(M: int, dtype: torch.dtype, T: int = 40, resets: bool = False) -> None:
    """Every kernel of the block-diagonal GRU."""
    from lrnn_lm.kernels.scan.gru_triton import TritonGRU

    B, N = 2, 8
    h0, reset = torch.zeros(B, N, M), torch.zeros(B, T, dtype=torch.bool) if resets else None
    inputs = torch.zeros(B, T, 3, N, M, dtype=dtype)
    given = (inputs, torch.zeros(3, N, M, M), torch.zeros(4, N, M), h0, reset)
    h, last = TritonGRU.walk(*given)
    TritonGRU.linearise(*given, h)
    TritonGRU.steps_backward(*given, h, h)
    TritonGRU.walk_backward(*given, h, h, last)


def launch_slstm(M: int, dtype: torch.dtype, T: int = 40, resets: bool = False) -> None:
    """Both kernels of the block-diagonal sLSTM."""
    from lrnn_lm.kernels.scan.slstm_kernels import TritonSLSTM

    B, N = 2, 8
    h0, reset = torch.zeros(B, 3, N, M), torch.zeros(B, T, dtype=torch.bool) if resets else None
    inputs = torch.zeros(B, T, 4, N, M, dtype=dtype)
    given = (inputs, torch.zeros(4, N, M, M), torch.zeros(4, N, M), h0, reset)
    h, last, cells = TritonSLSTM.walk(*given)
    TritonSLSTM.walk_backward(*given, h, cells, h, last)


def launch_m2rnn(K: int, V: int, dtype: torch.dtype, B: int = 2, resets: bool = False) -> None:
    """Both kernels of the matrix-to-matrix RNN."""
    from lrnn_lm.kernels.scan.m2rnn_triton import TritonM2RNN

    T, H, L = 70, 8, 64
    q, v = (torch.zeros(B, T, H, size, dtype=dtype) for size in (K, V))
    reset = torch.zeros(B, T, dtype=torch.bool) if resets else None
    given = q, q, v, torch.zeros(H, V, V), torch.zeros(B, T, H), torch.zeros(B, H, K, V), reset
    states = torch.zeros(B, H, 1, K, V)
    y, last = TritonM2RNN.walk(*given, states, L)
    TritonM2RNN.walk_backward(*given, states, L, y, last)


def launch_wide_transfer(M: int) -> None:
    from lrnn_lm.kernels.scan.chunk_transfer import transfer

    gates = torch.zeros(1, 32, M + 1, 3, M, dtype=torch.bfloat16).movedim(2, -1)
    transfer(gates, gates[..., 0], None, "softmax", 16, 2, reverse=False)


def launch_loss(V: int) -> None:
    from lrnn_lm.kernels.cross_entropy import nats_and_squares_in_place

    nats_and_squares_in_place(
        torch.zeros(2, V, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.long), -100, 0.0
    )


def launch_swiglu(F: int) -> None:
    from lrnn_lm.kernels.swiglu import swiglu

    swiglu(torch.zeros(8, 2 * F, dtype=torch.bfloat16, requires_grad=True)).sum().backward()


def smallest() -> None:
    """Every kernel, at the smallest sizes: scans in chunks of time, steps of decoding, loss, SwiGLU."""
    launch_all(1, 40, "softmax", states=True, chunk=16)
    launch_wide_transfer(16)
    launch_gru(2, torch.bfloat16, T=1, resets=True)
    launch_slstm(2, torch.bfloat16, T=1, resets=True)
    launch_m2rnn(16, 16, torch.bfloat16)
    launch_erase(1, torch.bfloat16, V=16, K=16)  # with the kernels of scans that do not erase
    launch_loss(50_280)
    launch_swiglu(2464)
    launch_step(768, 2048, 4, torch.bfloat16)
    launch_tiles(8, 768, 2048, 4)


def everything() -> None:
    """Sizes, dtypes and gates that compile differently; minutes."""
    launch_all(2, 40, "softmax", states=False)
    assert len(COMPILED) == 4, COMPILED
    launch_all(2, 96, "softmax", states=False)
    assert len(COMPILED) == 4, "another T compiled again"
    launch_all(3, 40, "tanh", states=True, chunk=16)
    launch_all(2, 40, "softmax", states=True, chunk=16, fixed=True)
    launch_all(2, 1, "silu", states=True)  # of one step
    smallest()
    launch_matrix(1, torch.bfloat16, 33, states=False)
    first = len(COMPILED)
    launch_matrix(4, torch.bfloat16, 64, states=False)
    launch_matrix(1, torch.float32, 33, states=True)
    assert len(COMPILED) == first + 10, COMPILED[first:]
    launch_matrix(4, torch.bfloat16, 96, states=False)
    assert len(COMPILED) == first + 10, "another T compiled again"
    # The most: the backward pass from chunk to chunk in fp32, two 64 x 64 states in four warps' registers.
    check_spilled(first, 127)
    launch_matrix(4, torch.float32, 33, states=True)  # these spill: the largest states that fit
    launch_matrix(16, torch.bfloat16, 33, states=True, V=128)
    launch_erase(1, torch.bfloat16)
    launch_erase(4, torch.float32)
    first = len(COMPILED)
    launch_erase(1, torch.bfloat16, V=256, K=128)  # several programs a head: the heads of recurrent.yaml
    check_spilled(first, 0)
    first = len(COMPILED)
    launch_gru(8, torch.bfloat16, resets=True)
    launch_slstm(8, torch.bfloat16, resets=True)
    launch_m2rnn(64, 16, torch.bfloat16, resets=True)  # four warps a state, then one and two
    launch_m2rnn(64, 16, torch.bfloat16, B=96)
    launch_m2rnn(64, 16, torch.float32, B=96)
    check_spilled(first, 0)
    first = len(COMPILED)
    launch_step(2048, 5504, 16, torch.bfloat16)
    launch_step(4096, 11_008, 1, torch.bfloat16)
    launch_step(4096, 11_008, 1, torch.float32)
    launch_tiles(64, 768, 2048, 4)
    launch_tiles(64, 2048, 5504, 16)
    check_spilled(first, 63)


if __name__ == "__main__":
    driver.set_active(CompileOnly())
    JITFunction.__getitem__ = compile_instead
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    {"smallest": smallest, "everything": everything}[sys.argv[1]]()
    print(*sorted(set(COMPILED)))
