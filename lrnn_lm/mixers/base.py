"""What every sequence mixer is: (B, T, D), state -> (B, T, D), state, and an honest count of its work.

Legend: B batch, T time, D model width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class ResidualOutput(nn.Linear):
    """A projection that writes to the residual stream; initialised narrower by sqrt(2 * layers)."""


def plain_weight(linear: nn.Module) -> Tensor | None:
    """The weight of a Linear that does W x and no more, for code that does it another way.

    None for one that an adapter, a quantiser or an offloader has taken over: that one has to be called.
    """
    adapted = type(linear) not in (nn.Linear, ResidualOutput)
    offloaded = hasattr(linear, "_hf_hook")  # Accelerate's, which brings the weight when the module is called
    return None if adapted or offloaded or is_traceable_wrapper_subclass(linear.weight) else linear.weight


def gate_matrix(gate_proj: nn.Linear, gate_std: float | None) -> dict[str, Tensor]:
    """Initial values of `gate_proj.weight` that give logits of standard deviation gate_std; none if None.

    The input is normalised, so that its square sums to its width. Logits that spread by about 1 are what lets
    a softmax start to select: near zero it averages all it reads (docs/results/synthetic.md).
    """
    if gate_std is None:
        return {}
    if gate_std <= 0:
        raise ValueError(f"gate_std must be above 0, not {gate_std}")
    return {"gate_proj.weight": gate_std * gate_proj.in_features**-0.5 * torch.randn(gate_proj.weight.shape)}


@dataclass(frozen=True)
class SequenceContext:
    """What a mixer may need to know of its positions.

    reset: (B, T) bool, true where a document starts; None if none does.
    attention_mask: (B, 1, T, S) over the S keys, bool or to be added, as SDPA takes it; None for causal.
    positions: (B or 1, T) index of each token in its sequence.
    keep_state: whether the state after is wanted; a mixer may return None instead where it is not.
    attention_weights: whether attention is computed through its weights, so that they can be recorded.
    """

    reset: Tensor | None = None
    attention_mask: Tensor | None = None
    positions: Tensor | None = None
    keep_state: bool = True
    attention_weights: bool = False


@dataclass(frozen=True)
class MixerCost:
    """Forward floating-point operations a token beyond the nn.Linear modules (a multiply-add is two).

    products: products with weights that no nn.Linear holds.
    scan: work of a linear recurrence, parallel over time.
    sequential: work that must wait for the step before (a nonlinear recurrence's matrix product).
    attention: work that grows with the context.
    """

    products: int = 0
    scan: int = 0
    sequential: int = 0
    attention: int = 0


def check_sizes(**sizes: int | None) -> None:
    """Raise ValueError, naming it, for a size that is given and below 1."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")


class Mixer(nn.Module):
    """Base of the mixers.

    A subclass takes `hidden_size` and its own `options` by keyword; what it is given but does not list in
    `options` never reaches it. `layer_type` is the kind of transformers' cache layer that holds its state:

    - "linear_attention": `state` is one tensor (B, ..) of constant size;
    - "full_attention": `state` is the cache layer itself, which grows with the context.
    """

    layer_type: ClassVar[str] = "linear_attention"
    options: ClassVar[tuple[str, ...]] = ()

    def forward(self, x: Tensor, state: Any, context: SequenceContext) -> tuple[Tensor, Any]:
        """Mix over time. x (B, T, D), state None at the beginning -> y (B, T, D) and the state after."""
        raise NotImplementedError

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """Initial values, by name, of the parameters that this mixer holds outside nn.Linear modules."""
        return {}

    def transitions(self, x: Tensor) -> Tensor | None:
        """The matrices A_t (B, T, N, M, M) of h_t = A_t h_{t-1} + .. at inputs x (B, T, D), to look at.

        None of mixers that have no such matrices, or none that are small.
        """
        return None

    def cost(self, context_length: int) -> MixerCost:
        """Work a token at this context length, projections aside."""
        raise NotImplementedError

    def state_elements(self, context_length: int) -> int:
        """Numbers that one sequence's state holds after `context_length` tokens."""
        raise NotImplementedError
