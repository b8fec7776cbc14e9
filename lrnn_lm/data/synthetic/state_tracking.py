"""State tracking and formal languages: inputs are symbols, labels the state after each of them.

    s3, s4, s5, a5   permutation groups: the running product of the elements read
    z60              addition modulo 60, as large as a5 but commutative
    parity           whether the number of ones so far is odd
    modular_counting the number of ones so far, modulo `modulus`
    aa_star          words over one letter, set apart by a separator: is the word so far in (aa)*?
    dyck1_depth      how many brackets are open, in a walk between 0 and `max_depth`

Symbols and states are numbered from 0 and share ids. The product's newest factor stands on the left, so a
state is the permutation that applies the elements in the order in which they were read.

Legend: b rows, T time.
"""

from functools import cache
from itertools import permutations

import numpy as np

from .draws import Draws, Integers

Rows = tuple[Integers, Integers]  # inputs and states, each (b, T)

GROUPS = {"s3": 6, "s4": 24, "s5": 120, "a5": 60, "z60": 60}  # and their sizes
WORD_END = 1 / 16  # chance of a separator in aa_star: words of 15 letters on average


@cache
def composition_table(group: str) -> Integers:
    """(n, n): entry [new, state] is the number of the element `new` after `state`. The identity is 0.

    Permutations are numbered in lexicographic order; of a5, the even ones.
    """
    if group == "z60":
        n = np.arange(60)
        return (n[:, None] + n[None, :]) % 60
    elements = list(permutations(range(int(group[1:]))))
    if group[0] == "a":
        elements = [element for element in elements if _is_even(element)]
    number = {element: i for i, element in enumerate(elements)}
    return np.array([[number[tuple(new[i] for i in old)] for old in elements] for new in elements], np.int64)


def _is_even(permutation: tuple[int, ...]) -> bool:
    pairs = [(i, j) for j in range(len(permutation)) for i in range(j)]
    return sum(permutation[i] > permutation[j] for i, j in pairs) % 2 == 0


def products(draws: Draws, length: int, group: str) -> Rows:
    """Elements drawn uniformly, and their running products."""
    table = composition_table(group)
    inputs = draws.integers(len(table), length)
    states = np.empty_like(inputs)
    state = np.zeros(draws.rows, np.int64)
    for t in range(length):
        state = table[inputs[:, t], state]
        states[:, t] = state
    return inputs, states


def counts(draws: Draws, length: int, modulus: int) -> Rows:
    """Fair bits, and the number of ones so far modulo `modulus`."""
    inputs = draws.integers(2, length)
    return inputs, inputs.cumsum(axis=1) % modulus


def even_words(draws: Draws, length: int) -> Rows:
    """Letters 0 and separators 1; the state is 1 after an even number of letters since the last separator."""
    inputs = (draws.uniform(length) < WORD_END).astype(np.int64)
    steps = np.arange(1, length + 1)
    last = np.maximum.accumulate(np.where(inputs == 1, steps, 0), axis=1)  # (b, T), where the word began
    return inputs, 1 - (steps - last) % 2


def depths(draws: Draws, length: int, max_depth: int) -> Rows:
    """Brackets, 0 opening and 1 closing, equally likely except where the depth's bounds allow only one."""
    fair = draws.integers(2, length)
    inputs, states = np.empty_like(fair), np.empty_like(fair)
    depth = np.zeros(draws.rows, np.int64)
    for t in range(length):
        closes = np.where(depth == 0, 0, np.where(depth == max_depth, 1, fair[:, t]))
        depth = depth + 1 - 2 * closes
        inputs[:, t], states[:, t] = closes, depth
    return inputs, states
