"""A layer of flash-linear-attention behind our interface; `fla.py` has the mixers made of it.

fla's Triton kernels need a GPU; building a model and counting its costs does not. Documents are separate
sequences of one ragged batch, which the kernels take directly. See docs/baselines.md.

Legend: B batch, T time, D model width, H heads, K key width of a head, V its value width, C channels of a
convolution, W its kernel, N sequences of a ragged batch.
"""

import contextlib
import functools
import importlib
import importlib.util
import math
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .base import Mixer, MixerCost, ResidualOutput, SequenceContext, compute_dtype, document_bounds

INSTALL = "pip install 'lrnn-lm[baselines]' (or flash-linear-attention alone, for an exported model)"
CHUNK = 64  # steps that the chunked kernels take at once
_PTXAS = (13, 1)  # the first assembler that is right, see `_newer_ptxas`


class FlaMixer(Mixer):
    """A layer of fla, with the states of its convolutions and its recurrence packed into one tensor."""

    differentiable_state = False  # not of all kernels, nor of the convolutions
    layer: ClassVar[str]  # its class in fla.layers
    operations: ClassVar[int]  # of the recurrence, for each element of the state and each token
    streams: ClassVar[tuple[str, ...]] = ("q", "k", "v")  # what its projections `.._proj` are called
    convolved: ClassVar[bool] = True  # whether each stream passes a short convolution, `.._conv1d`
    shifted: ClassVar[bool] = False  # whether the state holds the token before instead
    gates: ClassVar[tuple[str, ...]] = ()  # modules whose outputs the recurrence takes besides the streams
    output_gate: ClassVar[str | None] = "g_proj"
    slowest_rate: ClassVar[float] = 0.0  # decay rates of heads start uniform in this .. 16
    value_first: ClassVar[bool] = False  # whether the layer keeps a head's state as (V, K) instead of (K, V)
    chunk_takes_fp32: ClassVar[bool] = True
    gated_rule: ClassVar[bool] = False  # whether the backward pass is the gated delta rule's
    miscompiled: ClassVar[bool] = False  # whether an old assembler gets it wrong, see `_newer_ptxas`
    updates: int = 1  # of the state, a token

    def __init__(self, hidden_size: int, keys: int, values: int, num_heads: int, **settings: Any):
        """keys, values: H K and H V; `settings` go to fla's layer as they are."""
        super().__init__()
        if keys % num_heads or values % num_heads:
            raise ValueError(
                f"widths {keys} (keys) and {values} (values) do not split into {num_heads} heads"
            )
        self.head_shape = (num_heads, keys // num_heads, values // num_heads)
        cls = _layer_class(self.layer)
        self.inner = cls(hidden_size=hidden_size, num_heads=num_heads, layer_idx=0, **settings)
        self.inner.o_proj = ResidualOutput(values, hidden_size, bias=False)
        streams = self.streams if self.convolved else ()
        convolutions = [getattr(self.inner, f"{stream}_conv1d").weight.shape for stream in streams]
        before = [(hidden_size,)] if self.shifted else [(C, W) for C, _, W in convolutions]
        H, K, V = self.head_shape
        self.shapes = [*before, (H, V, K) if self.value_first else (H, K, V)]
        self.draw_parameters()

    def forward(
        self, x: Tensor, state: Tensor | None = None, context: SequenceContext | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D), state (B, sum of C W over the streams + H K V) in fp32 -> y (B, T, D), such a state
        or None. RWKV-7 has D in place of the convolutions.

        Raises:
            ValueError: a device or a precision that fla's kernels do not support.
        """
        context = SequenceContext.of(x, context)
        if isinstance(x, FakeTensor) or x.is_meta:
            return self._outline(x)
        self.check_device(x.device)
        self._choose_kernel(x)
        if context.reset is None or not bool(context.reset.any()):
            return self._run(x, state, None, context.keep_state)
        return self._run_documents(x, state, context.reset)

    def _run(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One pass over B sequences, or over the N sequences that cu_seqlens (N + 1,) cuts one row into."""
        if state is None and not keep_state:
            return self.inner(x, cu_seqlens=cu_seqlens)[0], None
        cache = _LayerCache()
        if state is not None:
            *before, recurrent = self._unpack(state)
            # Copies, because with one new token fla writes the states of the convolutions in place.
            dtype = x.dtype if self.shifted else compute_dtype(x)
            like = {"dtype": dtype, "copy": True, "memory_format": torch.contiguous_format}
            copies = [part.to(**like) for part in before]
            cache.update(0, conv_state=copies[0] if self.shifted else copies, recurrent_state=recurrent)
        y = self.inner(x, past_key_values=cache, use_cache=True, cu_seqlens=cu_seqlens)[0]
        inputs = cache[0]["conv_state"]
        after = [*([inputs] if self.shifted else inputs or ()), cache[0]["recurrent_state"]]
        return y, torch.cat([part.flatten(1).float() for part in after], dim=1)

    def _run_documents(self, x: Tensor, state: Tensor | None, reset: Tensor) -> tuple[Tensor, Tensor]:
        """The B rows as one ragged batch, cut where documents start; a row's first segment may go on from
        `state`."""
        B, T, D = x.shape
        starts, ends = document_bounds(reset)  # (N,)
        cu_seqlens = torch.cat([starts, ends[-1:]])
        given = None
        if state is not None:
            goes_on = (starts % T == 0) & ~reset.flatten()[starts]
            given = torch.where(goes_on.unsqueeze(1), state[torch.div(starts, T, rounding_mode="floor")], 0)
        y, after = self._run(x.reshape(1, B * T, D), given, cu_seqlens, keep_state=True)
        return y.view(B, T, D), after[ends % T == 0]

    def _unpack(self, state: Tensor) -> list[Tensor]:
        """The parts of a packed state (B, ..): (B, C, W) for each convolution, then the heads' matrices."""
        parts = state.split([math.prod(shape) for shape in self.shapes], dim=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def check_device(self, device: torch.device) -> None:
        """Raise ValueError where fla's kernels cannot run."""
        utils = importlib.import_module("fla.utils")
        if device.type == "cpu" or device.type != utils.device_name:
            raise ValueError(
                f"the kernels of {self.layer} (flash-linear-attention) need a GPU that Triton supports; "
                f"this model is on {device.type!r} (bd_lru, h_lru, attention, lstm and mamba2 run there)"
            )
        hopper = utils.IS_NVIDIA_HOPPER and utils.TRITON_ABOVE_3_4_0 and not utils.TRITON_ABOVE_3_7_1
        trains = self.gated_rule and self.training and torch.is_grad_enabled()
        if trains and hopper and not importlib.util.find_spec("tilelang"):
            raise ValueError(
                f"{self.layer} cannot be trained on this GPU with this Triton: 3.4 to 3.7.0 compile wrong "
                "gradients of it on Hopper; install triton >= 3.7.1 or tilelang"
            )

        old = self.miscompiled and utils.IS_NVIDIA_HOPPER and utils.TRITON_ABOVE_3_7_1
        if old and (told := _newer_ptxas()):
            raise ValueError(f"{self.layer} cannot run here: {told}")

    def _choose_kernel(self, x: Tensor) -> None:
        """The chunked kernel; in fp32, where that takes half precision only, the kernel of single steps."""
        needs_steps = not self.chunk_takes_fp32 and compute_dtype(x) == torch.float32
        if needs_steps and (torch.is_grad_enabled() or self.training):
            raise ValueError(
                f"the training kernels of {self.layer} (flash-linear-attention) take no fp32: set "
                "train.precision=bf16 (or run under torch.no_grad(), which they do in fp32 step by step)"
            )
        self.inner.mode = "fused_recurrent" if needs_steps else "chunk"

    def _outline(self, x: Tensor) -> tuple[Tensor, None]:
        """A pass on tensors without data: the shape of y, and what the kernels save for the backward pass."""
        B, T, _ = x.shape
        inner, (H, _, V) = self.inner, self.head_shape
        kept = [x.new_empty(B, T * self.updates, H, CHUNK)]  # products of the keys within a chunk
        for stream in self.streams:
            projected = getattr(inner, f"{stream}_proj")(x)
            changed = self.convolved or self.shifted  # a convolution's output, or the projection's input
            kept += [projected, torch.empty_like(projected)] if changed else [projected]
        for gate in self.gates:
            values = getattr(inner, gate)(x)
            kept += [values, torch.empty_like(values), values.new_empty(values.shape, dtype=torch.float32)]
        y = _Kept.apply(H * V, *kept)
        gate = [getattr(inner, self.output_gate)(x)] if self.output_gate else []
        return inner.o_proj(_Kept.apply(H * V, y, *gate)), None

    def initial_values(self, std: float) -> dict[str, Tensor]:
        """As fla's layers start: step sizes log-uniform in 0.001 .. 0.1, decay rates uniform up to 16."""
        values = {}
        for name, parameter in self.named_parameters():
            shape, kind = parameter.shape, name.split(".")[-1]
            if "conv1d" in name:
                values[name] = (2 * torch.rand(shape) - 1) * shape[-1] ** -0.5
            elif "norm" in name:
                values[name] = torch.zeros(shape) if kind == "bias" else torch.ones(shape)
            elif kind == "A_log":
                values[name] = (16 - (16 - self.slowest_rate) * torch.rand(shape)).log()
            elif kind == "dt_bias":
                low, high = math.log(0.001), math.log(0.1)
                step = (low + (high - low) * torch.rand(shape)).exp()
                values[name] = step + torch.log(-torch.expm1(-step))  # softplus of it is the step
        return values

    def cost(self, context_length: int) -> MixerCost:
        """The convolutions, and the recurrence step by step; chunked kernels do more work, in parallel."""
        H, K, V = self.head_shape
        taps = sum(math.prod(shape) for shape in self.shapes[:-1])
        return MixerCost(products=2 * taps, scan=self.operations * H * K * V)

    def state_elements(self, context_length: int) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


@functools.cache
def _newer_ptxas() -> str:
    """Empty where the assembler compiles the delta rule's kernels for Hopper rightly; else what to do.

    With Triton 3.7.1 on an H200, ptxas 12.8 gave outputs and gradients that were off by 0.09 to 7 times their
    size, 13.1 right ones (docs/baselines.md). May go when PyTorch's Triton brings 13.1 for Hopper.
    """
    nvidia = importlib.import_module("triton.knobs").nvidia
    if _version(nvidia.ptxas) >= _PTXAS:
        return ""
    path = "PATH/TO/ptxas"
    with contextlib.suppress(RuntimeError):  # Triton's, where it has none
        if _version(nvidia.ptxas_blackwell) >= _PTXAS:  # Triton 3.7.1 has 13.1 for newer GPUs
            path = nvidia.ptxas_blackwell.path
    return (
        f"ptxas {nvidia.ptxas.version} compiles its kernels wrong on this GPU, 13.1 does not: "
        f"export TRITON_PTXAS_PATH={path}"
    )


def _version(tool: Any) -> tuple[int, ...]:
    return tuple(map(int, tool.version.split(".")[:2]))


class _LayerCache:
    """The interface of fla's cache, for one layer."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        return self.entries[layer_idx]

    def update(self, layer_idx: int, **entry: Any) -> None:
        self.entries = [entry]


class _Kept(torch.autograd.Function):
    """Saves tensors (B, T, ..) as a backward pass would need them, to count their bytes; returns (B, T,
    width)."""

    @staticmethod
    def forward(ctx: Any, width: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[-1].new_empty(*tensors[-1].shape[:2], width)


def _layer_class(name: str) -> type[torch.nn.Module]:
    """A layer of fla by name, imported here, so that only models with this mixer wait for it.

    Raises:
        ValueError: fla, or something that it needs, is not installed.
    """
    try:
        with warnings.catch_warnings():
            # Without a GPU the import warns about Triton, but counting parameters needs no GPU.
            warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
            return getattr(importlib.import_module("fla.layers"), name)
    except ImportError as error:
        raise ValueError(f"{name} needs flash-linear-attention ({error}); {INSTALL}") from error
