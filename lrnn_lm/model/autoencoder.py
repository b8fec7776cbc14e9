"""LRNNForReconstruction: a sequence is read into one vector, from which a small network writes it out again.

The auto-encoder of MAD's compression task (arXiv 2403.17844): the last position's hidden state, with a fixed
encoding of the position to be written added, goes through two layers of the same width. Whatever the mixer
cannot carry in its state is lost.

Legend: B batch, T time, D model width, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from .config import LRNNConfig
from .layers import RMSNorm
from .loss import head_loss
from .modeling import LRNNModel, LRNNPreTrainedModel


def position_code(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """(T, D) fp32: sines of the position in the first half, cosines in the second, at geometric rates."""
    half = -(-width // 2)
    rates = torch.exp(-math.log(10_000) * torch.arange(half, device=device) / max(1, half - 1))
    angles = torch.arange(length, device=device).unsqueeze(1) * rates  # (T, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


class LRNNForReconstruction(LRNNPreTrainedModel):
    """LRNNModel as the encoder, and a decoder that sees only its last hidden state."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LRNNConfig):
        super().__init__(config)
        D = config.hidden_size
        self.model = LRNNModel(config)
        self.decoder = nn.Sequential(
            RMSNorm(D, eps=config.rms_norm_eps), nn.Linear(D, D), nn.GELU(),
            RMSNorm(D, eps=config.rms_norm_eps), nn.Linear(D, D), nn.GELU(),
            RMSNorm(D, eps=config.rms_norm_eps),
        )  # fmt: skip
        self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        reset: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        return_logits: bool | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of the sequence that was read, and the mean cross-entropy in nats with labels.

        Args:
            input_ids: (B, T).
            shift_labels: (B, T) the target at each position; -100 for none.
            num_items_in_batch, return_logits: as in LRNNForCausalLM.
        """
        hidden = self.model(input_ids=input_ids, reset=reset, use_cache=False).last_hidden_state
        code = position_code(input_ids.shape[1], hidden.shape[-1], hidden.device).to(hidden)
        written = self.decoder(hidden[:, -1:] + code)  # (B, T, D)
        loss = None
        if shift_labels is not None:
            loss, _ = head_loss(self, written, shift_labels, num_items_in_batch)
        wanted = return_logits if return_logits is not None else shift_labels is None or not self.training
        return CausalLMOutputWithPast(loss=loss, logits=self.lm_head(written) if wanted else None)
