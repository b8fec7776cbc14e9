"""The specification: the recurrences as plain loops over time, differentiated by autograd.

Every faster scan is tested against these functions, on outputs and on all gradients. They are written to be
read, not to be fast. Arguments and results are those of the functions of the same names in `kernels`.

Legend: B batch, T time, N blocks (BD-LRU) or channels (H-LRU), M block size or order; z gate logits, v
values, h state. Gates are normalised and the state is kept in fp32 (fp64 if an input is fp64).
"""

import torch
from torch import Tensor

from .gates import normalise


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any input is fp64, fp32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def block_diagonal_scan(
    gates: Tensor,
    values: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    gate: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """BD-LRU: `h_t = A_t h_{t-1} + a0_t * v_t`, `[A_t[i], a0_t[i]] = normalise(z_t[i])` (docs/design.md)."""
    dtype = compute_dtype(gates, values)
    p = normalise(gates.to(dtype), gate)  # (B, T, N, M, M+1)
    transition, driven = p[..., :-1], p[..., -1] * values.to(dtype)  # (B, T, N, M, M), (B, T, N, M)
    h = torch.zeros_like(driven[:, 0]) if h0 is None else h0.to(dtype)  # (B, N, M)
    states = []
    for t, (a, u) in enumerate(zip(transition.unbind(1), driven.unbind(1), strict=True)):
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0)
        h = (a * h.unsqueeze(-2)).sum(-1) + u
        states.append(h)
    return torch.stack(states, dim=1).to(values.dtype), h


