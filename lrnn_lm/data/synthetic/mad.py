"""Recall and copying: the six tasks of MAD (Poli et al., arXiv 2403.17844) and MQAR, as generators.

    recall            key-value pairs, the map drawn anew in each row: recall the value of a key seen before
    noisy recall      the same with pairs of noise tokens between
    fuzzy recall      keys and values are runs of one to `key_size`, `value_size` tokens
    selective copying tokens scattered among blanks, to be written out in order when asked
    memorisation      a map from keys to values that never changes: it has to be learnt, not read
    compression       read a sequence into one vector, from which another network writes it out again
    mqar              many queries: all pairs first, then each key once (Zoology, arXiv 2312.04927)

As in the published benchmark, the recall tasks train on every next token and are scored on the recalled
values only; labels are aligned with the positions that predict them. The lower half of the vocabulary are
keys, the upper half values; noise tokens and then special tokens come last.

Legend: b rows, T time, P pairs of a row.
"""

import numpy as np
import numpy.typing as npt

from ..pack import IGNORED
from .draws import Draws, Integers

Rows = tuple[Integers, Integers]  # inputs and labels, each (b, T)
Mask = npt.NDArray[np.bool_]


def recall(
    draws: Draws, length: int, train: bool, vocab_size: int, noise_vocab_size: int = 0, noise: float = 0.0
) -> Rows:
    """T / 2 pairs; a share `noise` of them, never the first or last, are two noise tokens each."""
    b, P = draws.rows, length // 2
    keys_end = (vocab_size - noise_vocab_size) // 2
    plain = vocab_size - noise_vocab_size
    mapping = draws.integers(plain - keys_end, keys_end) + keys_end  # (b, keys)
    keys = draws.integers(keys_end, P)
    is_noise = draws.uniform(P) < noise
    is_noise[:, [0, -1]] = False
    keys[:, -1] = _earlier_key(draws, keys[:, :-1], ~is_noise[:, :-1])
    values = np.take_along_axis(mapping, keys, axis=1)  # (b, P)
    seen = _seen_before(np.where(is_noise, -1 - np.arange(P), keys))
    tokens = np.stack([keys, values], axis=2)  # (b, P, 2)
    if noise_vocab_size:
        drawn = draws.integers(noise_vocab_size, 2 * P).reshape(b, P, 2) + plain
        tokens = np.where(is_noise[:, :, None], drawn, tokens)
    tokens = tokens.reshape(b, 2 * P)
    labels = np.full_like(tokens, IGNORED)
    if train:
        labels[:, :-1] = tokens[:, 1:]
    else:
        labels[:, 0::2] = np.where(seen & ~is_noise, values, IGNORED)
    return tokens, labels


def _earlier_key(draws: Draws, keys: Integers, usable: Mask) -> Integers:
    """(b,) one of each row's distinct usable keys, with equal probability."""
    b, size = len(keys), int(keys.max()) + 1
    there = np.zeros((b, size), np.bool_)
    rows, columns = np.nonzero(usable)
    there[rows, keys[rows, columns]] = True
    order = draws.permutations(size)
    first = np.take_along_axis(there, order, axis=1).argmax(axis=1)
    return order[np.arange(b), first]


def _seen_before(items: Integers) -> Mask:
    """(b, P) bool, whether an equal item is earlier in its row."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    repeated = np.zeros(items.shape, np.bool_)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    seen = np.empty_like(repeated)
    np.put_along_axis(seen, order, repeated, axis=1)
    return seen


def fuzzy_recall(
    draws: Draws, length: int, train: bool, vocab_size: int, key_size: int, value_size: int
) -> Rows:
    """Pairs of runs, the last of them the probe, padded on the left; held-out rows ask with the longest keys.

    A run has no token twice. Of the vocabulary the last token is padding.
    """
    numbers = [_Numbers(row) for row in draws.uniform(2 * length + 64)]
    made = [_fuzzy_row(row, length, train, vocab_size, key_size, value_size) for row in numbers]
    return np.stack([row[0] for row in made]), np.stack([row[1] for row in made])


class _Numbers:
    """One row's draws, one at a time."""

    def __init__(self, uniform: npt.NDArray[np.float64]) -> None:
        self._uniform, self._next = uniform.tolist(), 0

    def below(self, high: int) -> int:
        self._next += 1
        return int(self._uniform[self._next - 1] * high)

    def run(self, first: int, count: int, size: int) -> tuple[int, ...]:
        """`size` different tokens of `count` from `first` on."""
        pool = list(range(first, first + count))
        return tuple(pool.pop(self.below(len(pool))) for _ in range(size))


