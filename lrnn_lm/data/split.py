"""Which documents are held out: a function of the text alone, so no text is on both sides.

And which are left out of training, as they are shorter than `data.min_document`.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import sources
from .specs import DataError, DataSpec, SourceSpec

HASHES = 2**64  # number of values of `text_hash`
SURVEY = 8  # the tokenizer's training sample is chosen from this many times its size


def text_hash(text: str | bytes) -> int:
    """A 64-bit hash of a text, or of a document's token ids as bytes; the same on every machine."""
    data = text.encode() if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


@dataclass(frozen=True)
class HeldOut:
    """Holds out documents whose hash is below `threshold` or `listed` (the hashes of validation sources)."""

    threshold: int
    listed: frozenset[int] = frozenset()

    def holds(self, number: int) -> bool:
        """Whether the document with this hash is held out."""
        return number < self.threshold or number in self.listed

    def with_both_sides(self, numbers: Iterable[int], source: SourceSpec) -> "HeldOut":
        """The rule for a source's documents of these hashes: this one, unless it leaves a side without any.

        Then the outermost hash is moved over. Reads only until both sides have a document. Raises DataError
        if there are no two different documents.
        """
        hashes: set[int] = set()
        sides: set[bool] = set()
        for number in numbers:
            sides.add(self.holds(number))
            if len(sides) == 2:
                return self
            hashes.add(number)
        if len(hashes) < 2:
            raise one_sided("train" if True in sides else "validation", source)
        return replace(self, threshold=max(hashes) if True in sides else min(hashes) + 1)


def one_sided(empty: str, source: SourceSpec) -> DataError:
    """The error for a split that leaves `empty` without a document."""
    return DataError(
        f"{sources.describe(source)}: no document is left for {empty}: the source needs at least two "
        "different documents; split it into more, or name other text in data.validation_source"
    )


def training_sample(source: SourceSpec, held_out: HeldOut, size: int) -> Iterator[str]:
    """About `size` characters of train documents for the tokenizer, those of lowest hash in SURVEY * size.

    Holds only the sample in memory. Raises DataError if there is no train document.
    """
    heap: list[tuple[int, str]] = []  # the largest hash on top
    kept = read = 0
    for text in sources.documents(source):
        if held_out.holds(text_hash(text)):
            continue
        text = text[:size]
        read += len(text)
        kept += len(text)
        heapq.heappush(heap, (-text_hash(text), text))
        while kept > size and len(heap) > 1:
            kept -= len(heapq.heappop(heap)[1])
        if read >= SURVEY * size:
            break
    if not heap:
        raise one_sided("train", source)
    return (text for _, text in sorted(heap, reverse=True))


class Short:
    """Tells and counts the documents of a source whose text has fewer than `min_document` tokens."""

    def __init__(self, spec: DataSpec) -> None:
        self._source, self._least = spec.source, spec.min_document or 0
        self.documents = self._tokens = self._longest = 0

    def left_out(self, lengths: npt.NDArray[np.int64], asked: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which documents (n,) are too short, by their tokens; those of `asked` are counted."""
        short = (lengths < self._least) & asked
        self.documents += int(short.sum())
        self._tokens += int(lengths[short].sum())
        self._longest = max(self._longest, int(lengths.max(where=asked, initial=0)))
        return short

    def leaves_out(self, length: int) -> bool:
        """The same of one document."""
        return bool(self.left_out(np.array([length]), np.array([True]))[0])

    def facts(self) -> dict[str, Any]:
        """For the split's entry in the manifest; nothing where no length is asked for."""
        if not self._least:
            return {}
        return {"short": {"below": self._least, "num_documents": self.documents, "num_tokens": self._tokens}}

    def error(self) -> DataError:
        """The error for a source of which nothing is left."""
        return DataError(
            f"{sources.describe(self._source)}: data.min_document {self._least:,} leaves no training "
            f"document, as the longest has {self._longest:,} tokens; set a smaller one"
        )
