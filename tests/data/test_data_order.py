"""The permutation of rows: one for each (seed, epoch), computed by index."""

import numpy as np
import pytest

from lrnn_lm.data.order import permuted, rows_of_samples

GOLDEN = [0, 7, 6, 5, 1, 2, 9, 4, 3, 8, 5, 9]


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 255, 256, 257, 1000, 4097])
def test_is_a_permutation(size: int) -> None:
    places = np.arange(size)
    for seed, epoch in [(0, 0), (0, 1), (7, 0), (2**63 + 5, 3)]:
        assert sorted(permuted(places, size, seed, epoch)) == list(places)


def test_depends_on_seed_and_epoch_only() -> None:
    places = np.arange(1000)
    orders = [tuple(permuted(places, 1000, seed, epoch)) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert len(set(orders)) == 4
    one_by_one = [int(permuted(np.array([p]), 1000, 1, 1)[0]) for p in places]
    assert tuple(one_by_one) == orders[3]


def test_golden() -> None:
    """A change here changes the order of every run: raise the data's format with it."""
    assert rows_of_samples(0, 12, 10, seed=3).tolist() == GOLDEN


@pytest.mark.parametrize("size", [2, 10, 257, 1000])
def test_seeds_and_epochs_give_other_orders(size: int) -> None:
    """Many seeds and epochs: each of the two alone changes the order, and they are not added up."""
    places = np.arange(size)
    orders = {(s, e): tuple(permuted(places, size, s, e)) for s in range(12) for e in range(12)}
    different = len(set(orders.values()))
    assert different == (2 if size == 2 else len(orders))
    for k in range(12):
        for along in ([orders[k, e] for e in range(12)], [orders[s, k] for s in range(12)]):
            assert len(set(along)) == (2 if size == 2 else 12)


def test_samples_take_the_seed_and_the_epoch_they_are_in() -> None:
    for seed in (0, 1, 2**62):
        rows = rows_of_samples(0, 30, 10, seed)
        for epoch in range(3):
            want = permuted(np.arange(10), 10, seed, epoch)
            assert rows[epoch * 10 : epoch * 10 + 10].tolist() == want.tolist()


def test_looks_random() -> None:
    size = 2000
    displacement = np.abs(permuted(np.arange(size), size, 0, 0) - np.arange(size)).mean()
    assert 0.28 * size < displacement < 0.39 * size  # a third, for a random permutation
    first = [int(permuted(np.array([0]), 8, seed, 0)[0]) for seed in range(1600)]
    assert np.bincount(first, minlength=8).min() > 150  # each of 8 about 200 times


def test_samples_walk_through_epochs() -> None:
    rows = rows_of_samples(0, 30, 10, seed=5)
    assert all(sorted(rows[k : k + 10]) == list(range(10)) for k in (0, 10, 20))
    assert rows_of_samples(7, 9, 10, seed=5).tolist() == rows[7:16].tolist()
