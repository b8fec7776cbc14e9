"""The loss on held-out rows, each rank taking a part of them."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist

from ..data import PreparedData, SyntheticData, validation_batches
from ..data.encode import Encoder
from ..data.tokenize import read_facts
from ..model.loss import IGNORE
from ..recipe import Recipe
from .parallel import reshard


@dataclass(frozen=True)
class Validation:
    """What a validation found, the same on every rank."""

    loss: float  # mean over targets, nats
    bits_per_byte: float | None = None  # of text
    # Of synthetic tasks: fraction of targets with the largest logit. Text's logits never exist as a whole.
    accuracy: float | None = None


@torch.no_grad()
def validate(
    prepared: PreparedData | SyntheticData,
    recipe: Recipe,
    accelerator: Accelerator,
    model: nn.Module,
    forward: Callable[..., Any],
    between: Callable[[], None],
    held_out_bytes: int | None,
) -> Validation:
    """The mean loss over the targets of the first `eval.tokens` held-out tokens. Every rank calls it.

    forward(batch, num_items, return_logits=..) gives the outputs of `model`. between() is called after each
    batch and may raise. held_out_bytes: of the text that is read; None for a synthetic task.
    """
    model.eval()
    synthetic = held_out_bytes is None
    total = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # nats, targets, hits
    for batch in validation_batches(
        prepared.validation,
        recipe.data.sequence_length,
        recipe.train.micro_batch,
        recipe.eval.tokens,
        accelerator.process_index,
        accelerator.num_processes,
    ):
        targets = (batch["labels"] != IGNORE).sum().to(accelerator.device)
        outputs = forward(batch, 1.0, return_logits=synthetic)
        hits = _hits(outputs.logits, batch["labels"]) if synthetic else targets * 0
        total += torch.stack([outputs.loss.double(), targets.double(), hits.double()])
        between()
    reshard(model)
    if accelerator.num_processes > 1:
        dist.all_reduce(total)
    nats, targets, hits = total.tolist()
    if synthetic:
        return Validation(nats / targets, accuracy=hits / targets)
    return Validation(nats / targets, bits_per_byte=nats / math.log(2) / held_out_bytes)


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """() number of targets with the largest logit. logits (B, T, V); labels (B, T), on any device."""
    return (logits.argmax(dim=-1) == labels.to(logits.device)).sum()


def bytes_read(prepared: PreparedData, sequence_length: int, max_tokens: int) -> int:
    """Bytes of the held-out text that a validation of at most `max_tokens` predicts.

    They are counted, as bytes per token differ between texts: all bytes of the documents that fit, and of the
    last document those of its tokens up to the end of the last row.
    """
    shards = prepared.validation
    stop = min(max(1, max_tokens // sequence_length) * sequence_length + 1, shards.num_tokens)
    if stop == shards.num_tokens:
        return shards.num_bytes
    starts = shards.document_starts(0, stop)
    with prepared.heldout_path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, len(starts))]
    encoder = Encoder(prepared.tokenizer_dir, read_facts(prepared.tokenizer_dir))
    cut = encoder.bytes_of(texts[-1], stop - int(starts[-1]))
    return sum(len(text.encode()) for text in texts[:-1]) + cut


def validation_line(step: int, tokens_per_step: int, found: Validation) -> dict[str, Any]:
    """The line of metrics.jsonl."""
    line = {"step": step, "tokens": step * tokens_per_step, "validation_loss": found.loss}
    if found.accuracy is None:
        return line | {"bits_per_byte": found.bits_per_byte}
    return line | {"accuracy": found.accuracy}
