"""Boxes that hold the states of a BD-LRU layer, and how sure the answers are that are read from them.

With one layer a symbol is an affine map of the state, `h -> A h + b`. From where rows start, a box of states
for each state of the task's automaton grows until the boxes hold all states of rows of any length, or an
answer is no longer certain. Bounds include the rounding of fp32; docs/certificate.md has the proof.

Legend: S symbols, Q states of the automaton, N blocks, M block size, D model width, V vocabulary; c, r centre
and radius of a box.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.gates import EPS, L1_GATES, normalise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...data.synthetic.state_tracking import Automaton

UNIT = 2.0**-24  # relative error of one fp32 operation
ULPS = 2.0**-21  # relative error allowed to exp and to a division
VANISHES = 105.0  # exp(-105) is below half of the smallest fp32 number
SWALLOWS = 32.0  # f + 1e-6 is f in fp32 from here on
LARGE = 2.0**50  # sums of squares of such numbers are still far from where fp32 ends
STEPS = 1024  # boxes are followed for this many symbols, then bounded by how much they still grow
FAR = 10**12  # lengths beyond are not told from each other


class Ball(NamedTuple):
    """Numbers within r of c."""

    c: Tensor
    r: Tensor


class Boxes(NamedTuple):
    """States between `low` and `high` (Q, N, M), of the states of the automaton that are reached (Q,)."""

    low: Tensor
    high: Tensor
    reached: Tensor


@dataclass(frozen=True)
class Maps:
    """What each symbol does to the state: `h -> A h + b`, each row of the result to within `error`."""

    A: Tensor  # (S, N, M, M)
    b: Tensor  # (S, N, M)
    error: Tensor  # (S, N, M): of gates, values and the sum, in fp32
    gates: Tensor  # (S, N, M, M+1)
    values: Tensor  # (S, N, M)
    exact: Tensor  # (S, N, M) bool: whether fp32 computes one gate 1 and the others 0
    bound: Tensor  # (N,): the errors are those of states up to here

    def __call__(self, boxes: Boxes) -> tuple[Tensor, Tensor]:
        """Ends (S, Q, N, M), low and high, of what each symbol makes of each box."""
        up, down = self.A.clamp(min=0), (-self.A).clamp(min=0)

        def row(first: Tensor, second: Tensor) -> Tensor:
            ends = torch.einsum("snij,qnj->sqni", up, first)
            return ends - torch.einsum("snij,qnj->sqni", down, second) if down.any() else ends

        # A row that copies an entry copies its ends to the last bit: a box of such rows can stop growing.
        b, error = self.b.unsqueeze(1), self.error.unsqueeze(1)
        return row(boxes.low, boxes.high) + (b - error), row(boxes.high, boxes.low) + (b + error)

    @property
    def shrinks(self) -> Tensor:
        """(N,) the largest absolute sum of a row of A: no two states are further apart after a symbol."""
        return self.A.abs().sum(dim=-1).amax(dim=(0, 2)).clamp(max=1.0)


def affine_maps(model: "PreTrainedModel", symbols: int, exact_division: bool = True) -> Maps:
    """The maps of the first `symbols` ids, of a model in fp64, with bounds of what fp32 makes of them.

    exact_division: whether x / x is 1, as on a CPU; the Triton scan's division is near that only.
    """
    block = model.model.layers[0]
    mixer = block.mixer
    x = block.mixer_norm(model.model.embed_tokens(torch.arange(symbols)))  # (S, D)
    off = _off(x.shape[-1])
    z = mixer.logits(mixer.gate_proj(x).unsqueeze(0))[0]  # (S, N, M, M+1)
    bias = mixer.gate_proj.bias
    size = x.abs() @ mixer.gate_proj.weight.abs().T + (0 if bias is None else bias.abs())
    z_error = off * mixer.logits(size.unsqueeze(0))[0] + ULPS * z.abs()
    v = mixer.value_proj(x).view(symbols, *z.shape[1:3])
    v_error = off * (x.abs() @ mixer.value_proj.weight.abs().T).view_as(v)
    p = normalise(z, mixer.gate)
    exact, p_error = _gate_error(z, z_error, p, mixer.gate)
    if not exact_division:
        exact, p_error = torch.zeros_like(exact), p_error.clamp(min=ULPS)
    p = torch.where(exact.unsqueeze(-1), p.round(), p)
    A, a0 = p[..., :-1], p[..., -1]
    bound = 2 * (v.abs() + v_error).amax(dim=(0, 2))  # (N,); the values alone bound the state by half of it
    rounding = torch.where(exact, 0.0, (mixer.block_size + 3) * UNIT)
    error = (p_error + rounding) * bound.view(1, -1, 1) + a0.abs() * v_error
    return Maps(A, a0 * v, error, p, v, exact, bound)


def _off(width: int) -> float:
    """Relative error of a sum of `width` products in fp32, in any order, of inputs from a norm as wide."""
    return 2 * (width + 8) * UNIT


def _gate_error(z: Tensor, z_error: Tensor, p: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    """Of rows of logits (.., K): whether fp32 makes them a 1 and zeros, and the sum of the gates' errors."""
    winner = p.abs().argmax(dim=-1, keepdim=True)
    one = torch.zeros_like(z, dtype=torch.bool).scatter(-1, winner, True)
    if gate == "softmax":
        gap = z.gather(-1, winner) - z - z_error - z_error.gather(-1, winner)
        exact = ((gap >= VANISHES) | one).all(dim=-1)
        # The odds p / (1 - p) change by at most this factor.
        factor = torch.expm1(2 * z_error.amax(dim=-1))
        changed = (p * (1 - p)).sum(dim=-1) * factor
    else:
        never = torch.full_like(z, -torch.inf)
        low = {"relu": 0.0, "silu": -VANISHES}.get(gate, -torch.inf)  # where f is exactly 0
        zero = torch.where(one, never, z + z_error).amax(dim=-1) < low
        exact = zero & ((z - z_error).gather(-1, winner).squeeze(-1) >= SWALLOWS)
        moved = 1.1 * z_error.sum(dim=-1)  # no f is steeper than 1.1
        total = L1_GATES[gate].f(z).abs().sum(dim=-1) + EPS
        changed = torch.where(total > 2 * moved, 2 * moved / (total - moved), 2.0)
    error = changed + ULPS * p.abs().sum(dim=-1)
    return exact, torch.where(exact, 0.0, error)


