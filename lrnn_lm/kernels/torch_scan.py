"""Both scans in plain torch, fast on a CPU: in-place steps over time, analytic backward, no products of A.

Time is walked in slabs. A slab's gates are normalised at once, its steps are two or three in-place operations
each, and its coefficients are dropped; the backward pass walks the slabs from the end and normalises again.
What is saved for the backward is the inputs and h, so memory is linear in T and the only M^2 terms are the
gates and their gradient.

Backward (docs/design.md, section 2), s_t = dL/dh_t, x_k what gate k multiplies, f and S as in `gates.py`:

    dL/dz_k = s f'(z_k) / S (x_k - sign(f_k) h_t)        softmax: s p_k (x_k - h_t)        none: s x_k
    dL/dv   = s a0

Legend: B batch, T time, N blocks or channels, M block size or order, K = M + 1 gates a row, t steps of a
slab; z gate logits, p coefficients, v values, h state, g = dL/dh as it comes from outside, s = dL/dh in all.
Working tensors put time first and N last: a step is one contiguous slice, and sums over k or i run across
vectors.
"""

import torch
from torch import Tensor

from .derivatives import differentiable_once
from .gates import EPS, L1_GATES, normalise
from .reference import compute_dtype

SLAB_BYTES = 1 << 20  # gates of a slab: near a core's cache, and memory that the allocator gives out again


