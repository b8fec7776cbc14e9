"""The Hugging Face shell around the mixers: one modelling file for all of them.

Legend: B batch, T time, D model width, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..mixers import LSTM, ResidualOutput, SequenceContext
from .cache import make_cache
from .config import LRNNConfig
from .layers import LRNNBlock
from .loss import linear_cross_entropy, shift_labels


class LRNNPreTrainedModel(PreTrainedModel):
    """Initialisation, and what transformers needs to know about every LRNN model."""

    config: LRNNConfig
    config_class = LRNNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LRNNBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # a recurrent state cannot be cut back to an earlier token
    _can_record_outputs = {"hidden_states": LRNNBlock}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, initializer_range) for matrices, narrower where they write to the residual stream."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            narrow = (
                math.sqrt(2 * self.config.num_hidden_layers) if isinstance(module, ResidualOutput) else 1.0
            )
            init.normal_(module.weight, mean=0.0, std=std / narrow)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, LSTM):
            self._init_lstm(module, std)

    def _init_lstm(self, module: LSTM, std: float) -> None:
        """Orthogonal recurrence and a forget gate that starts open, as is the custom for LSTMs."""
        W = module.width
        init.normal_(module.cell.weight_ih_l0, mean=0.0, std=std)
        recurrent = torch.cat([nn.init.orthogonal_(torch.empty(W, W)) for _ in range(4)])
        init.copy_(module.cell.weight_hh_l0, recurrent)
        init.zeros_(module.cell.bias_hh_l0)
        init.copy_(module.cell.bias_ih_l0, torch.cat([torch.zeros(W), torch.ones(W), torch.zeros(2 * W)]))


class LRNNModel(LRNNPreTrainedModel):
    """Embedding, blocks and a final norm."""

    def __init__(self, config: LRNNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LRNNBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch of sequences.

        Args:
            input_ids: (B, T) token ids, or `inputs_embeds` (B, T, D) instead.
            attention_mask: (B, S) with 0 on padding, S = T or the length so far; padding before the first
                token leaves the result as it would be without.
            position_ids: (B, T) positions for attention layers; counted on from the cache if None.
            past_key_values: a cache, read and written in place; any number of new tokens continues it.
            use_cache: whether to make a cache where none is given.
            reset: (B, T) bool, true where a document starts: nothing before it is seen from there on.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = make_cache(self.config)
        token_mask = create_recurrent_attention_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        context = self._context(
            hidden_states, attention_mask, token_mask, position_ids, past_key_values, reset
        )
        if token_mask is not None:
            token_mask = token_mask.unsqueeze(-1)
        for layer in self.layers:
            hidden_states = layer(hidden_states, context, token_mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def _context(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        token_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        reset: Tensor | None,
    ) -> SequenceContext:
        """What the mixers need to know of positions; the attention parts only if there is attention."""
        document_start = reset
        if token_mask is not None:
            # Padding before the first token must not show: the first token starts a document.
            seen_before = attention_mask[:, : attention_mask.shape[1] - x.shape[1]].any(dim=1, keepdim=True)
            mask = token_mask.bool()
            first = mask & (mask.cumsum(dim=1) == 1) & ~seen_before
            reset = first if reset is None else reset | first
        if "full_attention" not in self.config.layer_types:
            return SequenceContext(reset=reset)
        layer_idx = self.config.layer_types.index("full_attention")
        past = 0 if cache is None else cache.layers[layer_idx].get_seq_length()
        if position_ids is None:
            position_ids = (torch.arange(x.shape[1], device=x.device) + past).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids if document_start is None else None,
            and_mask_function=None if document_start is None else _same_document(document_start, past),
            layer_idx=layer_idx,
        )
        return SequenceContext(reset=reset, attention_mask=mask, positions=position_ids)


def _same_document(reset: Tensor, past: int) -> Any:
    """A mask function: query and key in the same document; the `past` cached keys are in the one before."""
    document = nn.functional.pad(reset.long().cumsum(dim=1), (past, 0))  # (B, past + T)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document[batch, query] == document[batch, key]

    return visible


class LRNNForCausalLM(LRNNPreTrainedModel, GenerationMixin):
    """The language model: LRNNModel and a linear head, tied to the embedding if the config says so."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LRNNConfig):
        super().__init__(config)
        self.model = LRNNModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """`generate` passes the 2-d mask on: the model makes what each kind of layer needs of it."""
        return attention_mask

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Whatever cache transformers prepares or the caller gave: a view of it that knows its length."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and all(kind == "linear_attention" for kind in self.config.layer_types):
            model_kwargs["past_key_values"] = make_cache(self.config, cache)

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
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the mean cross-entropy in nats if labels are given.

        Args:
            labels: (B, T) the inputs themselves, -100 where there is no target; shifted here.
            shift_labels: (B, T) targets already aligned with the positions that predict them, not `labels`.
            num_items_in_batch: how many targets the loss is averaged over; None for those in this batch.
            logits_to_keep: compute logits of the last so many positions (0: all), or of these positions.
            return_logits: whether logits are wanted; None: always, but when training with labels, where the
                loss is computed in chunks and the logits never exist as a whole.
            The rest: as in LRNNModel.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        targets = _targets(labels, shift_labels)
        loss = None
        if targets is not None:
            loss = linear_cross_entropy(
                hidden, self.lm_head.weight, targets, num_items_in_batch, self.config.loss_chunk
            )
        if return_logits is None:
            return_logits = targets is None or not self.training
        logits = None
        if return_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _targets(labels: Tensor | None, shifted: Tensor | None) -> Tensor | None:
    """Targets aligned with hidden states, from either of the two ways to give them."""
    if shifted is not None:
        return shifted
    return None if labels is None else shift_labels(labels)


AutoModel.register(LRNNConfig, LRNNModel, exist_ok=True)
AutoModelForCausalLM.register(LRNNConfig, LRNNForCausalLM, exist_ok=True)
