"""Read a long input in segments, in the memory of one segment.

Legend: B batch, T time, V vocabulary.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..cache import CACHE

DEFAULT_SEGMENT = 2048


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor | Iterable[Tensor],
    segment: int = DEFAULT_SEGMENT,
    past_key_values: Cache | None = None,
    attention_mask: Tensor | None = None,
) -> CausalLMOutputWithPast:
    """Feed tokens to a language model segment by segment, through one cache; gradients are not kept.

    The result is that of one pass over all tokens, for the last of them. Attention layers keep keys and
    values of every token, so only models without attention need constant memory.

    Args:
        input_ids: (B, T) token ids on any device, or an iterable of such pieces, never held as a whole.
        segment: tokens a pass.
        past_key_values: a cache to continue, written in place; None: a new one.
        attention_mask: (B, S) with 0 on left padding, S = T or, after a cache, the length with what it saw;
            not for a stream.
    Returns:
        the output for the last segment: `past_key_values`, and `logits` (B, 1, V) of the last token.
    Raises:
        ValueError: a segment below 1, an empty input, a stream with a mask, a cache of another model, or a
            model that gives no cache back.
    """
    if segment < 1:
        raise ValueError(f"segment must be at least 1, not {segment}")
    if attention_mask is not None and not isinstance(input_ids, Tensor):
        raise ValueError("attention_mask needs input_ids as one tensor")
    pieces = [input_ids] if isinstance(input_ids, Tensor) else input_ids
    output = None
    masked = 0 if attention_mask is None else attention_mask.shape[1] - input_ids.shape[1]
    for ids in _segments(pieces, segment):
        masked += ids.shape[1]
        output = model(
            input_ids=ids.to(model.device),
            attention_mask=None if attention_mask is None else attention_mask[:, :masked].to(model.device),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: past_key_values},
        )
        past_key_values = getattr(output, CACHE)
        if past_key_values is None:
            raise ValueError(
                "the model gave no cache back, so the next segment would start from nothing: call it so "
                "that its forward pass returns past_key_values"
            )
    if output is None:
        raise ValueError("there are no tokens to read")
    return output


def _segments(pieces: Iterable[Tensor], segment: int) -> Iterator[Tensor]:
    for piece in pieces:
        if piece.shape[1]:
            yield from piece.split(segment, dim=1)
