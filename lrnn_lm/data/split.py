"""Which documents are held out: a pure function of a document's text, so no text stands on both sides."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .specs import DataError

_RANGE = 2**64
SURVEY = 8  # times the sample's size: how much text is read to choose the tokenizer's training sample from


def text_hash(text: str) -> int:
    """64 bits of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class OneSidedError(DataError):
    """A split that left train or validation empty; `threshold` is one that does not, if there is one."""

    def __init__(self, message: str, threshold: int | None) -> None:
        super().__init__(message)
        self.threshold = threshold


@dataclass
class HeldOut:
    """Holds out the texts whose hash is below `threshold`, or that are `listed` (a validation source's
    hashes).
    """

    threshold: int
    listed: frozenset[int] = frozenset()
    lowest: int = field(default=_RANGE, init=False)  # hashes seen
    highest: int = field(default=-1, init=False)

    @classmethod
    def fraction(cls, share: float) -> "HeldOut":
        """Hold out about this share of the documents."""
        return cls(int(share * _RANGE))

    def holds(self, text: str) -> bool:
        """Whether this document is held out; remembers the range of the hashes it was asked about."""
        number = text_hash(text)
        self.lowest, self.highest = min(self.lowest, number), max(self.highest, number)
        return number < self.threshold or number in self.listed

    def one_sided(self, empty: str) -> OneSidedError:
        """The error for an empty side, once all documents were seen: a small corpus gives up its outermost
        hash.
        """
        threshold = None
        if not self.listed and self.lowest < self.highest:
            threshold = self.lowest + 1 if empty == "validation" else self.highest
        return OneSidedError(
            f"no document is left for {empty}: the source needs at least two different documents; "
            "split it into more, or name other text in data.validation_source",
            threshold,
        )


def training_sample(documents: Iterable[str], held_out: HeldOut, size: int) -> Iterator[str]:
    """About `size` bytes of train documents for the tokenizer, chosen by hash from the first SURVEY * size
    bytes.

    Holds no more than the sample in memory. Raises OneSidedError if there is no train document.
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
