"""The block-diagonal sLSTM in Triton: the walk over time and its analytic backward pass, on the GRU's lanes.

    K = L + log sigmoid(f)    a = sigmoid(i - K)    r' = r + a (z - r)    L' = log(e^i + e^K)    h' = o r'

z, i, f and o of x + b + U h; z through tanh, o through a sigmoid. With s_h, s_r and s_L dL/d of the state
after a step, a step passes back, to the logits,

    s_r += s_h o    dz = s_r a (1 - z^2)    do = s_h r' o (1 - o)    share = s_r (z - r) a (1 - a)
    di = share + s_L a    dK = s_L (1 - a) - share    df = dK (1 - sigmoid(f))

and to the state before dL/dL = dK, dL/dr = s_r (1 - a), dL/dh = the sum of U^T d over the four. The forward
pass stores the states of all steps: h, and cells (r, L), which the backward pass alone reads.

Legend: as in `gru_kernels.py`; a state is planes h, r, L.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_device import LOG2E, settle_cache_keys
from .gru_kernels import _biases, _matrices, _of_block, _place, _planes, _states_before, _store_planes
from .gru_triton import _flags, _launch, gradients_of_sums
from .triton_gates import gate_value
from .triton_rows import as_int64, step_flags, tile_of, zero_at_reset


@triton.jit
def _soft_sum(x, y):
    """log(e^x + e^y)."""
    return tl.maximum(x, y) + tl.log(1.0 + tl.exp2(-tl.abs(x - y) * LOG2E))


@triton.jit
def _cell(x, L, z, i, f, o, u, bias, M: tl.constexpr):
    """z, o, a, the logits i and f, and K of a step, from the block's h in x and rows u of the matrices."""
    z, i, f, o = z + bias[0], i + bias[1], f + bias[2], o + bias[3]
    for k in tl.static_range(M):
        i += u[M + k] * x[k]
        f += u[2 * M + k] * x[k]
    for k in tl.static_range(M):  # z and o are needed last
        z += u[k] * x[k]
        o += u[3 * M + k] * x[k]
    kept = L - _soft_sum(f * 0.0, -f)  # log sigmoid(f) = -log(1 + e^-f)
    return gate_value(z, "tanh"), gate_value(o, "sigmoid"), gate_value(i - kept, "sigmoid"), i, f, kept


@triton.jit
def _state(at, valid, NM: tl.constexpr):
    """h, r, L of a state (3, N, M)."""
    found = ()
    for p in tl.static_range(3):
        found = found + (tl.load(at + p * NM, mask=valid, other=0.0),)
    return found


@triton.jit
def _store_state(at, state, valid, NM: tl.constexpr):
    for p in tl.static_range(3):
        tl.store(at + p * NM, state[p], mask=valid)


