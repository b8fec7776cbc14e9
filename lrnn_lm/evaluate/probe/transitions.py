"""The matrices A_t that a checkpoint's recurrent layers apply: eigenvalues and absolute row sums.

Legend: M block size or order.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...model.states import spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MATRICES = 4096  # of each layer, whose eigenvalues are computed
DRAWN = 1000  # eigenvalues of each layer kept for the picture


@contextlib.contextmanager
def mixer_inputs(model: "PreTrainedModel") -> Iterator[dict[int, list[Tensor]]]:
    """Inside, collects the inputs of each layer's mixer, by layer, until there are MATRICES tokens."""
    seen: dict[int, list[Tensor]] = {}
    hooks = []

    def keep(layer: int, x: Tensor) -> None:
        kept = seen.setdefault(layer, [])
        if sum(part.shape[0] * part.shape[1] for part in kept) < MATRICES:
            kept.append(x.detach())

    if model.config.model_type == "lrnn":
        for layer, block in enumerate(model.model.layers):
            hooks.append(block.mixer.register_forward_pre_hook(lambda _, args, i=layer: keep(i, args[0])))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def transitions(model: "PreTrainedModel", seen: dict[int, list[Tensor]]) -> list[dict[str, Any]]:
    """For each layer with A_t: quantiles of |eigenvalue| and row sums, and a sample to draw.

    `finite` is the share of matrices without infinities; the rest is computed over these and missing if there
    are none. Of a companion matrix only the first row's sum counts: the other rows shift.
    """
    found = []
    for layer, parts in sorted(seen.items()):
        x = torch.cat([part.reshape(1, -1, part.shape[-1]) for part in parts], dim=1)
        A = model.model.layers[layer].mixer.transitions(x)
        if A is None:
            continue
        A = A.flatten(0, 2).cpu()  # (tokens x N, M, M)
        A = A[spread(len(A), MATRICES)]
        whole = A.isfinite().all(dim=-1).all(dim=-1)
        about = {"layer": layer, "block_size": A.shape[-1], "finite": float(whole.float().mean())}
        A = A[whole]
        companion = model.config.layer_mixers[layer]["type"] == "h_lru"
        found.append({**about, **(_statistics(A, companion) if len(A) else {})})
    return found


def _statistics(A: Tensor, companion: bool) -> dict[str, Any]:
    each = torch.linalg.eigvals(A)  # (matrices, M)
    eigenvalues = each.flatten()
    gated = A[:, :1] if companion else A
    kept = spread(len(eigenvalues), DRAWN)
    return {
        "eigenvalue_magnitude": _quantiles(eigenvalues.abs()),
        "spectral_radius": _quantiles(each.abs().amax(dim=-1)),
        "row_sum": _quantiles(gated.abs().sum(dim=-1).flatten()),
        "complex_share": float((eigenvalues.imag.abs() > 1e-4).float().mean()),
        "negative_share": float((eigenvalues.real < -1e-4).float().mean()),
        "sample": [[round(float(z.real), 4), round(float(z.imag), 4)] for z in eigenvalues[kept]],
    }


def _quantiles(values: Tensor) -> dict[str, float]:
    """Minimum, quartiles, maximum and mean."""
    ordered = values.double().sort().values
    at = {"min": 0.0, "25%": 0.25, "50%": 0.5, "75%": 0.75, "max": 1.0}
    picked = {name: float(ordered[round(share * (len(ordered) - 1))]) for name, share in at.items()}
    return {**picked, "mean": float(ordered.mean())}
