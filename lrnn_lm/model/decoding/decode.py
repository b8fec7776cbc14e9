"""One token for every sequence of a batch, fast: states are written in place, and a CUDA graph is replayed.

`generate` decodes through `Decoder`. On a GPU a step is captured once and then replayed, so it costs the time
of its kernels and none of Python's. Where every layer is recurrent, these are our own, four a layer, for a
few sequences or for many (`kernels/decode/`); with attention to all tokens they are those of the model's
modules, and keys have room for tokens to come (`memory.py`). On a CPU the same code runs without a graph. The
states in a cache are the tensors that the step writes, so the cache is exact after every step. When a step
turns to another cache, the one before gets copies of its states.

Each call of `generate` has a step of its own (`step.py`), so that calls from several threads, or one inside
another, never write to the same memory.

Prefill, beams, and all that a step does not support (windows, static caches, adapters, hooks, patched or
compiled modules, quantised weights, autocast, outputs of every layer) go through the model's forward pass.

Legend: B batch, D model width, V vocabulary.
"""

import os
import sys
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...kernels.dispatch import TRITON_MOST, has_triton
from ...mixers import MIXERS, BlockDiagonalLRU
from ...mixers.base import plain_weight
from ..cache import CACHE, is_recurrent
from ..layers import LRNNBlock, RMSNorm, SwiGLU
from .built import all_modules, all_parameters, as_written, remember
from .memory import Memory, can_hold, held_by
from .step import DecodeStep, Pool, graph_key

KNOWN = ("past_key_values", "cache", "use_cache", "attention_mask", "position_ids", "logits_to_keep",
         "return_dict", "cache_position", "output_attentions", "output_hidden_states")  # fmt: skip
FEW = 3  # up to so many sequences a fused step takes one after the other; more as tiles, where it can
FEW_WITHOUT_TILES = 6  # where it cannot: beyond 6 sequences cuBLAS is faster
MOST_FUSED = 128  # sequences as tiles; not measured beyond
_lock = threading.Lock()  # guards `_pools`
_pools: "weakref.WeakKeyDictionary[nn.Module, Pool]" = weakref.WeakKeyDictionary()


def _remember_ours() -> None:
    """Our own modules, and all that a file of a mixer defines or imports."""
    files = [vars(sys.modules[mixer.__module__]) for mixer in MIXERS.values()]
    found = [value for file in files for value in file.values() if isinstance(value, type)]
    remember(LRNNBlock, RMSNorm, SwiGLU, *(cls for cls in found if issubclass(cls, nn.Module)))


_remember_ours()


class Decoder:
    """What `generate` calls instead of the model for each new token; one for each call of `generate`.

    The model must satisfy `can_decode`.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._step: DecodeStep | None = None

    def settled(self, cache: Cache) -> bool:
        """Whether there is a step with room for another token; then masks are ignored."""
        return self._step is not None and self._step.has_room(cache)

    def __call__(self, input_ids: Tensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """As the model's forward pass: logits (B, 1, V), in memory that the next call overwrites."""
        if not _is_one_token(input_ids, kwargs):
            return self.model(input_ids=input_ids, **kwargs)
        cache = _given(kwargs)
        if not self.settled(cache):
            self._step = None  # first: the cache gets copies, and another call may be lent the memory
            if not _is_step(self.model, input_ids, kwargs):
                return self.model(input_ids=input_ids, **kwargs)
            self._step = decode_step(self.model, cache)
        masks = kwargs.get("attention_mask"), kwargs.get("position_ids")
        logits = self._step(self.model, input_ids, cache, *masks)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})


def decode_step(
    model: PreTrainedModel,
    cache: Cache,
    pool: Pool | None = None,
    capture: bool | None = None,
    fused: bool | None = None,
) -> DecodeStep:
    """A step of a model for a cache's batch size, with the weights as they are now; for one caller at a time.

    Args:
        pool: keeps captured steps; None: the model's own.
        capture: whether to record a CUDA graph; None: on a GPU.
        fused: whether to use our four kernels a layer; None: on a GPU, where they can run.

    Raises:
        ValueError: the fused kernels were asked for and cannot run this model here.
    """
    first = held_by(cache.layers[0])
    B, on_gpu = first.shape[0], first.is_cuda
    if fused is None:
        fused = on_gpu and fused_obstacle(model, B) is None
    elif fused and (reason := fused_obstacle(model, B)):
        raise ValueError(f"the fused decoding step cannot run here: {reason}")
    if capture is None:
        capture = on_gpu
    if pool is None:
        with _lock:
            pool = _pools.setdefault(model, Pool())
    tiled = fused and B > FEW and has_tiles(model)
    # Also without a graph, so that a call that finds all graphs in use gets the same numbers.
    joint = pool.joint(model) if capture or fused or on_gpu else None
    with torch.inference_mode(False):  # inference tensors could not be written outside of inference mode
        memory = pool.borrow(cache, joint, graph_key(model, cache, (fused, tiled))) if capture else None
        return DecodeStep(memory or Memory(cache, joint), fused, tiled)