def _slabs(gates: Tensor) -> list[slice]:
    T = gates.shape[1]
    steps = max(1, min(T, SLAB_BYTES * T // (4 * gates.numel() or 1)))
    return [slice(start, min(start + steps, T)) for start in range(0, T, steps)]


def _slab(x: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    """Steps `part` of (B, T, N, *rest) as (t, *reversed rest, B, N): a contiguous copy in `dtype`."""
    rest = tuple(reversed(range(3, x.ndim)))
    return x[:, part].permute(1, *rest, 0, 2).to(dtype, copy=True, memory_format=torch.contiguous_format)


def _unslab(x: Tensor) -> Tensor:
    """The inverse of `_slab`'s permutation: (t, *reversed rest, B, N) as (B, t, N, *rest)."""
    rest = tuple(reversed(range(1, x.ndim - 2)))
    return x.permute(x.ndim - 2, 0, x.ndim - 1, *rest)


def starts_by_step(reset: Tensor | None, axes: int) -> dict[int, Tensor]:
    """By the steps at which a document starts: in which rows, (B, 1, ..) of so many axes."""
    steps = [] if reset is None else reset.any(0).nonzero().flatten().tolist()
    return {t: reset[:, t].view(-1, *[1] * (axes - 1)) for t in steps}


def _gate_gradient(z: Tensor, p: Tensor, s: Tensor, d: Tensor, h: Tensor, gate: str) -> Tensor:
    """dL/dz of one slab, overwriting d.

    z and p (t, K, ..), s and h (t, 1, ..), d (t, K, ..) holding x: see the module's formula.
    """
    if gate == "softmax":
        return d.sub_(h).mul_(p).mul_(s)
    if gate == "none":
        return d.mul_(s)
    f, df = L1_GATES[gate]
    fz = f(z)
    scale = s / (fz.abs().sum(1, keepdim=True) + EPS)
    return d.sub_(fz.sign_().mul_(h)).mul_(df(z)).mul_(scale)


# BD-LRU: working gates are (t, K, M, B, N), row i of a block at [:, :, i] ----------------------------------


@torch.library.custom_op("lrnn_lm::bd_scan_torch", mutates_args=())
def _bd_scan(
    gates: Tensor, values: Tensor, h0: Tensor, reset: Tensor | None, gate: str
) -> tuple[Tensor, Tensor]:
    B, _, N, M = values.shape
    starts = starts_by_step(reset, 2)
    h_all = torch.empty_like(values)
    h = h0.permute(2, 0, 1).contiguous()  # (M, B, N)
    for part in _slabs(gates):
        p = normalise(_slab(gates, part, h0.dtype), gate, dim=1)
        # p becomes p x: the input's term now, the state's step by step.
        p[:, M].mul_(_slab(values, part, h0.dtype))
        states = torch.empty(p.shape[0], M, B, N, dtype=h0.dtype, device=h0.device)
        for i, (step, out) in enumerate(zip(p.unbind(0), states.unbind(0), strict=True)):
            if part.start + i in starts:
                h = h.masked_fill(starts[part.start + i], 0)
            step[:M].mul_(h.unsqueeze(1))
            torch.sum(step, 0, out=out)
            h = out
        h_all[:, part] = _unslab(states)
    return h_all, h.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("lrnn_lm::bd_scan_torch_backward", mutates_args=())
def _bd_scan_backward(
    grad_h: Tensor,
    grad_last: Tensor,
    gates: Tensor,
    values: Tensor,
    h0: Tensor,
    h: Tensor,
    reset: Tensor | None,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, N, M = values.shape
    dtype = h0.dtype
    starts = starts_by_step(reset, 2)
    d_gates, d_values = torch.empty_like(gates), torch.empty_like(values)
    # (M, B, N), A_{t+1}^T s_{t+1}. A copy, as it is written to: `contiguous` makes none where M is 1, and
    # autograd may hand the same gradient to others.
    carry = grad_last.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
    product = torch.empty(M, M, B, N, dtype=dtype, device=h0.device)
    for part in reversed(_slabs(gates)):
        z = _slab(gates, part, dtype)
        p = normalise(z, gate, dim=1)
        s = _slab(grad_h, part, dtype)  # (t, M, B, N)
        for i, (transition, s_now) in reversed(
            list(enumerate(zip(p[:, :M].unbind(0), s.unbind(0), strict=True)))
        ):
            s_now.add_(carry)
            torch.mul(transition, s_now.unsqueeze(0), out=product)
            torch.sum(product, 1, out=carry)
            if part.start + i in starts:
                carry.masked_fill_(starts[part.start + i], 0)
        states = _slab(h, part, dtype)  # (t, M, B, N)
        before = h0 if part.start == 0 else h[:, part.start - 1].to(dtype)
        before = torch.cat([before.permute(2, 0, 1).unsqueeze(0), states[:-1]])
        if starts:
            before.masked_fill_(reset[:, part].t()[:, None, :, None], 0)
        d = torch.empty_like(p)  # holds x, then dz
        d[:, :M] = before.unsqueeze(2)
        d[:, M] = _slab(values, part, dtype)
        d_values[:, part] = _unslab(s * p[:, M])
        d_gates[:, part] = _unslab(_gate_gradient(z, p, s.unsqueeze(1), d, states.unsqueeze(1), gate))
    return d_gates, d_values, carry.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


# H-LRU: working gates are (t, K, B, N) ---------------------------------------------------------------------


@torch.library.custom_op("lrnn_lm::h_scan_torch", mutates_args=())
def _h_scan(
    gates: Tensor, values: Tensor, h0: Tensor, reset: Tensor | None, gate: str
) -> tuple[Tensor, Tensor]:
    B, _, N = values.shape
    M = h0.shape[-1]
    starts = starts_by_step(reset, 2)
    h_all = torch.empty_like(values)
    past = h0.permute(2, 0, 1)  # (M, B, N), newest first
    for part in _slabs(gates):
        p = normalise(_slab(gates, part, h0.dtype), gate, dim=1)
        # p becomes p x: the input's term now, the state's step by step.
        p[:, M].mul_(_slab(values, part, h0.dtype))
        steps = p.shape[0]
        # Filled from the back: the M states before a step are one slice, newest first, and nothing shifts.
        states = torch.empty(steps + M, B, N, dtype=h0.dtype, device=h0.device)
        states[steps:] = past
        # `alive` forgets at document starts, where `states` must not.
        alive = states.clone() if starts else states
        for i, step in enumerate(p.unbind(0)):
            now = steps - 1 - i
            window = alive[now + 1 : now + 1 + M]
            if part.start + i in starts:
                window.masked_fill_(starts[part.start + i], 0)
            step[:M].mul_(window)
            torch.sum(step, 0, out=alive[now])
            if starts:
                states[now] = alive[now]
        past = alive[:M]
        h_all[:, part] = _unslab(states[:steps].flip(0))
    return h_all, past.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("lrnn_lm::h_scan_torch_backward", mutates_args=())
def _h_scan_backward(
    grad_h: Tensor,
    grad_last: Tensor,
    gates: Tensor,
    values: Tensor,
    h0: Tensor,
    h: Tensor,
    reset: Tensor | None,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    M, dtype = h0.shape[-1], h0.dtype
    starts = starts_by_step(reset, 2)
    age = document_age(reset).t() if starts else None
    d_gates, d_values = torch.empty_like(gates), torch.empty_like(values)
    owed = grad_last.permute(2, 0, 1).contiguous()  # (M, B, N): what the future owes h_{t-i}, at [i]
    for part in reversed(_slabs(gates)):
        z = _slab(gates, part, dtype)
        p = normalise(z, gate, dim=1)
        s = _slab(grad_h, part, dtype)  # (t, B, N)
        for i, (taps, s_now) in reversed(list(enumerate(zip(p[:, :M].unbind(0), s.unbind(0), strict=True)))):
            s_now.add_(owed[0])
            following = taps * s_now
            following[:-1].add_(owed[1:])
            if part.start + i in starts:
                following.masked_fill_(starts[part.start + i], 0)
            owed = following
        d = torch.empty_like(p)  # holds x, then dz
        d[:, :M] = _windows(h, h0, part, age)
        d[:, M] = _slab(values, part, dtype)
        states = _slab(h, part, dtype).unsqueeze(1)  # (t, 1, B, N)
        d_values[:, part] = _unslab(s * p[:, M])
        d_gates[:, part] = _unslab(_gate_gradient(z, p, s.unsqueeze(1), d, states, gate))
    return d_gates, d_values, owed.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


def document_age(reset: Tensor) -> Tensor:
    """(B, T) steps since the document began; in h0's document, before the first start, beyond any order."""
    steps = torch.arange(reset.shape[1], device=reset.device)
    start = torch.where(reset, steps, -(1 << 20)).cummax(dim=1).values
    return steps - start


def _windows(h: Tensor, h0: Tensor, part: slice, age: Tensor | None) -> Tensor:
    """(t, M, B, N): the M states before each step of a slab, newest first, zero before its document."""
    M = h0.shape[-1]
    # (.., B, N), oldest first
    recent = h[:, max(0, part.start - M) : part.stop - 1].transpose(0, 1).to(h0.dtype)
    if part.start < M:
        recent = torch.cat([h0.permute(2, 0, 1).flip(0)[part.start :], recent])
    windows = recent.unfold(0, M, 1).flip(-1).permute(0, 3, 1, 2)
    if age is None:
        return windows
    lag = torch.arange(1, M + 1, device=h.device).view(M, 1, 1)
    return torch.where(age[part].view(-1, 1, h.shape[0], 1) >= lag, windows, 0)


# Shapes for the compiler, autograd, and the public function ------------------------------------------------


def _fake(gates, values, h0, reset, gate):
    return torch.empty_like(values), torch.empty_like(h0, memory_format=torch.contiguous_format)


def _fake_backward(grad_h, grad_last, gates, values, h0, h, reset, gate):
    d_h0 = torch.empty_like(h0, memory_format=torch.contiguous_format)
    return torch.empty_like(gates), torch.empty_like(values), d_h0


def register_scan(scan, backward, fake=_fake, fake_backward=_fake_backward) -> None:
    """Shapes and autograd of an operator (gates, values, h0, reset, gate) and of its backward pass."""

    def setup_context(ctx, inputs, output):
        gates, values, h0, reset, ctx.gate = inputs  # with h, all that is kept: A is computed again
        ctx.save_for_backward(gates, values, h0, output[0], reset)

    def run_backward(ctx, grad_h, grad_last):
        gates, values, h0, h, reset = ctx.saved_tensors
        d_gates, d_values, d_h0 = backward(grad_h, grad_last, gates, values, h0, h, reset, ctx.gate)
        return d_gates, d_values, None if h0 is None else d_h0, None, None

    scan.register_fake(fake)
    backward.register_fake(fake_backward)
    scan.register_autograd(run_backward, setup_context=setup_context)
    differentiable_once(backward)


register_scan(_bd_scan, _bd_scan_backward)
register_scan(_h_scan, _h_scan_backward)


def scan(
    gates: Tensor, values: Tensor, h0: Tensor | None, reset: Tensor | None, gate: str
) -> tuple[Tensor, Tensor]:
    """`reference.block_diagonal_scan` or `higher_order_scan`, by the number of axes: the same to rounding."""
    run, M = (_bd_scan, values.shape[3]) if values.ndim == 4 else (_h_scan, gates.shape[-1] - 1)
    dtype = compute_dtype(gates, values)
    if h0 is None:
        h0 = torch.zeros(values.shape[0], values.shape[2], M, dtype=dtype, device=values.device)
    return run(gates, values, h0.to(dtype), reset, gate)
