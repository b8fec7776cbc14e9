"""Classifiers and reward models: LRNNModel with scores of whole rows, or of each token.

Legend: B batch, T time, D model width, C classes (`config.num_labels`; 1 for a reward or a regression).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.utils.generic import can_return_tuple

from ..mixers.base import is_traced
from .cache import CACHE, one_cache
from .config import LRNNConfig
from .documents import before, check_tokens
from .loss import cross_entropy
from .masks import Layout
from .modeling import LRNNModel, LRNNPreTrainedModel, batch_layout


class _Classifier(LRNNPreTrainedModel):
    """The model and a linear head, under the names of transformers' own classifiers."""

    def __init__(self, config: LRNNConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LRNNModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
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
        use_cache: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        cache: Cache | None = None,
        reset: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, C) of rows or (B, T, C) of tokens, and the loss if labels are given.

        Args:
            labels: of tokens (B, T), -100 for none, not shifted. Of rows (B,): classes, or numbers if C = 1;
                or (B, C), by `config.problem_type`.
            num_items_in_batch: number of labels to average the loss over; None for those in this batch.
            others: see LRNNModel.
        """
        tokens = check_tokens(input_ids, inputs_embeds)
        past_key_values = one_cache(past_key_values, cache)
        kwargs |= {"reset": reset, "seq_idx": seq_idx}
        masks = (attention_mask, position_ids, reset)
        batch = batch_layout(self.config, tokens, past_key_values, *masks, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        kept = batch.attention_mask  # 4-d where it was not read: such a mask tells nothing of padding
        unread = attention_mask is None or (isinstance(kept, Tensor) and kept.ndim == 4)
        unmasked = input_ids if unread else None
        logits = self.score(self._read(outputs.last_hidden_state, unmasked, batch))
        return SequenceClassifierOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels, num_items_in_batch),
            logits=logits,
            **{key: getattr(outputs, key) for key in (CACHE, "hidden_states", "attentions")},
        )

    def _read(self, hidden: Tensor, input_ids: Tensor | None, batch: Layout) -> Tensor:
        """What the scores are of, from all hidden states (B, T, D); ids where no mask tells of padding."""
        return hidden


class LRNNForTokenClassification(_Classifier):
    """Scores of each token; it has seen the tokens before it."""

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        return cross_entropy(logits, labels, num_items)


class LRNNForSequenceClassification(_Classifier):
    """Scores of each row, which is one document: those of its last token."""

    def _read(self, hidden: Tensor, input_ids: Tensor | None, batch: Layout) -> Tensor:
        """(B, D) of the last tokens: by the mask, so that an EOS that pads elsewhere counts; without a mask
        by the padding token, as in transformers."""
        B, T = hidden.shape[:2]
        mask, pad = batch.token_mask, self.config.pad_token_id
        if input_ids is not None and (pad is not None or B > 1):
            if pad is None:
                raise ValueError(
                    "no padding is known: pass attention_mask (rows, tokens), or set config.pad_token_id"
                )
            mask = input_ids != pad
        if batch.starts is not None and not is_traced():
            nothing = torch.zeros_like(batch.starts)
            follows = before(~nothing if mask is None else mask, mask, nothing)
            if bool((batch.starts & follows).any()):
                raise ValueError("a row holds several documents, and has one score: give each its own row")
        if mask is None:
            return hidden[:, -1]
        last = (torch.arange(T, device=mask.device) * mask).argmax(dim=1).to(hidden.device)
        return hidden[torch.arange(B, device=hidden.device), last]

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        B, C = logits.shape
        if tuple(labels.shape) not in ((B,), (B, 1), (B, C)):  # (B, B) would be broadcast
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not fit scores of shape {(B, C)}: pass one a row"
                + f", or ({B}, {C})" * (C > 1)
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = labels.to(logits.dtype) if self.num_labels == 1 else labels
        options = {"pooled_logits": logits, "config": self.config, "num_items_in_batch": num_items}
        loss = self.loss_function(labels=targets, **options)
        if num_items is None or self.config.problem_type == "single_label_classification":  # which reads it
            return loss
        return loss * labels.numel() / num_items


AutoModelForSequenceClassification.register(LRNNConfig, LRNNForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(LRNNConfig, LRNNForTokenClassification, exist_ok=True)
# Pipelines look into these tables.
_TYPE = LRNNConfig.model_type
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[_TYPE] = LRNNForSequenceClassification.__name__
MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES[_TYPE] = LRNNForTokenClassification.__name__