def certified_length(
    model: "PreTrainedModel", maps: Maps, automaton: "Automaton", start: int | None
) -> dict[str, Any]:
    """Up to which length all answers are proved right (None: any), and the smallest lead until there."""
    boxes = first = _first_states(maps, automaton, start)
    steps, good = 0, None
    while (margin := _margin(model, maps, automaton, boxes)) > 0:
        good = boxes, steps, margin
        if steps >= STEPS:
            break
        for _ in range(max(1, steps)):
            boxes, steps = _after(maps, automaton, boxes, first), steps + 1
    if good is None:
        return {"length": 0, "margin": margin}
    boxes, steps, margin = good
    growth = _growth(boxes, _after(maps, automaton, boxes, first))  # (N,)
    shrinks = maps.shrinks

    def margin_after(more: float) -> float:
        return _margin(model, maps, automaton, _widened(boxes, growth, shrinks, more))

    if (limit := margin_after(torch.inf)) > 0:
        return {"length": None, "margin": limit}
    low, high = 0, 1
    while high < FAR and margin_after(high) > 0:
        low, high = high, 2 * high
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if margin_after(middle) > 0 else (low, middle)
    # A row of `steps` symbols leads into the boxes, which are asked about one symbol more.
    return {"length": steps + low + 1, "margin": margin_after(low) if low else margin}


def _first_states(maps: Maps, automaton: "Automaton", start: int | None) -> Boxes:
    """The box of the automaton's first state before any symbol."""
    low, high = maps.b.new_zeros(2, len(automaton.labels), *maps.b.shape[1:])
    reached = torch.zeros(len(low), dtype=torch.bool)
    reached[automaton.start] = True
    if start is not None:  # the start symbol's input gate and value, as the state before it is zero
        low[automaton.start] = maps.b[start] - maps.error[start]
        high[automaton.start] = maps.b[start] + maps.error[start]
    return Boxes(low, high, reached)


def _after(maps: Maps, automaton: "Automaton", boxes: Boxes, first: Boxes) -> Boxes:
    """The boxes that hold the first states, and all states one symbol after those in `boxes`."""
    unreached = ~first.reached.view(-1, 1, 1)
    low, high = first.low.masked_fill(unreached, torch.inf), first.high.masked_fill(unreached, -torch.inf)
    image_low, image_high = maps(boxes)
    for symbol, targets in enumerate(torch.from_numpy(automaton.table)):
        use = boxes.reached & (targets >= 0)
        index = targets[use].view(-1, 1, 1).expand(-1, *low.shape[1:])
        low.scatter_reduce_(0, index, image_low[symbol, use], "amin")
        high.scatter_reduce_(0, index, image_high[symbol, use], "amax")
    reached = (low <= high).flatten(1).all(dim=1)
    low[~reached] = high[~reached] = 0.0
    return Boxes(low, high, reached)


