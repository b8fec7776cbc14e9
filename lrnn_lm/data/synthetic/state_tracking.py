"""State tracking and formal languages as automata: inputs are symbols, labels tell the state after each.

    s3, s4, s5, a5     permutation groups: the running product of the elements read
    z60                addition modulo 60, as large as a5 but commutative
    parity             whether the number of ones so far is odd
    modular_counting   the number of ones so far, modulo `modulus`
    aa_star            words over one letter, set apart by a separator: is the word so far in (aa)*?
    dyck1_depth        how many brackets are open, in a walk between 0 and `max_depth`
    even_pairs         whether a word over two letters has as many changes ab as ba: ends as it begins
    cycle_navigation   the position on a ring of `modulus` places; symbols stay, step on, step back
    modular_arithmetic the value modulo `modulus` of digits with + - * between, products first, no brackets

The last three are of Deletang et al. (arXiv 2207.02098), whose answer at the end is told at each symbol here.
Symbols and labels are numbered from 0 and share ids. A product's newest factor stands on the left, so a state
is the permutation that applies the elements in the order in which they were read.

Legend: b rows, T time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np

from ..pack import IGNORED
from .draws import Draws, Integers

Rows = tuple[Integers, Integers]  # inputs and labels, each (b, T)

GROUPS = {"s3": 6, "s4": 24, "s5": 120, "a5": 60, "z60": 60}  # and their sizes
WORD_END = 1 / 16  # chance of a separator in aa_star: words of 15 letters on average


@dataclass(frozen=True)
class Automaton:
    """States, what each symbol makes of them, and where a row starts."""

    table: Integers  # (symbols, states): the state after; -1 where the symbol cannot come
    labels: Integers  # (states,): what is asked for after a symbol; IGNORED for nothing
    draw: Callable[[Draws, int], Integers] | None = None  # (b, T) symbols; None: any that can come, equally
    start: int = 0

    @property
    def ids(self) -> int:
        """Number of ids that symbols and labels share."""
        return max(len(self.table), int(self.labels.max()) + 1)

    def rows(self, draws: Draws, length: int) -> Rows:
        """Symbols drawn at random, and the labels of the states that they lead to."""
        can = self.table >= 0  # (symbols, states)
        choices, order = can.sum(axis=0), np.argsort(~can, axis=0, kind="stable")
        free = bool(can.all())
        inputs = np.empty((draws.rows, length), np.int64)
        if free:
            inputs = self.draw(draws, length) if self.draw else draws.integers(len(can), length)
        states = np.empty_like(inputs)
        state = np.full(draws.rows, self.start)
        for t in range(length):
            if not free:
                drawn = draws.integers(choices[state][:, None], 1)[:, 0]
                inputs[:, t] = order[drawn, state]
            state = self.table[inputs[:, t], state]
            states[:, t] = state
        return inputs, self.labels[states]


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


def group(name: str) -> Automaton:
    """Elements drawn uniformly, and their running products."""
    table = composition_table(name)
    return Automaton(table, np.arange(len(table)))


def ring(modulus: int, steps: tuple[int, ...]) -> Automaton:
    """Places 0 .. modulus - 1; symbol i moves by steps[i]."""
    places = np.arange(modulus)
    return Automaton((places + np.array(steps)[:, None]) % modulus, places)


def even_words() -> Automaton:
    """Letters 0 and separators 1; the label is 1 after an even number of letters since the last separator."""
    return Automaton(
        np.array([[1, 0], [0, 0]]),
        np.array([1, 0]),
        lambda draws, length: (draws.uniform(length) < WORD_END).astype(np.int64),
    )


def depths(max_depth: int) -> Automaton:
    """Brackets, 0 opening and 1 closing, equally likely except where the depth's bounds allow only one."""
    depth = np.arange(max_depth + 1)
    return Automaton(np.stack([np.where(depth == max_depth, -1, depth + 1), depth - 1]), depth)


def even_pairs() -> Automaton:
    """Letters 0 and 1; states: 0 before any, then 1 + 2 * first + last; label 1 where those agree."""
    table = [[1 + 3 * a, 1 + a, 1 + a, 3 + a, 3 + a] for a in (0, 1)]
    return Automaton(np.array(table), np.array([1, 1, 0, 0, 1]))


def arithmetic(modulus: int) -> Automaton:
    """Digits 0 .. p - 1, then + - *, in turn; the label after a digit is the value so far.

    States are pairs: the sum s of the terms that are complete, and the factor f of the open one. Before a
    digit d the value will be s + f d, and after it the value is s + f.
    """
    p = modulus
    s, f = np.divmod(np.arange(p * p), p)
    never = np.full(p * p, -1)
    digits = [np.concatenate([p * p + p * s + f * d % p, never]) for d in range(p)]
    value = p * ((s + f) % p)
    signs = [np.concatenate([never, after]) for after in (value + 1, value + p - 1, p * s + f)]
    labels = np.concatenate([np.full(p * p, IGNORED), (s + f) % p])
    return Automaton(np.stack([*digits, *signs]), labels, start=1)
