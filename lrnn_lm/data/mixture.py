"""Which source, and which of its samples, each global sample is: a pure function of the sample's number.

Sources are interleaved evenly instead of drawn at random. Of the first n samples of a stage, source s gets
n * share(s), rounded, so every step holds nearly the same mixture. Independent draws would deviate by
sqrt(n * share * (1 - share)) samples: 0.3% of a half at n = 100,000.

The samples are split in two again and again, from the last source on. Of the m samples that are left for the
sources 0..k, floor(m * r + 1/2) belong to the sources before k, with r their part of the weights. Whole
numbers and fractions only, so that every machine computes the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MixtureStage:
    """A stretch of training with one set of weights, a number for each source."""

    samples: int | None  # None: to the end of the run
    weights: tuple[float, ...]


class Mixture:
    """The order of the sources over the stages. A source goes on in a stage where it stopped before.

    stages: only the last may have samples=None; after the last one its weights stay.
    """

    def __init__(self, stages: Sequence[MixtureStage]) -> None:
        self._splits = [_splits(stage.weights) for stage in stages]
        self._begins = [0]  # first sample of each stage
        self._used = [[0] * len(stages[0].weights)]  # samples of each source before each stage
        for stage, splits in zip(stages[:-1], self._splits, strict=False):
            assert stage.samples is not None
            counts = _counts(splits, stage.samples)
            self._begins.append(self._begins[-1] + stage.samples)
            self._used.append([a + b for a, b in zip(self._used[-1], counts, strict=True)])

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples each source gives."""
        stage = self._stage(max(samples - 1, 0))
        counts = _counts(self._splits[stage], samples - self._begins[stage])
        return [a + b for a, b in zip(self._used[stage], counts, strict=True)]

    def places(self, first: int, count: int) -> tuple[Indices, Indices]:
        """Source (count,) and number within that source (count,) of samples first .. first+count-1."""
        sources, numbers = np.zeros(count, np.int64), np.empty(count, np.int64)
        start = first
        while start < first + count:
            stage = self._stage(start)
            ends = [*self._begins[stage + 1 :], first + count]
            part = slice(start - first, min(ends[0], first + count) - first)
            inside = np.arange(part.start, part.stop) + (first - self._begins[stage])
            sources[part], places = _places(self._splits[stage], inside)
            numbers[part] = places + np.array(self._used[stage])[sources[part]]
            start = first + part.stop
        return sources, numbers

    def _stage(self, sample: int) -> int:
        return int(np.searchsorted(self._begins, sample, side="right")) - 1


Split = tuple[int, int]  # r as numerator and denominator


def _splits(weights: Sequence[float]) -> list[Split]:
    """For each source k > 0: the part of the sources before k in the weights of 0..k."""
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 as written, not as a binary number
    sums = [sum(exact[: k + 1]) for k in range(len(exact))]
    return [
        (sums[k - 1] / sums[k] if sums[k] else Fraction(1)).as_integer_ratio() for k in range(1, len(sums))
    ]


def _before(samples: npt.NDArray[np.object_], split: Split) -> npt.NDArray[np.object_]:
    """How many of the first `samples` belong to the earlier sources."""
    part, whole = split
    return (2 * samples * part + whole) // (2 * whole)


def _counts(splits: list[Split], samples: int) -> list[int]:
    counts, left = [], samples
    for split in reversed(splits):
        before = _before(left, split)
        counts.append(left - before)
        left = before
    return [left, *reversed(counts)]


def _places(splits: list[Split], samples: Indices) -> tuple[Indices, Indices]:
    """Source and number within the source of samples of a stage."""
    sources = np.zeros(len(samples), np.int64)
    left = samples.astype(object)  # Python's integers, which do not overflow
    todo = np.arange(len(samples))
    for k in range(len(splits), 0, -1):
        before = _before(left[todo], splits[k - 1])
        own = before == _before(left[todo] + 1, splits[k - 1])
        sources[todo[own]] = k
        left[todo] = np.where(own, left[todo] - before, before)
        todo = todo[~own]
    return sources, left.astype(np.int64)