def _growth(before: Boxes, after: Boxes) -> Tensor:
    """(N,) how far the boxes after a step reach beyond those before it."""
    if not torch.equal(before.reached, after.reached):
        return torch.full_like(before.low[0, :, 0], torch.inf)
    over = torch.maximum(after.high - before.high, before.low - after.low)  # (Q, N, M)
    return over.amax(dim=(0, 2)).clamp(min=0.0)


def _widened(boxes: Boxes, growth: Tensor, shrinks: Tensor, more: float) -> Boxes:
    """What holds the boxes `more` steps later: a step's growth is at most `shrinks` of that before."""
    total = growth * (1 / (1 - shrinks)).clamp(max=more)  # of 1 + shrinks + shrinks^2 ..
    wider = torch.where(growth > 0, total, 0.0).view(1, -1, 1)
    return Boxes(boxes.low - wider, boxes.high + wider, boxes.reached)


def _margin(model: "PreTrainedModel", maps: Maps, automaton: "Automaton", boxes: Boxes) -> float:
    """By how much the right logit surely leads after any symbol that follows a state of the boxes."""
    table = torch.from_numpy(automaton.table)
    labels = torch.from_numpy(automaton.labels)[table.clamp(min=0)]
    can_come = (table >= 0) & boxes.reached  # (S, Q)
    asked = can_come & (labels >= 0)
    low, high = (end[: len(table)] for end in maps(boxes))
    # Beyond, errors are not bounded: also those of states without a question, which later ones come from.
    if not (torch.maximum(-low, high)[can_come] <= maps.bound.view(1, -1, 1)).all():
        return -float("inf")
    if not asked.any():
        return float("inf")
    low, high = low[asked], high[asked]
    symbol = torch.arange(len(table)).view(-1, 1).expand_as(table)[asked]
    return float(_lead(model, symbol, Ball((low + high) / 2, (high - low) / 2), labels[asked]).min())


def _lead(model: "PreTrainedModel", symbol: Tensor, states: Ball, label: Tensor) -> Tensor:
    """(n,) how much the logit of `label` leads the others at least; symbol (n,), states (n, N, M)."""
    block = model.model.layers[0]
    y = _linear(Ball(states.c.flatten(1), states.r.flatten(1)), block.mixer.out_proj.weight)
    x = model.model.embed_tokens(symbol)
    hidden = _rounded(x + y.c, y.r, UNIT)
    u = _norm(hidden, block.mlp_norm)
    gate, up = _linear(u, block.mlp.gate_proj.weight), _linear(u, block.mlp.up_proj.weight)
    silu = torch.nn.functional.silu(gate.c)
    gate = Ball(silu, 1.1 * gate.r + 4 * ULPS * gate.c.abs())  # silu is nowhere steeper than 1.1
    product = gate.c * up.c
    r = gate.c.abs() * up.r + up.c.abs() * gate.r + gate.r * up.r
    down = _linear(_rounded(product, r, UNIT), block.mlp.down_proj.weight)
    hidden = _rounded(hidden.c + down.c, hidden.r + down.r, UNIT)
    last = _norm(hidden, model.model.norm)
    W = model.lm_head.weight  # (V, D)
    logits = last.c @ W.T
    lead = torch.empty(len(label), dtype=W.dtype)
    rounding = _off(W.shape[1]) * ((last.c.abs() + last.r) @ W.abs().T)
    for answer in label.unique():
        rows = label == answer
        ahead = logits[rows][:, answer, None] - logits[rows]
        ahead -= last.r[rows] @ (W[answer] - W).abs().T + rounding[rows] + rounding[rows][:, answer, None]
        ahead[:, answer] = torch.inf
        lead[rows] = ahead.amin(dim=-1)
    return lead.nan_to_num(nan=-torch.inf)


def _rounded(c: Tensor, r: Tensor, off: float) -> Ball:
    """Numbers within r of c that fp32 has to a relative `off`: the larger they are, the further off."""
    size = c.abs() + r
    return Ball(c, torch.where(size < LARGE, r + off * size, torch.inf))


def _linear(x: Ball, weight: Tensor) -> Ball:
    return Ball(x.c @ weight.T, _rounded(*x, _off(weight.shape[1])).r @ weight.abs().T)


def _norm(x: Ball, norm: torch.nn.RMSNorm) -> Ball:
    """Of z within r of c: |z / s(z) - c / s(c)| <= (r + |c| q / s(c)) / (s(c) - q), as s moves by up to q."""
    s = (x.c.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    q = x.r.square().mean(dim=-1, keepdim=True).sqrt()
    smallest = (s - q).clamp(min=norm.eps**0.5)
    c, weight = x.c / s, norm.weight
    r = _rounded(c, (x.r + c.abs() * q) / smallest, _off(weight.numel())).r
    return Ball(c * weight, r * weight.abs())
