"""Which documents are held out: a function of the text alone, so no text is on both sides."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .specs import DataError

HASHES = 2**64  # number of values of `text_hash`
SURVEY = 8  # the tokenizer's training sample is chosen from this many times its size


def text_hash(text: str) -> int:
    """A 64-bit hash, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class OneSidedError(DataError):
    """A split left train or validation empty; `threshold` is one that does not, or None."""

    def __init__(self, message: str, threshold: int | None) -> None:
        super().__init__(message)
        self.threshold = threshold


@dataclass
class HeldOut:
    """Holds out texts whose hash is below `threshold` or `listed` (the hashes of a validation source)."""

    threshold: int
    listed: frozenset[int] = frozenset()
    lowest: int = field(default=HASHES, init=False)  # hashes seen
    highest: int = field(default=-1, init=False)

    def holds(self, text: str) -> bool:
        """Whether this document is held out; records the range of all hashes for `one_sided`."""
        number = text_hash(text)
        self.lowest, self.highest = min(self.lowest, number), max(self.highest, number)
        return number < self.threshold or number in self.listed

    def one_sided(self, empty: str) -> OneSidedError:
        """The error for an empty side, after all documents: its threshold moves the outermost hash over."""
        threshold = None
        if not self.listed and self.lowest < self.highest:
            threshold = self.lowest + 1 if empty == "validation" else self.highest
        return OneSidedError(
            f"no document is left for {empty}: the source needs at least two different documents; "
            "split it into more, or name other text in data.validation_source",
            threshold,
        )


def training_sample(documents: Iterable[str], held_out: HeldOut, size: int) -> Iterator[str]:
    """About `size` characters of train documents for the tokenizer, those of lowest hash in SURVEY * size.

    Holds only the sample in memory. Raises OneSidedError if there is no train document.
    """
    heap: list[tuple[int, str]] = []  # the largest hash on top
    kept = read = 0
    for text in documents:
        if held_out.holds(text):
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
        raise held_out.one_sided("train")
    return (text for _, text in sorted(heap, reverse=True))
