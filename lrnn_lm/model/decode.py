"""One token for every sequence of a batch, fast: states that stay where they are, one CUDA graph to run.

`generate` decodes through `Decoder` where every layer is recurrent. On a GPU a step is captured once and
replayed, so that it costs its kernels and no Python, and these kernels are our own, four a layer, for a few
sequences (`kernels/fused_step.py`) and for many (`kernels/fused_tiles.py`); on a CPU the same code runs as it
is written. What a cache holds stays exact after every step: its states *are* the tensors that the step
writes, for as long as the cache is the one being continued; a cache that is put aside gets its own copies.

Prefill, beams, and whatever a step does not know (adapters, hooks, quantised weights, autocast, outputs of
every layer) go the plain way, through the model's forward pass.

Legend: B batch, D model width, V vocabulary.
"""

import os
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels.dispatch import TRITON_MOST, has_triton
from ..mixers import joined, plain_weight
from .cache import is_recurrent
from .layers import RMSNorm

KNOWN = ("past_key_values", "use_cache", "attention_mask", "position_ids", "logits_to_keep", "return_dict",
         "cache_position", "output_attentions", "output_hidden_states")  # fmt: skip
_OURS = ("torch", "transformers", "fla", __name__.split(".")[0])  # packages whose modules do what they say
_steps: "weakref.WeakKeyDictionary[nn.Module, list[DecodeStep]]" = weakref.WeakKeyDictionary()
FEW = 3  # sequences that a fused step takes one after the other, where it can take more as a tile
FEW_WITHOUT_TILES = 6  # and where it cannot: beyond that the library's products are faster
MOST_FUSED = 128  # as tiles; not measured beyond
KEPT_STEPS = 2  # a model keeps the steps of the last so many batch sizes


class Decoder:
    """What `generate` calls in place of the model for each new token; one for each call of `generate`."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._step: DecodeStep | None = None

    @property
    def settled(self) -> bool:
        """Whether a step has been found: from then on masks are not looked at."""
        return self._step is not None

    def __call__(self, input_ids: Tensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """As the model's forward pass: logits (B, 1, V), in memory that the next call writes to."""
        if self._step is None and _is_step(self.model, input_ids, kwargs):
            self._step = decode_step(self.model, kwargs["past_key_values"])
        if self._step is None or not _is_one_token(input_ids, kwargs):
            return self.model(input_ids=input_ids, **kwargs)
        cache = kwargs["past_key_values"]
        return CausalLMOutputWithPast(logits=self._step(self.model, input_ids, cache), past_key_values=cache)


