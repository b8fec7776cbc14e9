"""The interface of every sequence mixer, (B, T, D), state -> (B, T, D), state, and what mixers share.

`Mixer` and what it takes and returns come first; then initial values, documents in a row, the projections of
the scan's inputs, and checks of options.

Legend: B batch, T time, D model width.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..kernels import runs_fused
from ..kernels.dispatch import check_reset

# Types of options, by whose names a recipe checks them too (OPTION_TYPES in recipe/mixer.py).
BlockSize = int  # 1 to 64
Reach = int  # of a convolution or a window, in tokens: at least 2
GateName = str  # in kernels.GATES
HalfLives = Sequence[float]  # [shortest, longest] in tokens


Joint = tuple[Tensor, Tensor | None]  # weight and bias of several projections side by side


class Rotary(NamedTuple):
    """cos and sin, each (B or 1, T, 1, head_dim), of positions in a rotary embedding of base theta."""

    head_dim: int
    theta: float
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class SequenceContext:
    """What a mixer may need to know of its tokens.

    A layer in a model of your own needs `reset` at most; LRNNModel fills in the rest. Recurrent layers read
    no masks: docs/api.md says how to pad.
    """

    reset: Tensor | None = None  # (B, T) bool, true where a document starts; None if none does
    attention_mask: Any = None  # (B, 1, T, S), bool or added, as in SDPA; or a BlockMask; None: causal
    window_mask: Any = None  # the same for attention with a window
    window_order: Tensor | None = None  # (B, S) keys of a window with padding first; None: as they are
    positions: Tensor | None = None  # (B or 1, T) index of each token in its sequence
    keep_state: bool = True  # whether the caller uses the state after; a mixer may return None otherwise
    attention_weights: bool = False  # compute attention through its weights, so that hooks can record them
    rotary: Rotary | None = None  # angles of these positions, for the attention layers whose base they have
    joint: Joint | None = None  # the mixer's projections side by side, for a step of decoding

    @staticmethod
    def of(x: Tensor, context: "SequenceContext | None") -> "SequenceContext":
        """The context of a layer that is called with x and this one, or without one.

        ValueError where x is not (B, T, D) of a token at least, or the context something else, as a mask:
        torch's own words would be of axes inside of the layer.
        """
        if x.ndim != 3 or not x.shape[1]:
            raise ValueError(
                f"x of shape {tuple(x.shape)} must be (rows, tokens, hidden_size), with at least one token"
            )
        if context is not None and not hasattr(context, "reset"):
            kind = type(context).__name__
            raise ValueError(f"context is a {kind}; pass a SequenceContext, as SequenceContext(reset=reset)")
        return SequenceContext() if context is None else context


@dataclass(frozen=True)
class MixerCost:
    """Forward floating-point operations a token, by kind; a multiply-add is two.

    Those of a mixer leave out its nn.Linear modules, which are counted for the whole model.
    """

    products: int = 0  # with weights, parallel over tokens
    scan: int = 0  # of linear recurrences, parallel over time
    sequential: int = 0  # of nonlinear recurrences, where a step waits for the one before
    attention: int = 0  # scores and weighted sums, on average over the context

    @property
    def total(self) -> int:
        return self.products + self.scan + self.sequential + self.attention


class PlainInit:
    """How `initialise` writes. A model passes transformers' functions, which leave loaded weights alone."""

    normal_ = staticmethod(nn.init.normal_)
    zeros_ = staticmethod(nn.init.zeros_)
    ones_ = staticmethod(nn.init.ones_)

    @staticmethod
    def copy_(tensor: Tensor, value: Tensor) -> Tensor:
        return tensor.copy_(value)


