"""The loss on held-out rows, each rank taking a part of them."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
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
from .average import Average
from .parallel import reshard
from .rows import Batch, Rows
from .segments import split
from .sources import MixedData, Prepared, parts_of


@dataclass(frozen=True)
class Validation:
    """What a validation found, the same on every rank."""

    loss: float  # mean over targets, nats
    bits_per_byte: float | None = None  # of text; None where its bytes are not known
    # Of synthetic tasks: fraction of targets with the largest logit. Text's logits never exist as a whole.
    accuracy: float | None = None
    sources: dict[str, "Validation"] = field(default_factory=dict)  # of a mixture, by name

    @property
    def measured(self) -> dict[str, float]:
        """What was measured, by the names of metrics.jsonl; of a source NAME it ends in `/NAME`."""
        own = {"validation_loss": self.loss, "bits_per_byte": self.bits_per_byte, "accuracy": self.accuracy}
        return {key: value for key, value in own.items() if value is not None} | {
            f"{key}/{name}": value
            for name, found in self.sources.items()
            for key, value in found.measured.items()
        }

    def __str__(self) -> str:
        text = f"loss {self.loss:.3f}"
        text += f"  {self.bits_per_byte:.3f} bits/byte" if self.bits_per_byte is not None else ""
        text += f"  accuracy {self.accuracy:.3f}" if self.accuracy is not None else ""
        return text + "".join(f"; {name} {found}" for name, found in self.sources.items())


class Validator:
    """The mean loss over the targets of the first `eval.tokens` held-out tokens.

    Each source of a mixture gives an equal part of them; the whole is the mean over the targets of all.

    Args:
        rows: the training's reader of rows. It is told if held-out text cannot be read.
        forward: (batch, num_items, return_logits[, carried states]) -> the outputs of `model`.
        average: is validated too, if there is one.
    """

    def __init__(
        self,
        prepared: Prepared,
        recipe: Recipe,
        accelerator: Accelerator,
        model: nn.Module,
        rows: Rows,
        forward: Callable[..., Any],
        average: Average | None = None,
    ):
        self._prepared, self._recipe, self._accelerator = prepared, recipe, accelerator
        self._model, self._rows, self._forward, self._average = model, rows, forward, average
        self._sequence = rows.sequence

    def measure(self, between: Callable[[], None]) -> tuple[Validation, dict[str, float]]:
        """What it found, and as fields of metrics.jsonl. Every rank calls it.

        between() is called after each batch and may raise.
        """
        found = self._measure(between)
        fields = found.measured
        if self._average is not None:
            with self._average.in_place():
                averaged = self._measure(between).measured
            fields |= {f"average_{key}": value for key, value in averaged.items()}
        return found, fields

    @cached_property
    def _bytes(self) -> dict[str, int | None]:
        """Of the text that is read of each source; None for a synthetic task."""
        parts = parts_of(self._prepared)
        length, tokens = self._recipe.data.sequence_length, self._recipe.eval.tokens // len(parts)
        return {
            name: None if isinstance(part, SyntheticData) else bytes_read(part, length, tokens)
            for name, part in parts.items()
        }

    def _outputs(self, batch: dict[str, Tensor], return_logits: bool) -> Any:
        """By segments, or with other ranks, where training is."""
        if not self._sequence.by_pieces:
            return self._forward(batch, 1.0, return_logits)
        return self._sequence.evaluate(
            lambda part, carried: self._forward(part, 1.0, return_logits, carried),
            split(batch, self._sequence.piece),
            return_logits,
        )

    def _batches(self, part: PreparedData | SyntheticData, tokens: int) -> Iterator[Batch]:
        """This rank's parts of the batches of a source; in place of what cannot be read an empty one, after
        which `between` ends the validation."""
        recipe, sequence = self._recipe, self._sequence
        length, rows = recipe.data.sequence_length, recipe.train.micro_batch
        try:
            _ = self._bytes  # reads the documents
            for batch in validation_batches(
                part.validation, length, rows, tokens, sequence.group, sequence.groups
            ):
                yield sequence.own(batch)
        except (OSError, ValueError) as error:
            self._rows.lost("the held-out text", error)
            yield self._rows.empty()

    @torch.no_grad()
    def _measure(self, between: Callable[[], None]) -> Validation:
        parts, accelerator, recipe = parts_of(self._prepared), self._accelerator, self._recipe
        synthetic = isinstance(self._prepared, SyntheticData)
        self._model.eval()
        # nats, targets, hits of each source
        total = torch.zeros(len(parts), 3, dtype=torch.float64, device=accelerator.device)
        for own, part in zip(total, parts.values(), strict=True):
            for batch in self._batches(part, recipe.eval.tokens // len(parts)):
                labels = batch["labels"].to(accelerator.device)
                targets, outputs = (labels != IGNORE).sum(), self._outputs(batch, synthetic)
                hits = (outputs.logits.argmax(dim=-1) == labels).sum() if synthetic else targets * 0
                own += torch.stack([outputs.loss.double(), targets.double(), hits.double()])
                between()
        reshard(self._model)
        if accelerator.num_processes > 1:
            dist.all_reduce(total)
        nats, targets, hits = total.sum(0).tolist()
        if synthetic:
            return Validation(nats / targets, accuracy=hits / targets)
        mixed = isinstance(self._prepared, MixedData)
        found = {
            name: Validation(own[0] / own[1], _bits_per_byte(own[0], [self._bytes[name]]))
            for name, own in zip(parts, total.tolist(), strict=True)
        }
        bits_per_byte = _bits_per_byte(nats, list(self._bytes.values()))
        return Validation(nats / targets, bits_per_byte, sources=found if mixed else {})


def _bits_per_byte(nats: float, sizes: list[int | None]) -> float | None:
    """None if the bytes of some source are not known."""
    known = [size for size in sizes if size is not None]
    return nats / math.log(2) / sum(known) if len(known) == len(sizes) else None


def bytes_read(prepared: PreparedData, sequence_length: int, max_tokens: int) -> int | None:
    """Bytes of the held-out text that a validation of at most `max_tokens` predicts.

    They are counted, as bytes per token differ between texts: all bytes of the documents that fit, and of the
    last document those of its tokens up to the end of the last row. None for token files whose text is not
    known exactly.
    """
    shards = prepared.validation
    if shards.num_bytes is None:
        return None
    stop = min(max(1, max_tokens // sequence_length) * sequence_length + 1, shards.num_tokens)
    if stop == shards.num_tokens:
        return shards.num_bytes
    starts = shards.document_starts(0, stop)
    with prepared.heldout_path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, len(starts))]
    encoder = Encoder(prepared.tokenizer_dir, read_facts(prepared.tokenizer_dir))
    cut = encoder.bytes_of(texts[-1], stop - int(starts[-1]))
    return sum(len(text.encode()) for text in texts[:-1]) + cut
