"""The Hugging Face model around the mixers.

Legend: B batch, T time, D model width, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
    AutoModel,
    AutoModelForCausalLM,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..mixers.attention import AttentionWeights
from ..mixers.base import Mixer, SequenceContext, compute_dtype, initialise
from ..mixers.spans import takes_blocks
from .cache import CACHE, adopt, check_cache, check_room, is_recurrent, make_cache, one_cache, tokens_seen
from .carried import CarriedStates
from .config import LRNNConfig
from .decoding.built import remember
from .decoding.generation import LRNNGenerationMixin
from .documents import PACKING, check_arguments, check_cache_position, check_tokens
from .layers import LRNNBlock, RMSNorm, checkpoint_without_cache
from .loss import check_labels, counted_targets, head_loss, shift_labels
from .masks import Layout, attention_masks, check_padding, layout, positions_of, tokens_last


def _block_outputs() -> OutputRecorder:
    """How transformers records hidden states: one for each application of a block.

    With `repeat` more than layers: transformers 5.23 asks how many for `output_hidden_states=[-1]`.
    """
    recorder = OutputRecorder(LRNNBlock)
    recorder.num_hidden_layers_key = "num_applied_layers"  # no argument of older versions
    return recorder


class LRNNPreTrainedModel(PreTrainedModel):
    """Initialisation, and what transformers needs to know about every LRNN model."""

    config: LRNNConfig
    config_class = LRNNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LRNNBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # a recurrent state cannot be cut back to an earlier token
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": _block_outputs(),
        "attentions": OutputRecorder(AttentionWeights),  # where attn_implementation="eager"
    }

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, as `_init_weights` leaves loaded parameters alone like that of transformers' own models."""
        # If true, modules whose parameters are in children (an LSTM mixer) would keep torch's initial values.
        return False

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        **options: Any,
    ) -> None:
        """Called by transformers to switch gradient checkpointing of layers on and off."""
        function = partial(checkpoint_without_cache, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, function, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, initializer_range) for matrices, narrower where they write to the residual stream."""
        std = self.config.initializer_range
        initialise(module, std, std / math.sqrt(2 * len(self.config.layer_mixers)), init)
        if isinstance(module, LRNNBlock) and module.initial_state is not None:
            init.zeros_(module.initial_state)


class LRNNModel(LRNNPreTrainedModel):
    """Embedding, blocks and a final norm."""

    def __init__(self, config: LRNNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LRNNBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def applied_layers(self) -> list[LRNNBlock]:
        """The layers in the order in which they are applied: all of them, `repeat` times.

        Fewer while the config says so, as transformers' early exit has it.
        """
        # Of a list: a cut of a ModuleList makes a module, 50 us in each pass.
        return [*self.layers][: self.config.num_hidden_layers] * self.config.repeat

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        reset: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) of sequences, after the final norm.

        Args:
            input_ids: (B, T) token ids, or `inputs_embeds` (B, T, D) instead.
            attention_mask: (B, S) with 0 on padding, S = T or the length so far; padding anywhere changes
                neither results nor states. Or (B, 1, T, T), causal within documents.
            position_ids: (B, T) positions for attention layers; counted on from the cache if None. A document
                starts where they do not grow.
            past_key_values, cache (in transformers 5.24): a cache, written in place; any number of tokens
                continues it. Or `CarriedStates`, through which gradients flow, in training by segments.
            use_cache: whether to make a cache if none is given, and return it; None: as the config says,
                but none where layers are checkpointed; with a cache they are not.
            reset: (B, T) bool, true where a document starts; later tokens see nothing before it.
            seq_idx, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: other forms of `reset`.

        Raises:
            ValueError: arguments that contradict each other, or that the model does not read.
        """
        check_arguments(kwargs)
        check_tokens(input_ids, inputs_embeds)
        past_key_values = one_cache(past_key_values, cache)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if not self.config.residual_in_fp32:
            hidden_states = hidden_states.to(compute_dtype(hidden_states))
        recomputed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if use_cache is None:  # recomputed layers get no cache, unless the caller passes one
            use_cache = self.config.use_cache and not (recomputed and past_key_values is None)
        if use_cache and past_key_values is None:
            past_key_values = make_cache(self.config)
        masks = (attention_mask, position_ids, reset)
        batch = batch_layout(self.config, hidden_states, past_key_values, *masks, kwargs)
        context = self._context(hidden_states, batch, position_ids, past_key_values)
        token_mask = None if batch.token_mask is None else batch.token_mask.unsqueeze(-1)  # (B, T, 1)
        order = None
        if token_mask is not None and "linear_attention" in self.config.layer_types:
            order = tokens_last(batch.token_mask, keep_state=past_key_values is not None)
        if isinstance(past_key_values, CarriedStates):
            for i, layer in enumerate(self.applied_layers):
                carried = past_key_values.take(i)
                hidden_states, carried = layer(hidden_states, context, token_mask, order, None, carried)
                hidden_states = past_key_values.give(i, carried, hidden_states)
            past_key_values.move(hidden_states.shape[1])
        else:
            for i, layer in enumerate(self.applied_layers):
                # By position, as transformers drops a cache passed by name where it checkpoints a layer.
                cached = () if past_key_values is None else (past_key_values, None, i)
                hidden_states = layer(hidden_states, context, token_mask, order, *cached)
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values if use_cache else None)

    def _mixers(self) -> list[Mixer]:
        """The mixer of each layer. ValueError if one is of another kind than the config says, by which masks
        and caches go: layers were taken out (pruning) or repeated (PEFT's `layer_replication`)."""
        mixers = [layer.own_mixer for layer in self.applied_layers]
        for i, (mixer, kind) in enumerate(zip(mixers, self.config.layer_types, strict=False)):
            if mixer.layer_type != kind:
                raise ValueError(
                    f"layer {i} is of {mixer.layer_type}, and by the config of {kind}: where layers were "
                    "taken out or repeated, set config.layer_pattern to the mixers that there are; after a "
                    "window was set or taken off, load the model with that config"
                )
        return mixers

    def context_after(
        self, ids: Tensor, cache: Cache, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> SequenceContext:
        """What the mixers need to know of one more token ids (B, 1) of each row after a cache."""
        x = ids.unsqueeze(2)
        batch = batch_layout(self.config, x, cache, attention_mask, position_ids, None, {})
        return self._context(x, batch, position_ids, cache)

    def _context(
        self, x: Tensor, batch: Layout, position_ids: Tensor | None, cache: Cache | None
    ) -> SequenceContext:
        """What the mixers need to know of the tokens; masks and positions only if there is attention."""
        reset = batch.starts
        if batch.first is not None:  # behind padding a document starts, so that padding leaves no trace
            reset = batch.first if reset is None else reset | batch.first
        keep_state, given = cache is not None, batch.attention_mask
        mixers = self._mixers()
        # By the kind, not the class: PEFT (`modules_to_save`) and torch.compile put another class around it.
        attention = [mixer for mixer in mixers if mixer.layer_type != "linear_attention"]
        if not attention:
            return SequenceContext(reset=reset, keep_state=keep_state)
        order = None
        if isinstance(given, dict):
            masks = given
        else:
            layer = None if cache is None else next(each for each in cache.layers if not is_recurrent(each))
            past = 0 if layer is None else layer.get_seq_length()
            check_padding(layer, given, x.shape[1], past)
            position_ids = positions_of(given, x, past, layer, position_ids)
            eager = self.config._attn_implementation == "eager"
            blocks = not eager and takes_blocks(x, min(mixer.head_dim for mixer in attention))
            masks, order = attention_masks(self.config, x, given, batch.starts, cache, blocks)
        return SequenceContext(
            reset,
            attention_mask=masks.get("full_attention"),
            window_mask=masks.get("sliding_attention"),
            window_order=order,
            positions=position_ids,
            keep_state=keep_state,
            attention_weights=self.config._attn_implementation == "eager",
            rotary=next((mixer.rotary(position_ids) for mixer in attention if mixer.use_rope), None),
        )


@dataclass
class LRNNCausalLMOutput(CausalLMOutputWithPast):
    """transformers' outputs, and the part of `loss` that is the z-loss, if one was asked for."""

    z_loss: Tensor | None = None


class LRNNForCausalLM(LRNNGenerationMixin, LRNNPreTrainedModel):  # the mixin first: it replaces methods
    """The language model: LRNNModel and a linear head, tied to the embedding if the config says so."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LRNNConfig):
        super().__init__(config)
        self.model = LRNNModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Assisted decoding cuts back, which only keys of all tokens can be.
        self._is_stateful = {*config.layer_types} != {"full_attention"}
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        cache: Cache | None = None,
        reset: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the mean loss in nats if labels are given; what is not named: see LRNNModel.

        Args:
            labels: (B, T) the inputs themselves, -100 where there is no target. They are shifted here, within
                documents. Padding is no target and predicts none.
            num_items_in_batch: number of targets to average the loss over; None for those in this batch.
            logits_to_keep: compute logits of the last N positions only (0: all), or of the given positions.
            return_logits: None: except in training with labels, whose loss is computed in chunks of logits.
            reset, seq_idx: see LRNNModel. The Trainer drops columns of a data set that are not named here.
            shift_labels: (B, T) targets where they are predicted; `labels` beside them are not read.
            z_loss: in training, adds this times the mean of log^2 Z to the loss; the outputs tell that part.
        """
        tokens = check_tokens(input_ids, inputs_embeds)
        past_key_values = one_cache(past_key_values, cache)
        kwargs |= {"reset": reset, "seq_idx": seq_idx}
        targets = kwargs.pop("shift_labels", None)  # not named: the Trainer wants data for names of labels
        z_loss = kwargs.pop("z_loss", 0.0) * self.training
        if targets is None and labels is not None:
            masks = (attention_mask, position_ids, reset)
            batch = batch_layout(self.config, tokens, past_key_values, *masks, kwargs)
            targets, num_items_in_batch = _targets(labels, tokens, batch, num_items_in_batch)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        hidden = outputs.last_hidden_state
        loss = z_part = logits = None
        if targets is not None:
            loss, z_part = head_loss(self, hidden, targets, num_items_in_batch, z_loss)
        if return_logits or (return_logits is None and (targets is None or not self.training)):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        return LRNNCausalLMOutput(
            loss=loss,
            z_loss=z_part if z_loss else None,
            logits=logits,
            **{key: getattr(outputs, key) for key in (CACHE, "hidden_states", "attentions")},
        )


def _targets(
    labels: Tensor, tokens: Tensor, batch: Layout, num_items: Tensor | int | None
) -> tuple[Tensor, Tensor | int | None]:
    """Labels (B, T) where they are predicted, and what their loss is divided by."""
    check_labels(labels, tokens)
    targets = shift_labels(labels.long(), batch.starts, batch.token_mask)
    if batch.token_mask is None and batch.starts is None:
        return targets, num_items
    return targets, counted_targets(labels, targets, num_items)


def batch_layout(
    config: LRNNConfig,
    tokens: Tensor,
    cache: Cache | None,
    attention_mask: Tensor | dict[str, Any] | None,
    position_ids: Tensor | None,
    reset: Tensor | None,
    kwargs: dict[str, Any],
) -> Layout:
    """Padding and documents of `tokens` (B, T, ..), from the arguments of the forward pass."""
    if cache is not None:
        check_cache(config, cache)
        given = (position_ids, reset, *(kwargs.get(key) for key in PACKING))
        adopt(cache, noted=any(each is not None for each in given))
    past = tokens_seen(cache)
    check_room(cache, past, tokens.shape[1])
    check_cache_position(kwargs.get("cache_position"), tokens.shape[1], past)
    if isinstance(attention_mask, dict):  # as `create_masks_for_generate` makes it
        unplaced = position_ids is None or reset is not None
        kinds = {*config.layer_types} - {"linear_attention"}
        if not kinds or set(attention_mask) != kinds or tokens.shape[1] > 1 or unplaced:
            raise ValueError(
                "masks by kind of layer are for one token after a static cache, beside position_ids, as in "
                "generate; pass one attention_mask (rows, tokens so far), 0 on padding"
            )
        return Layout(attention_mask)
    packing = {key: kwargs[key] for key in PACKING if kwargs.get(key) is not None}
    any_mask = {*config.layer_types} == {"full_attention"}
    return layout(tokens, past, attention_mask, position_ids, reset, packing, any_mask)


remember(LRNNModel, LRNNForCausalLM)
AutoModel.register(LRNNConfig, LRNNModel, exist_ok=True)
AutoModelForCausalLM.register(LRNNConfig, LRNNForCausalLM, exist_ok=True)
# The Trainer looks into these tables to see whether label smoothing has to shift the labels.
MODEL_MAPPING_NAMES[LRNNConfig.model_type] = LRNNModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LRNNConfig.model_type] = LRNNForCausalLM.__name__
# `transformers serve` takes config.architectures[0] from the module transformers. A process has two
# objects of that module (processing_utils makes the second), so the name goes to their type.
type(transformers).LRNNForCausalLM = AutoModelForCausalLM  # the Auto class: it takes each folder's own code
