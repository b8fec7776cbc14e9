"""Mixtures: shares, what each sample is, and the same samples from any position and over stages."""

import itertools

import numpy as np
import pytest
import torch

from lrnn_lm.data import PreparedData, TrainLoader
from lrnn_lm.data.mixture import Mixture, MixtureStage
from lrnn_lm.data.order import rows_at

T, R = 32, 12


def mixture(*weights: float) -> Mixture:
    return Mixture([MixtureStage(None, weights)])


@pytest.mark.parametrize(
    "weights", [(0.6, 0.4), (1, 1, 1), (0.7, 0.2, 0.05, 0.05), (0.999, 0.001), (3, 0, 7), (0, 1), (0.1,) * 10]
)
def test_counts_follow_the_weights_everywhere(weights: tuple[float, ...]) -> None:
    """Within 0.1% at 100,000 rows, and within a row a source after any number of rows."""
    sources, numbers = mixture(*weights).places(0, 100_000)
    shares = np.array(weights) / sum(weights)
    counts = np.stack([np.cumsum(sources == k) for k in range(len(weights))])  # (sources, rows)
    wanted = shares[:, None] * np.arange(1, 100_001)
    assert np.abs(counts - wanted).max() < len(weights)
    if len(weights) == 2:  # rounded, not cut off
        assert np.abs(counts - wanted).max() < 0.5 + 1e-6
    assert (np.abs(counts[:, -1] - wanted[:, -1]) <= 0.001 * wanted[:, -1] + 1e-6).all()
    for k in range(len(weights)):
        assert numbers[sources == k].tolist() == list(range(counts[k, -1])), "each in its own order, no gap"


def test_stages_continue_each_source() -> None:
    weights = [(0.6, 0.4, 0.0), (0.2, 0.3, 0.5), (1.0, 0.0, 1.0)]
    staged = Mixture([MixtureStage(n, w) for n, w in zip((1000, 777, None), weights, strict=True)])
    sources, numbers = staged.places(0, 3000)
    for k in range(3):
        own = numbers[sources == k]
        assert own.tolist() == list(range(len(own)))
    for (start, stop), stage in zip(((0, 1000), (1000, 1777), (1777, 3000)), weights, strict=True):
        counts = np.bincount(sources[start:stop], minlength=3)
        assert np.abs(counts - np.array(stage) / sum(stage) * (stop - start)).max() < 2
    for first, count in ((0, 1), (998, 5), (1776, 2), (1777, 1), (500, 2000)):
        part = staged.places(first, count)
        assert part[0].tolist() == sources[first : first + count].tolist()
        assert part[1].tolist() == numbers[first : first + count].tolist()
    for samples in (0, 1, 1000, 1001, 1777, 2999, 3000):
        assert staged.counts(samples) == np.bincount(sources[:samples], minlength=3).tolist()


def test_far_samples_are_exact() -> None:
    """No overflow and no rounding: a sample of a run of 2^44 rows."""
    far = mixture(0.3, 0.7)
    (source,), (number,) = far.places(2**44, 1)
    before, after = far.counts(2**44), far.counts(2**44 + 1)
    assert number == before[source]
    assert after[source] == before[source] + 1
    assert abs(before[0] - 0.3 * 2**44) < 1


@pytest.fixture(scope="module")
def pair(prepared: PreparedData) -> list:
    """Two sources: the train and the held-out text of one."""
    return [prepared.train, prepared.validation]


def ids(
    pair: list, mixed: Mixture, world: int, steps: int, position: int = 0, **options: int
) -> torch.Tensor:
    """Token ids (steps, R, T), put together from all ranks."""
    ranks = [
        TrainLoader(pair, T, 5, R, 2, rank, world, position=position, mixture=mixed, **options)
        for rank in range(world)
    ]
    taken = [list(itertools.islice(loader, steps)) for loader in ranks]
    return torch.stack(
        [torch.cat([batch["input_ids"] for rank in taken for batch in rank[k]]) for k in range(steps)]
    )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_equal_ids_on_any_ranks_workers_and_after_resuming(pair: list, world: int) -> None:
    staged = Mixture([MixtureStage(50, (0.75, 0.25)), MixtureStage(None, (0.5, 0.5))])
    straight = ids(pair, staged, 1, 12)
    assert torch.equal(ids(pair, staged, world, 12), straight)
    assert torch.equal(ids(pair, staged, world, 6, position=6 * R), straight[6:]), "over the stage's end"
    if world == 2:
        assert torch.equal(ids(pair, staged, world, 4, num_workers=1), straight[:4])


def test_rows_are_those_of_the_source(pair: list) -> None:
    """By hand: sample i is row perm(seed, epoch) of its source, and an epoch holds each row once."""
    loader = TrainLoader(pair, T, 5, R, 2, mixture=mixture(0.5, 0.5))
    rows = loader.row_numbers(0, 400)
    sizes = [part.num_rows for part in loader.rows]
    first = rows[rows < sizes[0]]
    second = rows[rows >= sizes[0]] - sizes[0]
    assert len(first) == len(second) == 200
    assert second.tolist() == rows_at(np.arange(200), sizes[1], 5).tolist()
    assert sorted(second[: sizes[1]]) == list(range(sizes[1])), "no row twice before the epoch ends"


def test_one_source_is_the_special_case(prepared: PreparedData) -> None:
    alone = TrainLoader(prepared.train, T, 5, R, 2)
    listed = TrainLoader([prepared.train], T, 5, R, 2, mixture=mixture(0.3))
    assert alone.row_numbers(7, 500).tolist() == listed.row_numbers(7, 500).tolist()
    assert alone.row_numbers(7, 500).tolist() == rows_at(np.arange(7, 507), alone.num_rows, 5).tolist()
