"""Rows of packed documents, and what a whole one gives: for tests of passes that take a part of a row."""

import torch
from small_models import MIXER_ROWS, tokens
from torch import Tensor, nn

from lrnn_lm.mixers import MIXERS as REGISTRY

MIXERS = {
    **{
        name: [spec]
        for name, spec in MIXER_ROWS.items()
        if spec["type"] != "attention" and REGISTRY[spec["type"]].differentiable_state
    },
    "attention-window": [MIXER_ROWS["attention-window"]],
    "attention-long-window": [{"type": "attention", "num_heads": 2, "num_kv_heads": 1, "window": 9}],
    "hybrid-window": [MIXER_ROWS["bd_lru-all"], MIXER_ROWS["attention-window"], MIXER_ROWS["h_lru"]],
}
ITEMS = 29.0


def rows(length: int = 24, resets: bool = True) -> dict[str, Tensor]:
    """Three rows of packed documents: starts inside segments of 4, 6, 8 and 12, and at their boundaries."""
    ids = tokens(3, length)
    labels = tokens(3, length, seed=3)
    labels[1, -5:] = -100  # the rest of a row that its document does not fill
    reset = torch.zeros(3, length, dtype=torch.bool)
    if resets:
        reset[0, [5, 12, 13, 18]] = True
        reset[1, [0, 8, 23]] = True
    return {"input_ids": ids, "reset": reset, "labels": labels}


def at_once(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss = model(
        input_ids=batch["input_ids"], reset=batch["reset"], shift_labels=batch["labels"],
        num_items_in_batch=ITEMS, return_logits=False, use_cache=False,
    ).loss  # fmt: skip
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def over_a_piece(model: nn.Module, part: dict[str, Tensor], carried, labels=None, logits=False):
    """The model's output for a piece of rows, from what was carried to it; `labels`: of the next tokens."""
    return model(
        input_ids=part["input_ids"], reset=part["reset"], shift_labels=labels, num_items_in_batch=ITEMS,
        return_logits=logits, use_cache=False, past_key_values=carried,
    )  # fmt: skip
