"""What a model costs: parameters, operations a token, state, memory. Nothing is allocated for it.

A multiply-add counts as two operations. A product with a weight counts where it is computed, so a tied head
is work but no parameters; looking up an embedding is no work. Norms, activations and residual sums are left
out, as is the custom. Training costs three forward passes (the backward pass is two); recomputation is not
counted.

Legend: B rows, T time, D model width, V vocabulary.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_utils import local_torch_dtype

from ..mixers.base import MixerCost, SequenceContext
from .autoencoder import LRNNForReconstruction
from .config import LRNNConfig
from .layers import LRNNBlock
from .modeling import LRNNForCausalLM

STATE_BYTES = 4  # recurrent states are kept in fp32
TRAINING_PASSES = 3  # forward, and twice that backward


@dataclass(frozen=True)
class Account:
    """The costs of one model at one context length."""

    context_length: int
    parameters: dict[str, int]  # by part; a tied head has none of its own
    work: MixerCost  # of the whole model, on average over a context of `context_length`
    recurrent_state_bytes: int  # of one sequence, at any length
    attention_state_bytes: int  # of one sequence after `context_length` tokens; grows with it

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def flops_per_token(self) -> int:
        """Forward operations a token."""
        return self.work.total

    @property
    def flops_per_token_training(self) -> int:
        """Forward and backward operations a token: what MFU is measured in."""
        return TRAINING_PASSES * self.work.total

    @property
    def state_bytes(self) -> int:
        """State of one sequence after `context_length` tokens."""
        return self.recurrent_state_bytes + self.attention_state_bytes


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device that holds the whole model; weights and gradients in fp32."""

    weights: int
    gradients: int
    optimizer: int  # its state
    activations: int  # kept for the backward pass; with checkpointing, each layer's input and one whole layer
    loss: int  # the final hidden states, and the logits of one chunk with their gradient

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def account(config: LRNNConfig, context_length: int, cache_bytes: int = 2) -> Account:
    """Count a model's costs.

    Args:
        config: the model.
        context_length: tokens in a context; matters where there is attention.
        cache_bytes: bytes a number of attention's keys and values (2: bf16).
    Raises:
        ValueError: a context length below 1, or a model that cannot be built.
    """
    if context_length < 1:
        raise ValueError(f"context_length must be at least 1, not {context_length}")
    model = meta_model(config)
    mixers = [layer.mixer for layer in model.model.applied_layers]
    costs = [mixer.cost(context_length) for mixer in mixers]
    parts = [model.lm_head, *model.model.applied_layers]
    parts += [model.decoder] if isinstance(model, LRNNForReconstruction) else []
    linear = sum(2 * m.weight.numel() for part in parts for m in part.modules() if isinstance(m, nn.Linear))
    state = Counter()
    for mixer in mixers:
        state[mixer.layer_type] += mixer.state_elements(context_length)
    return Account(
        context_length=context_length,
        parameters=_parameters_by_part(model),
        work=MixerCost(
            products=linear + sum(cost.products for cost in costs),
            scan=sum(cost.scan for cost in costs),
            sequential=sum(cost.sequential for cost in costs),
            attention=sum(cost.attention for cost in costs),
        ),
        recurrent_state_bytes=state["linear_attention"] * STATE_BYTES,
        attention_state_bytes=(state["full_attention"] + state["sliding_attention"]) * cache_bytes,
    )


def model_class(config: LRNNConfig) -> type[LRNNForCausalLM] | type[LRNNForReconstruction]:
    """The class that `config.architectures` names; a language model where it names none."""
    encodes = LRNNForReconstruction.__name__ in (config.architectures or [])
    return LRNNForReconstruction if encodes else LRNNForCausalLM


def meta_model(config: LRNNConfig) -> LRNNForCausalLM | LRNNForReconstruction:
    """The model without memory: shapes only."""
    with torch.device("meta"):
        return model_class(config)(config)


def check_parameters(config: LRNNConfig, expected: int | None) -> None:
    """Raise ValueError, naming both numbers, if a model has another parameter count than a recipe says."""
    if expected is None:
        return
    actual = sum(_parameters_by_part(meta_model(config)).values())
    if actual != expected:
        raise ValueError(
            f"model.parameters says {expected:,}, but this model has {actual:,}; "
            "correct the model, or the number (model.parameters=null takes any)"
        )


def _parameters_by_part(model: LRNNForCausalLM | LRNNForReconstruction) -> dict[str, int]:
    """Embedding, head, each mixer's projections, MLP, norms, decoder; shared parameters count once."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[_part(name, model)] += parameter.numel()
    return dict(counts)


def _part(name: str, model: LRNNForCausalLM | LRNNForReconstruction) -> str:
    """The part that a parameter belongs to, by its name: `model.layers.3.mixer.gate_proj.weight`."""
    keys = name.split(".")
    if keys[0] == "lm_head":
        return "head"
    if keys[0] == "decoder":  # of an auto-encoder
        return "decoder"
    if keys[1] == "embed_tokens":
        return "embedding"
    if keys[1] == "norm" or keys[3].endswith("norm"):
        return "norms"
    if keys[3] == "mlp":
        return "mlp"
    kind = model.config.layer_mixers[int(keys[2])]["type"]
    return f"{kind}.{keys[4] if keys[3] == 'mixer' else keys[3]}"


def training_memory(
    config: LRNNConfig,
    micro_batch: int,
    sequence_length: int,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    optimizer: int = 0,
) -> TrainingMemory:
    """Estimate the memory of a training step on a device that holds the whole model.

    Args:
        config: the model.
        micro_batch, sequence_length: B and T.
        dtype: of activations; bfloat16 under autocast.
        checkpointing: whether layers are recomputed in the backward pass.
        optimizer: bytes of its state, which it declares itself: `train.optim.state_bytes`.
    """
    parameters = sum(_parameters_by_part(meta_model(config)).values())
    kinds = [repr(sorted(spec.items())) for spec in config.layer_mixers]
    layers = {  # bytes of a layer of each kind: measuring all layers would take as many times as long
        kind: saved_bytes(config, kinds.index(kind), micro_batch, sequence_length, dtype)
        for kind in set(kinds)
    }
    hidden = micro_batch * sequence_length * config.hidden_size * dtype.itemsize
    if checkpointing:
        activations = len(kinds) * hidden + max(layers.values())
    else:
        activations = sum(layers[kind] for kind in kinds)
    chunk = min(config.loss_chunk, micro_batch * sequence_length)
    return TrainingMemory(
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=optimizer,
        activations=activations,
        loss=2 * hidden + chunk * config.vocab_size * (4 + dtype.itemsize),
    )


def saved_bytes(config: LRNNConfig, layer_idx: int, rows: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of one layer's forward pass over (rows, length), the weights aside."""
    saved: dict[int, torch.UntypedStorage] = {}  # the storages are held, so that no address is used twice

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage._cdata] = storage
        return x

    with FakeTensorMode(), local_torch_dtype(dtype):
        layer = LRNNBlock(config, layer_idx)
        weights = {p.untyped_storage()._cdata for p in layer.parameters()}
        x = torch.empty(rows, length, config.hidden_size, requires_grad=True)
        context = SequenceContext(positions=torch.arange(length).unsqueeze(0))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            layer(x, context)
    return sum(storage.nbytes() for address, storage in saved.items() if address not in weights)
