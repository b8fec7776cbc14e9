"""The loss on held-out rows, shared out over the ranks."""

import json
import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

from ..data import PreparedData, SyntheticData, validation_batches
from ..data.encode import Encoder
from ..data.tokenize import read_facts
from ..model.loss import IGNORE
from .parallel import reshard

if TYPE_CHECKING:
    from .loop import Trainer


@dataclass(frozen=True)
class Validation:
    """Mean loss in nats a target; of text the bits a byte of what was read, of a synthetic task the share of
    targets that are the likeliest token (the logits of text never exist as a whole)."""

    loss: float
    bits_per_byte: float | None = None
    accuracy: float | None = None


@torch.no_grad()
def validate(trainer: "Trainer") -> Validation:
    """The loss over the first `eval.tokens` held out: over their targets, whatever the rows of a batch hold.

    Raises Stopped if any rank was asked to, after saving.
    """
    recipe, accelerator = trainer.recipe, trainer.accelerator
    trainer.model.eval()
    synthetic = isinstance(trainer.prepared, SyntheticData)
    total = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # nats, targets, hits
    for batch in validation_batches(
        trainer.prepared.validation,
        recipe.data.sequence_length,
        recipe.train.micro_batch,
        recipe.eval.tokens,
        accelerator.process_index,
        accelerator.num_processes,
    ):
        targets = (batch["labels"] != IGNORE).sum().to(accelerator.device)
        loss, hits = _score(trainer, batch) if synthetic else (trainer._loss(batch, 1.0), targets * 0)
        total += torch.stack([loss.double(), targets.double(), hits.double()])
        trainer.beat("validating")
        trainer.stop_if_asked()
    reshard(trainer.model)
    if accelerator.num_processes > 1:
        dist.all_reduce(total)
    nats, targets, hits = total.tolist()
    if synthetic:
        return Validation(nats / targets, accuracy=hits / targets)
    if trainer.validation_bytes is None:  # the same text each time
        trainer.validation_bytes = bytes_read(
            trainer.prepared, recipe.data.sequence_length, recipe.eval.tokens
        )
    return Validation(nats / targets, bits_per_byte=nats / math.log(2) / trainer.validation_bytes)


def bytes_read(prepared: PreparedData, sequence_length: int, max_tokens: int) -> int:
    """Bytes of the held-out text that a validation of at most `max_tokens` predicts.

    Texts differ in bytes a token, so those of the documents read are counted, and of the last one those that
    its tokens up to the end of the last row spell.
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


def tell_validation(trainer: "Trainer", found: Validation) -> None:
    """Into the position, metrics.jsonl and the eyes of whoever looks."""
    position = trainer.position
    position.validated, position.validation_loss = position.step, found.loss
    line = {
        "step": position.step,
        "tokens": position.step * trainer.recipe.train.tokens_per_step,
        "validation_loss": found.loss,
    }
    if found.accuracy is None:
        line["bits_per_byte"] = found.bits_per_byte
    else:
        line["accuracy"] = found.accuracy
    trainer.metrics.write(line)
    trainer.line.validation(position.step, found.loss, found.bits_per_byte, found.accuracy)


def _score(trainer: "Trainer", batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed loss, and how many targets are the likeliest token."""
    outputs = trainer.forward(batch, 1.0, return_logits=True)
    labels = batch["labels"].to(outputs.logits.device)
    return outputs.loss, (outputs.logits.argmax(dim=-1) == labels).sum()