class Mixer(nn.Module):
    """Base of the mixers.

    The `__init__` of a subclass takes `hidden_size` and then its options, each with a type and a default.
    This also declares the options for recipes and config.json. It ends with `self.draw_parameters()`.
    `layer_type` is the kind of transformers' cache layer that holds the state:

    - "linear_attention": `state` is one tensor (B, ..) of constant size;
    - "full_attention": `state` is the cache layer itself, which grows with the context;
    - "sliding_attention": the same of attention with the option `window`, which bounds it.
    """

    layer_type: ClassVar[str] = "linear_attention"
    differentiable_state: ClassVar[bool] = True  # whether gradients flow into and out of the state
    options: ClassVar[tuple[str, ...]] = ()  # names, from the signature of `__init__`
    fused_window: ClassVar[bool | None] = None  # `window` of kernels/decode; None: not a fused step

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _, *arguments = inspect.signature(cls).parameters.values()  # the first is hidden_size
        cls.options = tuple(a.name for a in arguments if a.kind is a.POSITIONAL_OR_KEYWORD)

    def forward(
        self, x: Tensor, state: Any = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Any]:
        """Mix over time. x (B, T, D), state None at the beginning -> y (B, T, D) and the state after.

        Without a context each row is one document, which begins here or goes on after the state.
        """
        raise NotImplementedError

    def reset_parameters(
        self, std: float = 0.02, residual_std: float | None = None, init: Any = PlainInit
    ) -> None:
        """Draw all parameters anew, as a model with initializer_range `std` does.

        residual_std: of the output projection; in a model of L layers std / sqrt(2 L). None for std.
        """
        self.apply(partial(initialise, std=std, residual_std=residual_std, init=init))

    def draw_parameters(self) -> None:
        """`reset_parameters` of a new mixer, unless a model will do it."""
        if not _drawn_by_model.get():
            self.reset_parameters()

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """Initial values, by name, of the parameters that this mixer holds outside nn.Linear modules."""
        return {}

    def planes(self) -> dict[str, int | list[int]]:
        """Weights, by name, that stack several matrices, and how many, or the rows of each; Muon
        orthogonalises each by itself."""
        return {}

    def transitions(self, x: Tensor) -> Tensor | None:
        """The matrices A_t (B, T, N, M, M) of h_t = A_t h_{t-1} + .. at inputs x (B, T, D), for probes.

        None for a mixer without small matrices of that kind.
        """
        return None

    def cost(self, context_length: int) -> MixerCost:
        """Operations a token at this context length, without those of nn.Linear modules."""
        raise NotImplementedError

    def state_elements(self, context_length: int) -> int:
        """Numbers that one sequence's state holds after `context_length` tokens."""
        raise NotImplementedError


class ResidualOutput(nn.Linear):
    """A projection that writes to the residual stream; initialised narrower by sqrt(2 * layers)."""


def plain_weight(linear: nn.Module) -> Tensor | None:
    """The weight of a Linear that does W x and no more, for code that does it another way.

    None for one that an adapter, a quantiser, an offloader, a hook (as of torch's pruning, which makes the
    weight when the module is called) or a patch has taken over: that one has to be called.
    """
    adapted = type(linear) not in (nn.Linear, ResidualOutput)
    offloaded = "_hf_hook" in vars(linear)  # Accelerate's, which brings the weight when the module is called
    hooked = linear._forward_pre_hooks or linear._forward_hooks or linear._backward_hooks
    patch = vars(linear).get("forward")  # the class's own if it was put back
    patched = patch is not None and getattr(patch, "__func__", None) is not type(linear).forward
    if adapted or offloaded or hooked or patched or is_traceable_wrapper_subclass(linear.weight):
        return None
    return linear.weight


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products of x come out in: autocast's, else its own."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # which there is none of on meta
        return torch.get_autocast_dtype(device)
    return x.dtype


@torch.no_grad()
def initialise(
    module: nn.Module, std: float = 0.02, residual_std: float | None = None, init: Any = PlainInit
) -> None:
    """Draw the parameters that a module itself holds, not its children's.

    Matrices are Normal(0, std), those that write to the residual stream Normal(0, residual_std), biases 0 and
    norms 1; then a mixer's own `initial_values`.
    """
    if isinstance(module, nn.Linear):
        narrow = isinstance(module, ResidualOutput) and residual_std is not None
        init.normal_(module.weight, mean=0.0, std=residual_std if narrow else std)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, mean=0.0, std=std)
    elif isinstance(module, nn.RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, Mixer):
        with _computed_in_fp32():
            values = module.initial_values(std)
        for name, value in values.items():
            init.copy_(module.get_parameter(name), value)


@contextmanager
def _computed_in_fp32() -> Iterator[None]:
    """Not in bf16 or fp16, which `from_config(dtype=..)` makes the default dtype: in bf16 0.998 is 1."""
    dtype = torch.get_default_dtype()
    if dtype.itemsize < 4:
        torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


_drawn_by_model: ContextVar[bool] = ContextVar("_drawn_by_model", default=False)


@contextmanager
def drawn_by_model() -> Iterator[None]:
    """Inside, new mixers do not draw their parameters: the model draws all of them, in its own order."""
    token = _drawn_by_model.set(True)
    try:
        yield
    finally:
        _drawn_by_model.reset(token)