def can_decode(model: PreTrainedModel) -> bool:
    """Whether a step computes what the model would: layers recurrent or of attention to all tokens, and no
    module changed."""
    kinds = {*model.config.layer_types}
    if not kinds <= {"linear_attention", "full_attention"} or model.training:
        return False
    if "full_attention" in kinds and model.config._attn_implementation == "eager":  # there to be looked at
        return False
    if not as_written(model) or not isinstance(model.model, PreTrainedModel):
        return False
    if not all(type(block) is LRNNBlock and type(block.mlp) is SwiGLU for block in model.model.layers):
        return False
    return all(plain_weight(m) is not None for m in all_modules(model) if isinstance(m, nn.Linear))


def fused_obstacle(model: PreTrainedModel, B: int) -> str | None:
    """Why the fused kernels cannot decode this model for B sequences; None: they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not has_triton() or not (model.device.type == "cuda" or interpreted):
        return "it needs Triton and a GPU"
    if model.dtype == torch.float64:
        return "its products are in fp32, too coarse for a model in fp64"
    if not all(p.is_contiguous() for p in all_parameters(model)):
        return "it reads weights row by row as they lie, and some lie otherwise"
    most = MOST_FUSED if has_tiles(model) else FEW_WITHOUT_TILES
    if most < B:
        return f"it takes up to {most} sequences in {str(model.dtype).removeprefix('torch.')}, not {B}"
    if not can_decode(model):
        return "modules are not as they were built (adapters, hooks, patches), or in training"
    if any(block.mixer.fused_window is None for block in model.model.layers):
        return "it knows bd_lru and h_lru only, as plain layers"
    if any(isinstance(b.mixer, BlockDiagonalLRU) and b.mixer.diagonal_only for b in model.model.layers):
        return "it knows no transitions without what is off their diagonal"
    if not _is_what_kernels_compute(model):
        return "it knows no bias but that of gates and values, and no norm but RMSNorm with weights"
    widest = max(block.mixer.state_elements(1) // block.mixer.num_blocks for block in model.model.layers)
    if widest > TRITON_MOST:  # a larger block is shared by two programs: one would write what the other reads
        return f"it takes blocks and orders up to {TRITON_MOST}, not {widest}"
    return None


def has_tiles(model: PreTrainedModel) -> bool:
    """Whether a fused step can take sequences as tiles: with all weights in bf16."""
    # In fp16 the residual stream times a norm's weights may overflow, and tensor cores take no fp32.
    if torch.version.hip is not None or any(p.dtype != torch.bfloat16 for p in all_parameters(model)):
        return False
    return model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) >= (8, 0)


def _is_what_kernels_compute(model: PreTrainedModel) -> bool:
    """Whether the model has no bias or norm that its modules would use and the kernels would not."""
    blocks = model.model.layers
    norms = [model.model.norm, *(n for block in blocks for n in (block.mixer_norm, block.mlp_norm))]
    plain = [model.lm_head, *(block.mixer.out_proj for block in blocks)]
    plain += [p for block in blocks for p in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)]
    return (
        all(type(norm) in (RMSNorm, nn.RMSNorm) and norm.weight is not None for norm in norms)
        and all(plain_weight(projection) is not None and projection.bias is None for projection in plain)
        and all(block.mixer.gate_proj.bias is not None for block in blocks)
    )


def _is_step(model: PreTrainedModel, ids: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether the first call of a `generate` asks for one token after a state, and nothing else."""
    # Masks of later calls only grow by ones, so reading this one is enough.
    if not _is_one_token(ids, kwargs) or set(kwargs) - set(KNOWN):
        return False
    if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type) or ids.device != model.device:
        return False
    cache, mask = _given(kwargs), kwargs.get("attention_mask")
    if not isinstance(cache, Cache) or len(cache.layers) != len(model.config.layer_types):
        return False
    if not can_hold(cache) or any(held_by(layer) is None for layer in cache.layers):
        return False
    if any((h.shape[0], h.device) != (ids.shape[0], ids.device) for h in map(held_by, cache.layers)):
        return False
    keys = [layer.keys for layer in cache.layers if not is_recurrent(layer)]
    if len({k.shape[2] for k in keys}) > 1 or any(k.dtype != model.dtype for k in keys):
        return False
    if mask is None:
        return True
    mask = mask.bool()
    begun = mask[:, :-1].any(dim=1) if mask.shape[1] > 1 else mask[:, -1]
    return mask.ndim == 2 and bool((mask[:, -1] & begun).all())


def _given(kwargs: dict[str, Any]) -> Cache | None:
    """The cache, by either name."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def _is_one_token(ids: Tensor | None, kwargs: dict[str, Any]) -> bool:
    return ids is not None and ids.shape[1] == 1 and kwargs.get("use_cache", True) is not False
