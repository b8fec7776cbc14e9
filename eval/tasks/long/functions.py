"""Needle and passkey tests made locally, after RULER (arXiv 2404.06654), for the YAML files beside this one.

    passkey   one number among sentences without meaning, asked at the end
    needle    the number of one city among those of several

Lengths are in words. A row is a function of (seed, length, index). The depth of the answer in the text grows
evenly from row to row.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lrnn_lm.data.synthetic.draws import Draws

if TYPE_CHECKING:
    import datasets

EXAMPLES = 50  # rows a length
DISTRACTORS = 4  # needles that are not asked
_FILLER = (
    "The tram stops here every ten minutes.", "A light rain fell over the harbour.",
    "Someone had left a ladder against the wall.", "The bakery opens before the sun is up.",
    "Two dogs crossed the square without a sound.", "It was neither warm nor cold that day.",
    "The old clock runs a little slow.", "Leaves gathered at the foot of the stairs.",
)  # fmt: skip
_CITIES = (
    "Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Dublin", "Cairo", "Perth", "Lima", "Vienna", "Osaka",
)  # fmt: skip


def passkey_dataset(
    lengths: Sequence[int], examples: int = EXAMPLES, seed: int = 0, **_metadata: Any
) -> "dict[str, datasets.Dataset]":
    """Rows of context, answer and length for `long_passkey`, the lengths in turn."""
    return _dataset("passkey", _passkey, lengths, examples, seed)


def needle_dataset(
    lengths: Sequence[int], examples: int = EXAMPLES, seed: int = 0, **_metadata: Any
) -> "dict[str, datasets.Dataset]":
    """Rows of context, answer and length for `long_needle`, the lengths in turn."""
    return _dataset("needle", _needle, lengths, examples, seed)


def _dataset(
    stream: str,
    make: Callable[[Draws, int, float], tuple[str, int]],
    lengths: Sequence[int],
    examples: int,
    seed: int,
) -> "dict[str, datasets.Dataset]":
    from datasets import Dataset

    rows = []
    for i in range(examples):
        for length in lengths:
            if length < 100:
                raise ValueError(f"lengths are in words, at least 100, not {length}")
            draws = Draws(seed, f"{stream}/{length}", [i])
            context, answer = make(draws, length, (i + 0.5) / examples)
            rows.append({"context": context, "answer": f" {answer}", "length": length})
    return {"test": Dataset.from_list(rows)}


def _passkey(draws: Draws, length: int, depth: float) -> tuple[str, int]:
    key = 10_000 + int(draws.integers(90_000, 1)[0, 0])
    said = f"The pass key is {key}. Keep it in mind: {key} is the pass key."
    question = "What is the pass key? The pass key is"
    start = "A pass key is hidden in the text below. Find it and keep it in mind."
    return _text(draws, length, [(depth, said)], start, question), key


def _needle(draws: Draws, length: int, depth: float) -> tuple[str, int]:
    cities = [_CITIES[c] for c in draws.permutations(len(_CITIES))[0, : DISTRACTORS + 1]]
    numbers = 10_000 + draws.integers(90_000, len(cities))[0]
    depths = [depth, *draws.uniform(DISTRACTORS)[0].tolist()]
    said = [
        f"The special number of {city} is {number}." for city, number in zip(cities, numbers, strict=True)
    ]
    question = f"What is the special number of {cities[0]}? The special number of {cities[0]} is"
    start = "Special numbers of some cities are hidden in the text below. Keep them in mind."
    return _text(draws, length, list(zip(depths, said, strict=True)), start, question), int(numbers[0])


def _text(draws: Draws, length: int, needles: list[tuple[float, str]], start: str, question: str) -> str:
    """About `length` words: start, filler with each needle at its depth in [0, 1], question."""
    room = length - sum(len(text.split()) for text in (start, question, *(text for _, text in needles)))
    chosen = draws.integers(len(_FILLER), max(1, room // 5))[0]
    filler: list[str] = []
    words = 0
    for i in chosen:
        words += len(_FILLER[i].split())
        if words > room:
            break
        filler.append(_FILLER[i])
    places = sorted(((round(depth * len(filler)), text) for depth, text in needles), reverse=True)
    for place, text in places:
        filler.insert(place, text)
    return " ".join([start, *filler, question])


def score_answer(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Whether the answer is the most likely continuation, over all lengths and for its own length."""
    _, greedy = results[0] if isinstance(results[0], tuple | list) else results
    return {"acc": float(greedy), f"acc_{doc['length']}": float(greedy)}