def is_traced() -> bool:
    """Whether torch.compile, export, trace or a CUDA graph records this, which must not depend on values."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_exported() -> bool:
    """Whether that graph must be whole: torch.compile may break one where the code depends on values."""
    # Not `is_exporting()`: torch 2.11 answers it with True in all code that it compiles, training included.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def by_documents(
    run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    state: Tensor,
    reset: Tensor,
    initial: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """y (B, T, D) and the state after: a mixer's `run` with a state that begins anew where a document starts.

    Rows are cut where any of them starts a document, so there are as many passes as cuts.

    Args:
        run: (x (B, t, D), state) -> (y (B, t, D), the state after), for a mixer that knows no documents.
        x, state, reset: (B, T, D), (B, ..) and (B, T) bool.
        initial: the state that a document begins with, (B, ..) or a number.
    """
    B, T = x.shape[:2]
    check_reset(reset, (B, T))
    # An exported graph cannot depend on where documents start: it takes a token at a time, and grows with T.
    starts = range(1, T) if is_exported() or T == 1 else inner_starts(reset)
    y = []
    for begin, end in pairwise([0, *starts, T]):
        begins = reset[:, begin].view(-1, *[1] * (state.ndim - 1))
        part, state = run(x[:, begin:end], torch.where(begins, initial, state))
        y.append(part)
    return torch.cat(y, dim=1), state


@torch.compiler.disable
def inner_starts(reset: Tensor) -> list[int]:
    """At which tokens after the first any row (B, T) starts a document."""
    return (reset[:, 1:].any(dim=0).nonzero().squeeze(1) + 1).tolist()


def document_bounds(reset: Tensor) -> tuple[Tensor, Tensor]:
    """(starts, ends) of the segments that document starts cut (B, T) into, as indices into B T tokens."""
    first = torch.zeros_like(reset)
    first[:, 0] = True  # every row begins a segment, which may go on from the state before
    starts = (reset | first).flatten().nonzero().squeeze(1)
    return starts, torch.cat([starts[1:], starts.new_tensor([reset.numel()])])


class JointProjections:
    """For a module with several projections of the same input: one product in decoding.

    Why not one parameter for all: adapters (PEFT's `target_modules`), Muon, which orthogonalises each matrix,
    and the checkpoints of every version find each projection under its own name. The cost: each call of
    `generate` copies the weights side by side, about the time of one token.
    """

    def joint_projections(self) -> list[nn.Linear]:
        """The projections, in the order of their outputs."""
        raise NotImplementedError

    def project(self, x: Tensor, joint: Joint | None = None) -> tuple[Tensor, ...]:
        """Each projection of x (.., D); views of one tensor where `joint` is given, all of them as one."""
        projections = self.joint_projections()
        if joint is None:
            return tuple(projection(x) for projection in projections)
        return functional.linear(x, *joint).split([p.out_features for p in projections], dim=-1)


def _plane_weights(
    gates: nn.Linear, values: nn.Linear, rows: int, columns: int
) -> tuple[Tensor, Tensor] | None:
    """(weight, bias) of one projection that computes gates and values: planes of `columns`, the gates' first.

    A plane holds one number for each of the layer's `rows`, padded with zeros to `columns`. The bias is
    detached: the scan computes its gradient, see `gate_bias`. In autocast's dtype, so that the copies are
    small. None where a projection is not plain.
    """
    weights, bias = [plain_weight(gates), plain_weight(values)], gates.bias
    if weights[0] is None or weights[1] is None or bias is None:
        return None
    dtype = compute_dtype(bias)
    planes = [w.to(dtype).view(-1, rows, w.shape[-1]) for w in weights]
    biases = functional.pad(bias.detach().to(dtype).view(-1, rows), (0, columns - rows, 0, 1))
    if columns > rows:
        planes = [functional.pad(plane, (0, 0, 0, columns - rows)) for plane in planes]
    return torch.cat(planes).flatten(0, 1), biases.flatten()


def packed_planes(mixer: "JointProjections", x: Tensor, M: int, rows: int, columns: int) -> Tensor | None:
    """A mixer's gates and values by one product, planes (B, T, M+2, columns), for the fused scan.

    M+1 planes if the mixer's input gate has no logits. None for other scans, for a step of decoding, for no
    tokens, and where a projection is not plain.
    """
    fused = mixer.backend == "triton" or (mixer.backend == "auto" and runs_fused(x, M))
    if not fused or x.shape[1] == 1 or x.numel() == 0:
        return None
    weights = _plane_weights(mixer.gate_proj, mixer.value_proj, rows, columns)
    return None if weights is None else functional.linear(x, *weights).unflatten(-1, (-1, columns))


def gate_bias(gates: nn.Linear, rows: int) -> Tensor | None:
    """The gates' bias (M+1, rows), as the packed scans take it."""
    return None if gates.bias is None else gates.bias.view(-1, rows)


def check_sizes(**sizes: int | None) -> None:
    """Raise ValueError, naming the size, unless it is a whole number of at least 1, or None."""
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
            raise ValueError(f"{name} must be a whole number, not {size!r}")
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")


def check_positive(**numbers: Any) -> None:
    """Raise ValueError, naming it, unless each is a finite number above 0, or None."""
    for name, number in numbers.items():
        if number is not None and not (isinstance(number, int | float) and 0 < number < math.inf):
            raise ValueError(f"{name} must be above 0 and finite, not {number!r}")