def _fuzzy_row(
    numbers: _Numbers, length: int, train: bool, vocab_size: int, key_size: int, value_size: int
) -> Rows:
    plain = vocab_size - 1
    half = plain // 2

    def pair() -> tuple[tuple[int, ...], tuple[int, ...]]:
        size = 1 + numbers.below(key_size) if train else key_size
        return numbers.run(0, half, size), numbers.run(half, plain - half, 1 + numbers.below(value_size))

    probe = pair()
    probe_length = len(probe[0]) + len(probe[1])
    room = length + 1 - probe_length  # a row has one token more than it has positions
    place = numbers.below(max(1, room - 2 * (key_size + value_size) + 1))
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    tokens: list[int] = []
    asked: list[bool] = []  # whether each token is a recalled value
    while len(tokens) + key_size + value_size <= room:
        key, value = probe if len(tokens) >= place and probe[0] not in known else pair()
        value = probe[1] if key == probe[0] else value
        repeated = key in known
        value = known.setdefault(key, value)
        tokens += [*key, *value]
        asked += [False] * len(key) + [repeated] * len(value)
    tokens += [*probe[0], *probe[1]]
    asked += [False] * len(probe[0]) + [True] * len(probe[1])
    padding = length + 1 - len(tokens)
    row = np.array([plain] * padding + tokens, np.int64)
    mask = np.array([False] * padding + asked)
    return row[:-1], row[1:] if train else np.where(mask[1:], row[1:], IGNORED)


def selective_copying(draws: Draws, length: int, train: bool, vocab_size: int, copies: int) -> Rows:
    """`copies` tokens among blanks, the token that asks, then blanks whose labels are the tokens in order.

    The last token of the vocabulary asks; the one before it is the blank.
    """
    blank, ask = vocab_size - 2, vocab_size - 1
    b, front = draws.rows, length - copies - 1
    tokens = draws.integers(vocab_size - 2, copies)
    places = np.sort(draws.permutations(front)[:, :copies], axis=1)
    inputs = np.full((b, length), blank, np.int64)
    np.put_along_axis(inputs, places, tokens, axis=1)
    inputs[:, front] = ask
    labels = np.full_like(inputs, IGNORED)
    labels[:, front + 1 :] = tokens
    return inputs, labels


def memorisation(draws: Draws, length: int, train: bool, vocab_size: int, map_seed: int) -> Rows:
    """Keys, each before a token whose label is the key's value; the map depends on `map_seed` only."""
    keys_end = (vocab_size - 1) // 2
    values = Draws(map_seed, "map", [0]).permutations(vocab_size - 1 - keys_end)[0, :keys_end] + keys_end
    keys = draws.integers(keys_end, length // 2)
    inputs = np.full((draws.rows, length), vocab_size - 1, np.int64)
    labels = np.full_like(inputs, IGNORED)
    inputs[:, 0::2] = keys
    labels[:, 1::2] = values[keys]
    return inputs, labels


def compression(draws: Draws, length: int, train: bool, vocab_size: int) -> Rows:
    """T - 1 tokens and the one whose output summarises the row; the labels are the row itself."""
    inputs = np.full((draws.rows, length), vocab_size - 1, np.int64)
    inputs[:, :-1] = draws.integers(vocab_size - 1, length - 1)
    return inputs, inputs.copy()


def mqar(draws: Draws, length: int, train: bool, vocab_size: int, pairs: int, power: float) -> Rows:
    """`pairs` keys and values, then each key once among random tokens; the label of a query is its value.

    The places of the queries are every second one, drawn by the power law x^(power - 1) of the distance x to
    the pairs. Keys are ids from 1 to half of the vocabulary, values the upper half, as published.
    """
    b, P, half = draws.rows, pairs, vocab_size // 2
    keys = draws.permutations(half - 1)[:, :P] + 1  # (b, P)
    values = draws.integers(vocab_size - half, P) + half
    places = (length - 2 * P) // 2
    chance = np.arange(1, places + 1) ** (power - 1.0)
    # The P smallest of exponential times with these rates: draws without replacement, in order.
    times = -np.log1p(-draws.uniform(places)) / chance
    asked = 2 * P + 2 * np.argsort(times, axis=1, kind="stable")[:, :P]
    inputs = draws.integers(vocab_size, length)
    inputs[:, : 2 * P] = np.stack([keys, values], axis=2).reshape(b, 2 * P)
    np.put_along_axis(inputs, asked, keys, axis=1)
    labels = np.full_like(inputs, IGNORED)
    np.put_along_axis(labels, asked, values, axis=1)
    return inputs, labels
