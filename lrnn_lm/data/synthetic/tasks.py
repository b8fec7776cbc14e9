"""The synthetic tasks by name: their options, their rows at any index, and checks of options.

A task is a function that makes rows from draws, and an entry of `SYNTHETIC_TASKS`.

Legend: b rows, T time.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ..pack import IGNORED, Row
from ..specs import DataError
from . import mad, state_tracking
from .draws import Draws, Integers
from .state_tracking import Automaton

Option = int | float
KEPT_NUMBERS = 50_000_000  # a split of at most this many tokens is made once and kept in memory
ENDLESS = 2**40  # rows of a split without a number of examples: no run reads one twice


@dataclass(frozen=True)
class TaskKind:
    """A task, with the settings of the published benchmark."""

    make: Callable[..., tuple[Integers, Integers]]  # (draws, length, train, **options) -> (b, T) each
    symbols: Callable[[dict[str, Option]], int]  # number of ids of inputs and labels, from the options
    length: int
    options: dict[str, Option] = field(default_factory=dict)
    # Raises DataError for a length and options that are impossible.
    check: Callable[[int, dict[str, Option]], None] = lambda length, options: None
    examples: int | None = None  # training rows; None: new rows without end
    head: str = "causal"  # of the model
    automaton: Callable[[dict[str, Option]], Automaton] | None = None  # of a state task, from the options


def _state_task(
    automaton: Callable[..., Automaton],
    options: dict[str, Option] | None = None,
    check: Callable[[int, dict[str, Option]], None] = lambda length, options: None,
) -> TaskKind:
    """A task of state_tracking, whose training and held-out rows are of the same kind.

    All take the option `start`: with 1 each row begins with a symbol of its own without a label, like BOS in
    text. There a recurrence, whose state is zero, can write an initial state.
    """

    def made(options: dict[str, Option]) -> Automaton:
        return automaton(**{key: int(value) for key, value in options.items() if key != "start"})

    def rows(
        draws: Draws, length: int, train: bool, start: Option, **rest: Option
    ) -> tuple[Integers, Integers]:
        states = made(rest)
        if not start:
            return states.rows(draws, length)
        inputs, labels = states.rows(draws, length - 1)
        pad = ((0, 0), (1, 0))
        return np.pad(inputs, pad, constant_values=states.ids), np.pad(labels, pad, constant_values=IGNORED)

    def check_all(length: int, options: dict[str, Option]) -> None:
        _need(options["start"] in (0, 1), f"start is 0 or 1, not {options['start']}")
        check(length, options)

    return TaskKind(
        rows,
        lambda options: made(options).ids + int(options["start"]),
        length=32,
        options={"start": 0, **(options or {})},
        check=check_all,
        automaton=made,
    )


def _vocabulary(options: dict[str, Option]) -> int:
    return int(options["vocab_size"])


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise DataError(message)


def _at_least(least: int, name: str) -> Callable[[int, dict[str, Option]], None]:
    """A check that an option is not below `least`."""

    def check(length: int, options: dict[str, Option]) -> None:
        _need(options[name] >= least, f"{name} must be at least {least}, not {options[name]}")

    return check


def _check_recall(length: int, options: dict[str, Option]) -> None:
    _need(length % 2 == 0 and length >= 4, f"length {length}: pairs need an even length of at least 4")
    noise, share = options.get("noise_vocab_size", 0), options.get("noise", 0.0)
    plain = options["vocab_size"] - noise
    _need(plain >= 4, f"vocab_size {options['vocab_size']} is too small: 2 keys, 2 values and {noise} noise")
    _need(0 <= share < 1, f"noise is a share of at least 0 and below 1, not {share}")
    _need(not share or noise >= 1, "noise needs a noise_vocab_size of at least 1")


def _check_fuzzy(length: int, options: dict[str, Option]) -> None:
    key, value, size = options["key_size"], options["value_size"], options["vocab_size"]
    _need(key >= 1 and value >= 1, "key_size and value_size must be at least 1")
    half = (size - 1) // 2
    least = 2 * max(key, value) + 1
    _need(half >= max(key, value), f"vocab_size {size} is too small for runs that long: at least {least}")
    _need(length >= 2 * (key + value), f"length {length} is too short: at least {2 * (key + value)}")


def _check_copying(length: int, options: dict[str, Option]) -> None:
    copies, size = options["copies"], options["vocab_size"]
    _need(size >= 3, f"vocab_size {size} is too small: a token, the blank and the one that asks")
    _need(copies >= 1, f"copies must be at least 1, not {copies}")
    _need(length > 2 * copies, f"length {length} is too short for {copies} copies: at least {2 * copies + 1}")


def _check_memorisation(length: int, options: dict[str, Option]) -> None:
    _need(length % 2 == 0, f"length {length}: pairs need an even length")
    _at_least(3, "vocab_size")(length, options)


def _check_mqar(length: int, options: dict[str, Option]) -> None:
    pairs, size = options["pairs"], options["vocab_size"]
    _need(pairs >= 1, f"pairs must be at least 1, not {pairs}")
    _need(size // 2 > pairs, f"vocab_size {size} is too small for {pairs} keys: at least {2 * pairs + 2}")
    _need(length >= 4 * pairs, f"length {length} is too short for {pairs} pairs: at least {4 * pairs}")
    _need(options["power"] > 0, f"power must be above 0, not {options['power']}")


_MAD = partial(TaskKind, symbols=_vocabulary, examples=12_800)

SYNTHETIC_TASKS: dict[str, TaskKind] = {
    **{name: _state_task(partial(state_tracking.group, name)) for name in state_tracking.GROUPS},
    "parity": _state_task(partial(state_tracking.ring, 2, (0, 1))),
    "modular_counting": _state_task(
        partial(state_tracking.ring, steps=(0, 1)), {"modulus": 5}, _at_least(2, "modulus")
    ),
    "aa_star": _state_task(state_tracking.even_words),
    "dyck1_depth": _state_task(state_tracking.depths, {"max_depth": 8}, _at_least(1, "max_depth")),
    "even_pairs": _state_task(state_tracking.even_pairs),
    "cycle_navigation": _state_task(
        partial(state_tracking.ring, steps=(0, 1, -1)), {"modulus": 5}, _at_least(2, "modulus")
    ),
    "modular_arithmetic": _state_task(state_tracking.arithmetic, {"modulus": 5}, _at_least(2, "modulus")),
    "in_context_recall": _MAD(
        mad.recall,
        length=128,
        options={"vocab_size": 16},
        check=_check_recall,
    ),
    "noisy_in_context_recall": _MAD(
        mad.recall,
        length=128,
        options={"vocab_size": 32, "noise_vocab_size": 16, "noise": 0.2},
        check=_check_recall,
    ),
    "fuzzy_in_context_recall": _MAD(
        mad.fuzzy_recall,
        length=128,
        options={"vocab_size": 16, "key_size": 3, "value_size": 3},
        check=_check_fuzzy,
    ),
    "selective_copying": _MAD(
        mad.selective_copying,
        length=256,
        options={"vocab_size": 16, "copies": 16},
        check=_check_copying,
    ),
    "memorisation": TaskKind(
        mad.memorisation,
        _vocabulary,
        length=32,
        options={"vocab_size": 256, "map_seed": 0},
        check=_check_memorisation,
        examples=256,
    ),
    "compression": _MAD(
        mad.compression,
        length=32,
        options={"vocab_size": 16},
        check=_at_least(3, "vocab_size"),
        head="autoencoder",
    ),
    "mqar": TaskKind(
        mad.mqar,
        _vocabulary,
        length=128,
        options={"vocab_size": 8192, "pairs": 8, "power": 0.01},
        check=_check_mqar,
    ),
}
STATE_TASKS = tuple(name for name, kind in SYNTHETIC_TASKS.items() if kind.automaton)
MAD_TASKS = tuple(name for name in SYNTHETIC_TASKS if name not in (*STATE_TASKS, "mqar"))


@dataclass(frozen=True)
class SyntheticTask:
    """A task with a length and options; those that are not given are the published ones.

    Raises DataError for an unknown task or option, naming the nearest, and for impossible values.
    """

    name: str
    length: int
    options: dict[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in SYNTHETIC_TASKS:
            near, known = _nearest(self.name, SYNTHETIC_TASKS), ", ".join(SYNTHETIC_TASKS)
            raise DataError(f"unknown synthetic task {self.name!r}{near} (known: {known})")
        kind = self.kind
        for key, value in self.options.items():
            if key not in kind.options:
                known = ", ".join(kind.options) or "none"
                raise DataError(
                    f"task {self.name} has no option {key!r}{_nearest(key, kind.options)} ({known})"
                )
            if isinstance(value, bool) or not isinstance(value, type(kind.options[key]) | int):
                raise DataError(f"task {self.name}: option {key} takes a number, not {value!r}")
        object.__setattr__(self, "options", {**kind.options, **self.options})
        _need(self.length >= 2, f"task {self.name}: length must be at least 2, not {self.length}")
        try:
            kind.check(self.length, self.options)
        except DataError as error:
            raise DataError(f"task {self.name}: {error}") from None

    @property
    def kind(self) -> TaskKind:
        return SYNTHETIC_TASKS[self.name]

    @property
    def vocab_size(self) -> int:
        """Number of ids of inputs and labels."""
        return self.kind.symbols(self.options)

    def rows(self, seed: int, split: str, indices: Any) -> tuple[Integers, Integers]:
        """Inputs and labels, each (b, T) int64, of rows by number: a function of these arguments only."""
        draws = Draws(seed, f"{self.name}/{split}", indices)
        return self.kind.make(draws, self.length, split == "train", **self.options)


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


class SyntheticRows(torch.utils.data.Dataset[Row]):
    """A split of a task as rows: `input_ids`, aligned `labels`, `reset` (never set), each (T,).

    A small split is made once and kept in memory.
    """

    def __init__(self, task: SyntheticTask, seed: int, split: str, num_rows: int) -> None:
        self.task, self.seed, self.split, self.num_rows = task, seed, split, num_rows
        self.sequence_length = task.length
        self._kept: tuple[Integers, Integers] | None = None

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> Row:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[Row]:
        """Rows by number; torch's loader asks for a batch at once."""
        inputs, labels = self._read(np.asarray(rows, np.int64))
        pairs = zip(torch.from_numpy(inputs).long(), torch.from_numpy(labels).long(), strict=True)
        reset = torch.zeros(self.sequence_length, dtype=torch.bool)
        return [{"input_ids": x, "labels": y, "reset": reset} for x, y in pairs]

    def _read(self, rows: Integers) -> tuple[Integers, Integers]:
        if self.num_rows * self.sequence_length > KEPT_NUMBERS:
            return self.task.rows(self.seed, self.split, rows)
        if self._kept is None:
            inputs, labels = self.task.rows(self.seed, self.split, np.arange(self.num_rows))
            self._kept = inputs.astype(np.int32), labels.astype(np.int32)
        return self._kept[0][rows], self._kept[1][rows]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a worker makes its own
