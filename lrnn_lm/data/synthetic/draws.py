"""Random numbers as a function of (seed, stream, index), so that rows of synthetic data never change.

A draw is SplitMix64's finaliser of a counter, in integer arithmetic: not a library's generator, which may
change, and no state to save. Each index of a batch has its own counter, so that a row does not depend on the
rows it is made with.

Legend: b rows made at once, n numbers drawn for each.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from ..order import mix, word

Integers = npt.NDArray[np.int64]


class Draws:
    """Numbers for b rows at once. `stream` separates what shares a seed, such as splits and tasks."""

    def __init__(self, seed: int, stream: str, indices: npt.ArrayLike) -> None:
        key = word(int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little"))
        rows = np.asarray(indices, np.int64).astype(np.uint64).reshape(-1, 1)
        self._base = mix(rows + mix(word(seed) + mix(key)))  # (b, 1)
        self._used = np.uint64(0)

    @property
    def base(self) -> Integers:
        """(b, 1) int64 start of each row's draws, for code that mixes elsewhere (on a GPU)."""
        return self._base.view(np.int64)

    @property
    def rows(self) -> int:
        """b."""
        return len(self._base)

    def integers(self, high: npt.ArrayLike, n: int) -> Integers:
        """(b, n) in [0, high), high at most 2^31; `high` may be an array that broadcasts to (b, n)."""
        limit = np.asarray(high, np.int64).astype(np.uint64)
        return ((self._words(n) >> np.uint64(33)) * limit >> np.uint64(31)).astype(np.int64)

    def uniform(self, n: int) -> npt.NDArray[np.float64]:
        """(b, n) in [0, 1)."""
        return (self._words(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def permutations(self, n: int) -> Integers:
        """(b, n), a permutation of 0 .. n-1 in each row."""
        return np.argsort(self._words(n), axis=1, kind="stable")

    def _words(self, n: int) -> npt.NDArray[np.uint64]:
        counter = np.arange(n, dtype=np.uint64) + self._used
        self._used += np.uint64(n)
        return mix(self._base + mix(counter))