class DecodeStep:
    """A step of one model for one batch size, with the states that it continues."""

    def __init__(self, model: PreTrainedModel, cache: Cache, capture: bool, fused: bool = False):
        self.key, self.fused = _key(model, cache, fused), fused
        self.states = [torch.zeros_like(layer.recurrent_states[0]) for layer in cache.layers]
        B = self.states[0].shape[0]
        self.ids = torch.zeros(B, 1, dtype=torch.long, device=self.states[0].device)
        self.capture, self.tiled = capture, fused and FEW < B and has_tiles(model)
        self.workspace: Any = None  # of a fused step of many sequences
        self.joint: list[Any] = []  # weights that lie together, kept for as long as a graph reads them
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None  # (B, 1, V), which the graph writes
        self._owners: list[Callable[[], Any]] = []  # the cache layers that hold these states

    def __call__(self, model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
        """Feed ids (B, 1), write the states in place, count the token; returns logits (B, 1, V)."""
        self._adopt(cache)
        self.ids.copy_(ids)
        if self.capture and self.graph is None:
            self._capture(model)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.logits = self.forward(model)
        for layer in cache.layers:
            layer.seen_tokens += 1
        return self.logits

    def forward(self, model: PreTrainedModel) -> Tensor:
        """The step as it is written: what is captured."""
        if self.fused:
            return self._fused_forward(model)
        x = model.model.embed_tokens(self.ids)  # (B, 1, D)
        for block, state in zip(model.model.layers, self.states, strict=True):
            x, after = block.step(x, state)
            state.copy_(after)
        return model.lm_head(model.model.norm(x))

    def _fused_forward(self, model: PreTrainedModel) -> Tensor:
        """The same by four kernels a layer, and one for the head."""
        if not self.joint:
            self.join(model)
        x = model.model.embed_tokens(self.ids).squeeze(1)  # (B, D)
        with joined(self.joint):
            step = self._step_of_many if self.tiled else self._step_of_few
            return step(model, x).unsqueeze(1)

    def _step_of_few(self, model: PreTrainedModel, x: Tensor) -> Tensor:
        from ..kernels.fused_step import linear_step

        for block, state in zip(model.model.layers, self.states, strict=True):
            x = block.fused_step(x, state)
        norm = model.model.norm
        return linear_step(x, model.lm_head.weight, norm.weight, norm.eps)

    def _step_of_many(self, model: PreTrainedModel, x: Tensor) -> Tensor:
        from ..kernels.fused_tiles import Workspace, begin, normed_step

        if self.workspace is None:
            self.workspace = Workspace(x.device)
        blocks, last = model.model.layers, model.model.norm
        norms = [*(block.mixer_norm.weight for block in blocks), last.weight]
        stream = begin(x, norms[0])
        for block, state, norm in zip(blocks, self.states, norms[1:], strict=True):
            stream = block.fused_step_of_many(stream, state, norm, self.workspace)
        return normed_step(stream, last.eps, model.lm_head.weight)

    def _adopt(self, cache: Cache) -> None:
        """Make this cache the one that is continued; the one before, if it lives, gets its own copies."""
        if all(layer.recurrent_states[0] is s for layer, s in zip(cache.layers, self.states, strict=True)):
            return
        for owner, state in zip(self._owners, self.states, strict=False):
            layer = owner()
            if layer is not None and layer.recurrent_states[0] is state:
                layer.recurrent_states[0] = state.clone()
        for layer, state in zip(cache.layers, self.states, strict=True):
            state.copy_(layer.recurrent_states[0])
            layer.recurrent_states[0] = state
        self._owners = [weakref.ref(layer) for layer in cache.layers]

    def _capture(self, model: PreTrainedModel) -> None:
        """Record the step as a CUDA graph; where that fails, it is run as it is written from then on."""
        before = [state.clone() for state in self.states]
        self.join(model)
        try:
            stream = _capture_stream(self.ids.device)
            stream.wait_stream(torch.cuda.current_stream(self.ids.device))
            with torch.cuda.stream(stream), joined(self.joint):
                for _ in range(2):  # kernels are compiled and chosen here
                    self.forward(model)
            torch.cuda.current_stream(self.ids.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream), joined(self.joint):
                self.logits = self.forward(model)
            self.graph = graph
        except (RuntimeError, ValueError) as error:  # the latter of torch with CUDA, where there is no device
            said = str(error).strip().splitlines() or [""]
            warnings.warn(f"decoding without a CUDA graph: {said[0]}", stacklevel=4)
            self.capture = False
        for state, value in zip(self.states, before, strict=True):
            state.copy_(value)

    def join(self, model: PreTrainedModel) -> None:
        """Copy weights of projections of the same input side by side: one product in place of two."""
        groups = [
            module for block in model.model.layers for module in (block.mixer, block.mlp)
            if hasattr(module, "joint_projections")
        ]  # fmt: skip
        self.joint = [(module, _side_by_side(module.joint_projections())) for module in groups]


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: each new stream has cuBLAS keep 32 MiB for it."""
    return torch.cuda.Stream(device)


def decode_step(
    model: PreTrainedModel,
    cache: Cache,
    capture: bool | None = None,
    fused: bool | None = None,
) -> DecodeStep:
    """The step of a model for a cache's batch size: the one there is, or a new one.

    capture: whether to record a CUDA graph; None: on a GPU. fused: by four kernels of our own a layer; None:
    on a GPU where they can.

    Raises:
        ValueError: the fused kernels were asked for and cannot run this model here.
    """
    state = cache.layers[0].recurrent_states[0]
    if fused is None:
        fused = state.is_cuda and fused_obstacle(model, state.shape[0]) is None
    elif fused and (reason := fused_obstacle(model, state.shape[0])):
        raise ValueError(f"the fused decoding step cannot run here: {reason}")
    key = _key(model, cache, fused)
    steps = _steps.setdefault(model, [])
    for step in steps:
        if step.key == key:
            return step
    if capture is None:
        capture = state.is_cuda
    with torch.inference_mode(False):  # states are written wherever the step is called from
        step = DecodeStep(model, cache, capture, fused)
    stale = [old for old in steps if old.key[1] != key[1]]  # of other weights: their copies are wrong now
    steps[:] = [step, *(old for old in steps if old not in stale)][:KEPT_STEPS]
    return step


def can_decode(model: PreTrainedModel) -> bool:
    """Whether a step does all that the model would: recurrent layers, modules as they were built."""
    if any(kind != "linear_attention" for kind in model.config.layer_types) or model.training:
        return False
    for module in model.modules():
        if type(module).__module__.split(".")[0] not in _OURS or hasattr(module, "_hf_hook"):
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if isinstance(module, nn.Linear) and plain_weight(module) is None:
            return False
    return True


def fused_obstacle(model: PreTrainedModel, B: int) -> str | None:
    """Why the fused kernels cannot be a step of this model for B sequences; None: they can."""
    x = model.model.embed_tokens.weight
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not has_triton() or not (x.is_cuda or interpreted):
        return "it needs Triton and a GPU"
    if x.dtype == torch.float64:
        return "its products are in fp32, too coarse for a model in fp64"
    if not all(p.is_contiguous() for p in model.parameters()):
        return "it reads weights row by row as they lie, and some lie otherwise"
    most = MOST_FUSED if has_tiles(model) else FEW_WITHOUT_TILES
    if most < B:
        return f"it takes up to {most} sequences in {str(x.dtype).removeprefix('torch.')}, not {B}"
    if any(block.mixer.fused_window is None for block in model.model.layers):
        return "it knows bd_lru and h_lru only"
    if not can_decode(model):
        return "modules are not as they were built (adapters, hooks, quantised weights), or in training"
    if not _is_what_kernels_compute(model):
        return "it knows no bias but that of gates and values, and no norm but RMSNorm with weights"
    widest = max(block.mixer.state_elements(1) // block.mixer.num_blocks for block in model.model.layers)
    if widest > TRITON_MOST:  # a larger block is of two programs, of which one writes what the other reads
        return f"it takes blocks and orders up to {TRITON_MOST}, not {widest}"
    return None


def has_tiles(model: PreTrainedModel) -> bool:
    """Whether a fused step can take sequences as tiles. All weights are in bf16 then: in fp16 the residual
    stream times a norm's weights may be too large, and fp32 is not for tensor cores."""
    if torch.version.hip is not None or any(p.dtype != torch.bfloat16 for p in model.parameters()):
        return False
    return model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) >= (8, 0)


