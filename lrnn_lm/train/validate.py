"""The loss on held-out rows, shared out over the ranks."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

from ..data import SyntheticData, validation_batches
from ..model.loss import IGNORE
from .parallel import reshard

if TYPE_CHECKING:
    from .loop import Trainer


@torch.no_grad()
def validate(trainer: "Trainer") -> tuple[float, float | None]:
    """Mean loss in nats a target over the first `eval.tokens` held out, and of a synthetic task the share of
    targets that are the likeliest token (None for text, whose logits never exist as a whole).

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
    return nats / targets, hits / targets if synthetic else None


def tell_validation(trainer: "Trainer", loss: float, accuracy: float | None) -> None:
    """Into the position, metrics.jsonl and the eyes of whoever looks."""
    position = trainer.position
    position.validated, position.validation_loss = position.step, loss
    line = {
        "step": position.step,
        "tokens": position.step * trainer.recipe.train.tokens_per_step,
        "validation_loss": loss,
    }
    if accuracy is None:
        held_out = trainer.prepared.validation
        tokens = held_out.num_tokens - held_out.num_documents
        line["bits_per_byte"] = loss * tokens / held_out.num_bytes / math.log(2)
    else:
        line["accuracy"] = accuracy
    trainer.metrics.write(line)
    trainer.line.validation(position.step, loss, line.get("bits_per_byte"), accuracy)


def _score(trainer: "Trainer", batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed loss, and how many targets are the likeliest token."""
    outputs = trainer.forward(batch, 1.0, return_logits=True)
    labels = batch["labels"].to(outputs.logits.device)
    return outputs.loss, (outputs.logits.argmax(dim=-1) == labels).sum()
