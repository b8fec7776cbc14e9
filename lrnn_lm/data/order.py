"""The order of rows: a permutation for each epoch, computed for single indices.

A Feistel network is a permutation of [0, 4^k) for any round function. Applying it again to an image outside
[0, n) until one falls inside makes it a permutation of [0, n). Memory does not grow with the data. The result
depends only on (seed, epoch, n): it is integer arithmetic, as a library's generator may change.
"""

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_MIN_BITS = 3  # of each half; a smaller domain mixes badly

Indices = npt.NDArray[np.int64]


def rows_of_samples(first: int, count: int, num_rows: int, seed: int) -> Indices:
    """Rows (count,) of samples first .. first+count-1 of a source: see `rows_at`."""
    return rows_at(np.arange(first, first + count, dtype=np.int64), num_rows, seed)


def rows_at(samples: Indices, num_rows: int, seed: int) -> Indices:
    """Rows of a source's samples, by their numbers: sample i is row perm(seed, i // n)[i % n]."""
    epochs, places = np.divmod(samples, num_rows)
    rows = np.empty(len(samples), np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = permuted(places[chosen], num_rows, seed, int(epoch))
    return rows


def permuted(places: Indices, size: int, seed: int, epoch: int) -> Indices:
    """Images of `places` under the permutation of [0, size) for (seed, epoch)."""
    half = max(_MIN_BITS, -(-max(size - 1, 1).bit_length() // 2))
    keys = mix(np.arange(_ROUNDS, dtype=np.uint64) + mix(word(seed) + mix(word(epoch))))
    images = _feistel(places.astype(np.uint64), keys, half)
    while (outside := images >= size).any():
        images[outside] = _feistel(images[outside], keys, half)
    return images.astype(np.int64)


def _feistel(x: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], half: int) -> npt.NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> bits, x & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << bits) | right


def word(number: int) -> npt.NDArray[np.uint64]:
    return np.array([number % 2**64], np.uint64)


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64: each input bit flips about half of the output bits (modulo 2^64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
