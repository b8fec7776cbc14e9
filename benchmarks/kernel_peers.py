"""The scans' peers in `lrnn bench kernels`: torch's associative scan, and flash-linear-attention's kernels.

A peer is built for one shape and gives a forward call and the tensors to differentiate with respect to. Peers
of fla compute other recurrences; they show what the same state or the same number of gate values costs there.

Legend: B batch, T time, N blocks or channels, M block size or order, D width of the state (N M, or N).
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrnn_lm.kernels import normalise


class Peer(NamedTuple):
    name: str
    forward: Callable[[], Tensor]
    inputs: list[Tensor]


def _after(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(A2, b2) o (A1, b1) = (A2 A1, A2 b1 + b2), matrices written out as sums so that the scan can fuse
    them."""
    (a1, b1), (a2, b2) = first, second
    product = (a2.unsqueeze(-1) * a1.unsqueeze(-3)).sum(-2)
    return product, (a2 * b1.unsqueeze(-2)).sum(-1) + b2


def associative_scan(gates: Tensor, values: Tensor) -> Tensor:
    """BD-LRU as the paper's code has it: A is built, and scanned by torch. gates (B,T,N,M,M+1), values
    (B,T,N,M)."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    p = normalise(gates.float(), "softmax")
    a, b = p[..., :-1].contiguous(), p[..., -1] * values.float()
    return scan(_after, (a, b), dim=1, combine_mode="generic")[1].to(values.dtype)


def companion_scan(gates: Tensor, values: Tensor) -> Tensor:
    """H-LRU by the companion matrices of its equation. gates (B,T,N,M+1), values (B,T,N)."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    p = normalise(gates.float(), "softmax")
    M = p.shape[-1] - 1
    shift = torch.eye(M, device=p.device)[:-1].expand(*p.shape[:-1], M - 1, M)
    a = torch.cat([p[..., None, :-1], shift], dim=-2)
    b = torch.nn.functional.pad((p[..., -1] * values.float()).unsqueeze(-1), (0, M - 1))
    return scan(_after, (a, b), dim=1, combine_mode="generic")[1][..., 0].to(values.dtype)


def associative_peer(family: str, gates: Tensor, values: Tensor, compiled: bool = True) -> Peer:
    formulation = associative_scan if family == "bd_lru" else companion_scan
    call = torch.compile(formulation) if compiled else formulation
    return Peer(
        f"torch associative_scan{', compiled' if compiled else ''}",
        lambda: call(gates, values),
        [gates, values],
    )


def fla_obstacle() -> str | None:
    return None if importlib.util.find_spec("fla") else "flash-linear-attention is not installed"


def fla_peers(B: int, T: int, width: int, device: torch.device) -> list[Callable[[], Peer]]:
    """fla's kernels at a state of about `width` values a sequence, each built when called."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_()

    def log_gate(*shape: int) -> Tensor:
        gate = torch.nn.functional.logsigmoid(torch.randn(*shape, device=device)).to(torch.bfloat16)
        return gate.requires_grad_()

    def hgrn() -> Peer:
        from fla.ops.hgrn import chunk_hgrn

        x, g = draw(B, T, width), log_gate(B, T, width)
        return Peer(f"fla chunk_hgrn, D {width}", lambda: chunk_hgrn(x, g)[0], [x, g])

    def simple_gla() -> Peer:
        from fla.ops.simple_gla import chunk_simple_gla

        heads = max(1, width // 64)
        q, k, v, g = (*(draw(B, T, heads, 64) for _ in range(3)), log_gate(B, T, heads))
        name = f"fla chunk_simple_gla, {heads} heads of 64 x 64"
        return Peer(name, lambda: chunk_simple_gla(q, k, v, g=g)[0], [q, k, v, g])

    def gated_delta_rule() -> Peer:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        heads = max(1, width // 64)
        q, k, v, g = (*(draw(B, T, heads, 64) for _ in range(3)), log_gate(B, T, heads))
        beta = torch.rand(B, T, heads, device=device, dtype=torch.bfloat16).requires_grad_()
        name = f"fla chunk_gated_delta_rule, {heads} heads of 64 x 64"

        def forward() -> Tensor:
            return chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]

        return Peer(name, forward, [q, k, v, g, beta])

    return [hgrn, gated_delta_rule, simple_gla]