def higher_order_scan(
    gates: Tensor,
    values: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    gate: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """H-LRU: `h_t = sum_{i=1..M} a_{i,t} h_{t-i} + a_{0,t} v_t` (docs/design.md).

    Every coefficient of step t is taken at time t. Multiplying by the transposed companion matrix, as the
    paper's released scan does, is another recurrence.
    """
    dtype = compute_dtype(gates, values)
    p = normalise(gates.to(dtype), gate)  # (B, T, N, M+1)
    taps, driven = p[..., :-1], p[..., -1] * values.to(dtype)  # (B, T, N, M), (B, T, N)
    past = torch.zeros_like(taps[:, 0]) if h0 is None else h0.to(dtype)  # (B, N, M)
    states = []
    for t, (a, u) in enumerate(zip(taps.unbind(1), driven.unbind(1), strict=True)):
        if reset is not None:
            past = past.masked_fill(reset[:, t, None, None], 0)
        h = (a * past).sum(-1) + u
        past = torch.cat([h.unsqueeze(-1), past[..., :-1]], dim=-1)
        states.append(h)
    return torch.stack(states, dim=1).to(values.dtype), past


def matrix_scan(
    transitions: Tensor,
    writes: Tensor,
    values: Tensor,
    queries: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    erase: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """BD-LRU with a matrix for a state: `S_t = blockdiag(A_t) S_{t-1} + k_t v_t^T`, `y_t = S_t^T q_t`; with
    `erase`, v_t - (A_t S_{t-1})^T e_t instead of v_t."""
    dtype = compute_dtype(transitions, writes, values, queries)
    B, T, H, K, M = transitions.shape
    S = values.new_zeros(B, H, K, values.shape[-1], dtype=dtype) if h0 is None else h0.to(dtype)
    outputs = []
    for t in range(T):  # S (B, H, K, V)
        if reset is not None:
            S = S.masked_fill(reset[:, t, None, None, None], 0)
        A, k, v, q = (x[:, t].to(dtype) for x in (transitions, writes, values, queries))
        if M == 1:  # no product of matrices: onnxscript 0.7 makes one of (K, 1) and (K, V) of it
            mixed = A * S
        else:
            mixed = A.unflatten(2, (K // M, M)) @ S.unflatten(2, (K // M, M))  # (B, H, K/M, M, V)
            mixed = mixed.flatten(2, 3)
        if erase is not None:
            v = v - (erase[:, t].to(dtype).unsqueeze(-1) * mixed).sum(-2)
        S = mixed + k.unsqueeze(-1) * v.unsqueeze(-2)
        outputs.append((q.unsqueeze(-1) * S).sum(-2))
    return torch.stack(outputs, dim=1).to(values.dtype), S


def gru_gates(
    inputs: Tensor, h: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r, z, n, q (.., N, M) of a step of `gru_scan`; inputs (.., 3, N, M), h (.., N, M)."""
    # Not a matrix product, which autocast would round. (.., 3, N, M)
    recurrent = (weight * h[..., None, :, None, :]).sum(-1)
    r, z = (inputs[..., :2, :, :] + recurrent[..., :2, :, :] + bias[:2]).sigmoid().unbind(-3)
    q = recurrent[..., 2, :, :] + bias[3]
    return r, z, (inputs[..., 2, :, :] + bias[2] + r * q).tanh(), q


def gru_scan(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Block-diagonal GRU: `h_t = (1 - z_t) n_t + z_t h_{t-1}` (Cho et al., arXiv 1406.1078, as torch has it).

    `r_t = sigmoid(x_r + b_r + U_r h_{t-1})`, z_t alike, `n_t = tanh(x_n + b_n + r_t q_t)`,
    `q_t = U_n h_{t-1} + b_q`.
    """
    dtype = compute_dtype(inputs, weight)
    inputs, weight, bias = inputs.to(dtype), weight.to(dtype), bias.to(dtype)
    h = torch.zeros_like(inputs[:, 0, 0]) if h0 is None else h0.to(dtype)  # (B, N, M)
    states = []
    for t, x in enumerate(inputs.unbind(1)):
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0)
        _, z, n, _ = gru_gates(x, h, weight, bias)
        h = n + z * (h - n)
        states.append(h)
    return torch.stack(states, dim=1), h


def slstm_logits(inputs: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Logits of z, i, f and o (.., N, M) of a step of `slstm_scan`; inputs (.., 4, N, M), h (.., N, M)."""
    # Not a matrix product, which autocast would round.
    return (inputs + bias + (weight * h[..., None, :, None, :]).sum(-1)).unbind(-3)


def slstm_scan(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Block-diagonal sLSTM (arXiv 2405.04517): `c_t = f_t c_{t-1} + i_t z_t`, `n_t = f_t n_{t-1} + i_t`,
    `h_t = o_t c_t / n_t`, i_t = exp(i'), f_t and o_t sigmoids, z_t a tanh, logits of x_t + b + U h_{t-1}.

    The state is h, r = c / n and L = log n, so that no number grows: with a = i_t / n_t, which is
    sigmoid(i' - log f_t - L_{t-1}), `r_t = r_{t-1} + a (z_t - r_{t-1})`. A state of zeros is c = 0, n = 1.
    Returned are h (B, T, N, M), the last state (B, 3, N, M), and r and L of all steps (B, T, 2, N, M).
    """
    dtype = compute_dtype(inputs, weight)
    inputs, weight, bias = inputs.to(dtype), weight.to(dtype), bias.to(dtype)
    state = torch.zeros_like(inputs[:, 0, :3]) if h0 is None else h0.to(dtype)  # (B, 3, N, M)
    states = []
    for t, x in enumerate(inputs.unbind(1)):
        if reset is not None:
            state = state.masked_fill(reset[:, t, None, None, None], 0)
        h, r, L = state.unbind(1)
        z, i, f, o = slstm_logits(x, h, weight, bias)
        kept = torch.nn.functional.logsigmoid(f) + L
        r = r + (i - kept).sigmoid() * (z.tanh() - r)
        state = torch.stack([o.sigmoid() * r, r, torch.logaddexp(i, kept)], dim=1)
        states.append(state)
    h, cells = zip(*((x[:, 0], x[:, 1:]) for x in states), strict=True)
    return torch.stack(h, dim=1), state, torch.stack(cells, dim=1)


def m2rnn_scan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    weight: Tensor,
    keep: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Matrix-to-matrix RNN (Mishra et al., arXiv 2603.14360): `S_t = f_t S_{t-1} + (1 - f_t) Z_t`,
    `Z_t = tanh(S_{t-1} W + k_t v_t^T)`, `y_t = S_t^T q_t`; f is `keep`."""
    dtype = compute_dtype(queries, keys, values, weight, keep)
    inputs, weight = [x.to(dtype) for x in (queries, keys, values, keep)], weight.to(dtype)
    (B, T, H, K), V = queries.shape, values.shape[-1]
    S = values.new_zeros(B, H, K, V, dtype=dtype) if h0 is None else h0.to(dtype)
    outputs = []
    for t in range(T):  # S (B, H, K, V)
        if reset is not None:
            S = S.masked_fill(reset[:, t, None, None, None], 0)
        q, k, v, f = (x[:, t] for x in inputs)
        Z = (S @ weight + k.unsqueeze(-1) * v.unsqueeze(-2)).tanh()
        S = Z + f[..., None, None] * (S - Z)
        outputs.append((q.unsqueeze(-1) * S).sum(-2))
    return torch.stack(outputs, dim=1).to(values.dtype), S