def _is_what_kernels_compute(model: PreTrainedModel) -> bool:
    """Whether nothing was put into the model that its modules would use and the kernels would not."""
    blocks = model.model.layers
    norms = [model.model.norm, *(n for block in blocks for n in (block.mixer_norm, block.mlp_norm))]
    plain = [model.lm_head, *(block.mixer.out_proj for block in blocks)]
    plain += [p for block in blocks for p in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)]
    return (
        all(type(norm) in (RMSNorm, nn.RMSNorm) and norm.weight is not None for norm in norms)
        and all(projection.bias is None for projection in plain)
        and all(block.mixer.gate_proj.bias is not None for block in blocks)
    )


def _is_step(model: PreTrainedModel, ids: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether the first call of a `generate` is for one token after a state, and nothing but that.

    The masks of later calls only grow by ones, so what one of them says is read once.
    """
    if not _is_one_token(ids, kwargs) or set(kwargs) - set(KNOWN) or not can_decode(model):
        return False
    if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type) or ids.device != model.device:
        return False
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if not isinstance(cache, Cache) or len(cache.layers) != model.config.num_hidden_layers:
        return False
    for layer in cache.layers:
        if not is_recurrent(layer) or not layer.has_previous_state[0]:
            return False
        if (
            layer.recurrent_states[0].shape[0] != ids.shape[0]
            or layer.recurrent_states[0].device != ids.device
        ):
            return False
    if mask is None:
        return True
    mask = mask.bool()
    begun = mask[:, :-1].any(dim=1) if mask.shape[1] > 1 else mask[:, -1]
    return mask.ndim == 2 and bool((mask[:, -1] & begun).all())


def _is_one_token(ids: Tensor | None, kwargs: dict[str, Any]) -> bool:
    return ids is not None and ids.shape[1] == 1 and kwargs.get("use_cache", True) is not False


def _key(model: PreTrainedModel, cache: Cache, fused: bool = False) -> tuple:
    """The states' shapes, and what a step keeps of a model: where its weights lie, how often they changed."""
    shapes = tuple(
        (s.shape, s.dtype, s.device) for s in (layer.recurrent_states[0] for layer in cache.layers)
    )
    weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
    return shapes, weights, fused


def _side_by_side(projections: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """(sum of outputs, D) and, where one has a bias, (sum of outputs,)."""
    weight = torch.cat([p.weight.detach() for p in projections])
    if all(p.bias is None for p in projections):
        return weight, None
    biases = [p.weight.new_zeros(p.out_features) if p.bias is None else p.bias.detach() for p in projections]
    return weight, torch.cat(biases)