@triton.jit
def _forward_group(
    state, x_at, h_at, c_at, flags_at, t, mask, first, u, bias, N: tl.constexpr, M: tl.constexpr,
    STEPS: tl.constexpr, WIDTH: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores the states of STEPS steps from t and returns the last."""
    x = _planes(x_at, t, mask, 4, N * M, STEPS, WIDTH)
    if HAS_RESET:
        flags = step_flags(flags_at, t, STEPS, WIDTH)
    hs, rs, Ls = (), (), ()
    for s in tl.static_range(STEPS):
        if HAS_RESET:
            state = zero_at_reset(state, flags[s], 3)
        h, r, L = state
        of_block = _of_block(h, first, M)
        z, o, a, i, _, kept = _cell(of_block, L, x[0][s], x[1][s], x[2][s], x[3][s], u, bias, M)
        r = r + a * (z - r)
        state = (o * r, r, _soft_sum(i, kept))
        hs, rs, Ls = hs + (state[0],), rs + (r,), Ls + (state[2],)
    _store_planes(h_at, (hs,), t, mask, 1, N * M, STEPS, WIDTH)
    _store_planes(c_at, (rs, Ls), t, mask, 2, N * M, STEPS, WIDTH)
    return state


@triton.jit(do_not_specialize=["T", "tiles"])
def slstm_forward_kernel(
    inputs, weight, bias, start, flags, h_out, c_out, last, T, tiles, N: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr,
    HAS_RESET: tl.constexpr,
):  # fmt: skip
    """All states. inputs (B, T, 4, N, M); weight (4, N, M, M), bias (4, N, M), start and last (B, 3, N, M),
    h_out (B, T, N, M) and c_out (B, T, 2, N, M) fp32; flags (B, T) int32. All contiguous."""
    NM: tl.constexpr = N * M
    b, _, n, i, spot, valid, first = _place(tiles, 1, N, M, MP, WIDTH)
    u, biases = _matrices(weight, n, i, valid, 4, N, M, False), _biases(bias, spot, valid, NM)
    x_at, flags_at = inputs + b * T * (4 * NM) + spot, flags + b * T
    h_at, c_at = h_out + b * T * NM + spot, c_out + b * T * (2 * NM) + spot
    mask, at = valid[None, :], b * (3 * NM) + spot
    state = _state(start + at, valid, NM)
    full = T // STEPS * STEPS
    x_many = tile_of(x_at, 4 * NM, STEPS)
    h_many, c_many = tile_of(h_at, NM, STEPS), tile_of(c_at, 2 * NM, STEPS)
    for t_group in tl.range(0, full, STEPS, num_stages=STAGES):
        state = _forward_group(
            state, x_many, h_many, c_many, flags_at, as_int64(t_group), mask, first, u, biases, N, M, STEPS,
            WIDTH, HAS_RESET,
        )  # fmt: skip
    for t_one in range(full, T):
        state = _forward_group(
            state, x_at[None, :], h_at[None, :], c_at[None, :], flags_at, as_int64(t_one), mask, first, u,
            biases, N, M, 1, WIDTH, HAS_RESET,
        )  # fmt: skip
    _store_state(last + at, state, valid, NM)


@triton.jit
def _backward_group(
    owed, sums, x_at, h_at, c_at, g_at, d_at, starts, flags_at, t, mask, first, u, ut, bias,
    N: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Stores the inputs' gradient of STEPS steps from t; returns dL/d of the state before, and the sums."""
    NM: tl.constexpr = N * M
    x, g = _planes(x_at, t, mask, 4, NM, STEPS, WIDTH), _planes(g_at, t, mask, 1, NM, STEPS, WIDTH)[0]
    # Each pointer goes one step back.
    h_before = _states_before(h_at - NM, starts[0][None, :], flags_at, t, mask, NM, STEPS, WIDTH, HAS_RESET)
    r_before = _states_before(
        c_at - 2 * NM, starts[1][None, :], flags_at, t, mask, 2 * NM, STEPS, WIDTH, HAS_RESET
    )
    L_before = _states_before(
        c_at - NM, starts[2][None, :], flags_at, t, mask, 2 * NM, STEPS, WIDTH, HAS_RESET
    )
    if HAS_RESET:
        flags = step_flags(flags_at, t, STEPS, WIDTH)
    d_z, d_i, d_f, d_o = (), (), (), ()
    for s in tl.static_range(STEPS - 1, -1, -1):
        h, r = _of_block(h_before[s], first, M), r_before[s]
        z, o, a, _, f, _ = _cell(h, L_before[s], x[0][s], x[1][s], x[2][s], x[3][s], u, bias, M)
        s_h, s_L = owed[0] + g[s], owed[2]
        s_r = owed[1] + s_h * o
        share = s_r * (z - r) * a * (1.0 - a)
        dz, di = s_r * a * (1.0 - z * z), share + s_L * a
        do = s_h * (r + a * (z - r)) * o * (1.0 - o)
        s_L = s_L * (1.0 - a) - share
        df, s_r = s_L * gate_value(-f, "sigmoid"), s_r * (1.0 - a)
        d = (dz, di, df, do)
        after = ()  # the matrices' gradient, rows of U_z, U_i, U_f, U_o, then the biases'
        for p in tl.static_range(4):
            for k in tl.static_range(M):
                after = after + (sums[p * M + k] + d[p] * h[k],)
        for p in tl.static_range(4):
            after = after + (sums[4 * M + p] + d[p],)
        sums = after
        s_h = tl.zeros([WIDTH], tl.float32)
        for p in tl.static_range(4):
            of_block = _of_block(d[p], first, M)
            for k in tl.static_range(M):
                s_h += ut[p * M + k] * of_block[k]
        owed = (s_h, s_r, s_L)
        if HAS_RESET:
            owed = zero_at_reset(owed, flags[s], 3)
        d_z, d_i, d_f, d_o = (dz,) + d_z, (di,) + d_i, (df,) + d_f, (do,) + d_o
    _store_planes(d_at, (d_z, d_i, d_f, d_o), t, mask, 4, NM, STEPS, WIDTH)
    return owed, sums


@triton.jit(do_not_specialize=["T", "tiles"])
def slstm_backward_kernel(
    inputs, weight, bias, start, flags, h_in, c_in, grad, stop, d_inputs, d_start, sums_out, T, tiles,
    N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    WIDTH: tl.constexpr, HAS_RESET: tl.constexpr,
):  # fmt: skip
    """Gradients from h_in and c_in, the walk's states, all lanes walking back in time.

    As in `slstm_forward_kernel`, and grad (B, T, N, M), stop (B, 3, N, M) fp32: dL/dh of all steps and dL/d
    of the last state; out: d_inputs (B, T, 4, N, M), d_start (B, 3, N, M) fp32, sums_out (B, 4 M + 4, N, M)
    fp32: plane p M + k for column k of the gradient of matrix p, then the four biases'.
    """
    NM: tl.constexpr = N * M
    b, _, n, i, spot, valid, first = _place(tiles, 1, N, M, MP, WIDTH)
    u, ut = _matrices(weight, n, i, valid, 4, N, M, False), _matrices(weight, n, i, valid, 4, N, M, True)
    biases, mask, at = _biases(bias, spot, valid, NM), valid[None, :], b * (3 * NM) + spot
    x_at, d_at = inputs + b * T * (4 * NM) + spot, d_inputs + b * T * (4 * NM) + spot
    h_at, c_at, g_at = h_in + b * T * NM + spot, c_in + b * T * (2 * NM) + spot, grad + b * T * NM + spot
    flags_at, starts, owed = flags + b * T, _state(start + at, valid, NM), _state(stop + at, valid, NM)
    sums = (tl.zeros([WIDTH], tl.float32),) * (4 * M + 4)
    x_many, d_many = tile_of(x_at, 4 * NM, STEPS), tile_of(d_at, 4 * NM, STEPS)
    h_many, g_many = tile_of(h_at, NM, STEPS), tile_of(g_at, NM, STEPS)
    c_many = tile_of(c_at, 2 * NM, STEPS)
    for group in tl.range(0, T // STEPS, num_stages=STAGES):
        owed, sums = _backward_group(
            owed, sums, x_many, h_many, c_many, g_many, d_many, starts, flags_at,
            as_int64(T - (group + 1) * STEPS), mask, first, u, ut, biases, N, M, STEPS, WIDTH, HAS_RESET,
        )  # fmt: skip
    for back in range(T % STEPS):
        owed, sums = _backward_group(
            owed, sums, x_at[None, :], h_at[None, :], c_at[None, :], g_at[None, :], d_at[None, :], starts,
            flags_at, as_int64(T % STEPS - 1 - back), mask, first, u, ut, biases, N, M, 1, WIDTH, HAS_RESET,
        )  # fmt: skip
    for k in tl.static_range(4 * M + 4):
        tl.store(sums_out + (b * (4 * M + 4) + k) * NM + spot, sums[k], mask=valid)
    _store_state(d_start + at, owed, valid, NM)


settle_cache_keys(globals())


class TritonSLSTM:
    """The functions that `gru.py` needs; `TorchSLSTM` there has them in plain torch."""

    @staticmethod
    def walk(
        inputs: Tensor, weight: Tensor, bias: Tensor, h0: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, T, N, M), the last state (B, 3, N, M), and cells (B, T, 2, N, M)."""
        B, T, _, N, M = inputs.shape
        h, cells, last = h0.new_empty(B, T, N, M), h0.new_empty(B, T, 2, N, M), torch.empty_like(h0)
        tensors = {"start": h0, "h_out": h, "c_out": cells, "last": last, **_flags(inputs, reset)}
        _launch(slstm_forward_kernel, h0[:, 0], T, 1, (inputs, weight, bias), 4, **tensors)
        return h, last, cells

    @staticmethod
    def walk_backward(
        inputs: Tensor, weight: Tensor, bias: Tensor, h0: Tensor, reset: Tensor | None, h: Tensor,
        cells: Tensor, grad: Tensor, grad_last: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of inputs, weight, bias and h0."""
        B, T, _, N, M = inputs.shape
        sums = h0.new_empty(B, 4 * M + 4, N, M)
        made = {"d_inputs": torch.empty_like(inputs), "d_start": torch.empty_like(h0), "sums_out": sums}
        _launch(
            slstm_backward_kernel, h0[:, 0], T, 1, (inputs, weight, bias), 8, start=h0, h_in=h, c_in=cells,
            grad=grad, stop=grad_last, **made, **_flags(inputs, reset),
        )  # fmt: skip
        return made["d_inputs"], *gradients_of_sums(sums, 4), made["d_start"]
