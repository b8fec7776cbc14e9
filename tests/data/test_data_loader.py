"""Rows and their order: boundaries, and the same global batches for any ranks, workers, micro-batches and
restarts.
"""

import itertools
import multiprocessing
import os
import signal
import time
from pickle import UnpicklingError

import numpy as np
import pytest
import torch

from lrnn_lm.data import DataError, PreparedData, TrainLoader, loader, validation_batches
from lrnn_lm.data.order import rows_of_samples
from lrnn_lm.data.pack import PackedRows

T = 32
R = 8
STEPS = 5


def global_steps(
    prepared: PreparedData,
    world_size: int = 1,
    micro_batch: int = R,
    num_workers: int = 0,
    position: int = 0,
    steps: int = STEPS,
) -> list[dict[str, torch.Tensor]]:
    """Whole steps (R, T), put together from every rank's micro-batches."""
    loaders = [
        TrainLoader(prepared.train, T, 5, R, micro_batch, rank, world_size, num_workers, position)
        for rank in range(world_size)
    ]
    ranks = [list(itertools.islice(loader, steps)) for loader in loaders]
    assert all(loader.position == position + steps * R for loader in loaders)
    whole = []
    for k in range(steps):
        batches = [batch for rank in ranks for batch in rank[k]]
        assert all(len(batch["input_ids"]) <= micro_batch for batch in batches)
        whole.append({key: torch.cat([batch[key] for batch in batches]) for key in batches[0]})
    return whole


def assert_equal(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("input_ids", "labels", "reset"))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_same_sequence_on_any_machine(prepared: PreparedData, world_size: int, micro_batch: int) -> None:
    assert_equal(global_steps(prepared, world_size, micro_batch), global_steps(prepared))


@pytest.mark.parametrize("world_size", [1, 2])
def test_same_sequence_with_workers(prepared: PreparedData, world_size: int) -> None:
    assert_equal(global_steps(prepared, world_size, 2, num_workers=2), global_steps(prepared))


@pytest.mark.parametrize("done", [1, 3, 40])
def test_resume_on_another_world_size(prepared: PreparedData, done: int) -> None:
    straight = global_steps(prepared, steps=done + 4)
    resumed = global_steps(prepared, world_size=4, micro_batch=1, position=done * R, steps=4)
    assert_equal(resumed, straight[done:])


def test_position_need_not_be_whole_steps(prepared: PreparedData) -> None:
    rows = torch.cat([step["input_ids"] for step in global_steps(prepared, steps=4)])
    later = torch.cat([step["input_ids"] for step in global_steps(prepared, position=5, steps=3)])
    assert torch.equal(later, rows[5 : 5 + 3 * R])


def test_an_epoch_is_every_row_once(prepared: PreparedData) -> None:
    rows = PackedRows(prepared.train, T)
    stream = prepared.train.read(0, prepared.train.num_tokens)
    loader = TrainLoader(prepared.train, T, seed=1, rows_per_step=1, micro_batch=1)
    assert loader.num_rows == len(rows) == (len(stream) - 1) // T > 100
    seen = [tuple(step[0]["input_ids"][0].tolist()) for step in itertools.islice(loader, 2 * len(rows))]
    expected = sorted(tuple(stream[r * T : r * T + T].tolist()) for r in range(len(rows)))
    first, second = seen[: len(rows)], seen[len(rows) :]
    assert sorted(first) == sorted(second) == expected
    assert first != second


def test_order_follows_the_seed(prepared: PreparedData) -> None:
    def epoch(seed: int) -> list[tuple[int, ...]]:
        loader = TrainLoader(prepared.train, T, seed, rows_per_step=1, micro_batch=1)
        steps = itertools.islice(loader, loader.num_rows)
        return [tuple(step[0]["input_ids"][0].tolist()) for step in steps]

    orders = [epoch(seed) for seed in (0, 1, 2)]
    assert epoch(1) == orders[1], "the same seed, the same order"
    for first, second in itertools.combinations(orders, 2):
        assert sorted(first) == sorted(second), "of the same rows"
        same = sum(a == b for a, b in zip(first, second, strict=True))
        assert same < len(first) / 4, "in another order from the first row to the last"


def test_rows_are_those_of_the_seed_and_epoch(prepared: PreparedData) -> None:
    """The loader adds nothing to the order: sample i is the row that `rows_of_samples` says."""
    rows = PackedRows(prepared.train, T)
    for seed, position in [(0, 0), (3, 5), (3, 2 * len(rows) - 4), (2**40, 1)]:
        loader = TrainLoader(prepared.train, T, seed, R, 3, position=position)
        step = next(iter(loader))
        got = torch.cat([batch["input_ids"] for batch in step])
        want = [rows[row]["input_ids"] for row in rows_of_samples(position, R, len(rows), seed).tolist()]
        assert torch.equal(got, torch.stack(want))


def test_rows_and_boundaries(prepared: PreparedData) -> None:
    shards = prepared.train
    stream = shards.read(0, shards.num_tokens)
    starts = set(shards.document_starts(0, shards.num_tokens).tolist())
    rows = PackedRows(shards, T)
    for r in range(len(rows)):
        row = rows[r]
        assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
        assert row["reset"].dtype == torch.bool
        for t in range(T):
            p = r * T + t
            assert row["input_ids"][t] == stream[p]
            assert row["labels"][t] == (-100 if p + 1 in starts else stream[p + 1])
            assert row["reset"][t] == (p in starts)


class Stream:
    """Shards of this many tokens, 0, 1, .. of one document."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.arange(self.num_tokens)[start:stop]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        return np.arange(1)[start:stop]


@pytest.mark.parametrize("num_tokens", range(10))
def test_rows_of_a_stream_of_any_length(num_tokens: int) -> None:
    """All tokens but the first are targets, once; without the tail, those of whole rows."""
    for keep_tail, count in ((True, max(num_tokens - 1, 0)), (False, 4 * (max(num_tokens - 1, 0) // 4))):
        rows = PackedRows(Stream(num_tokens), 4, keep_tail)
        labels = [label for r in range(len(rows)) for label in rows[r]["labels"].tolist()]
        assert [label for label in labels if label != -100] == list(range(1, count + 1))
        assert len(labels) - count < 4, "no row without a target"


def test_a_text_that_is_too_short(prepared: PreparedData) -> None:
    with pytest.raises(DataError, match="too short"):
        TrainLoader(prepared.train, 10**6, 0, 8, 1)


def test_loading_leaves_the_global_generators_alone(prepared: PreparedData) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        next(iter(TrainLoader(prepared.train, T, 0, R, R, num_workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("begin", [0, 1, 2, 3, 5])
def test_a_curriculum_goes_by_the_number_of_the_step(prepared: PreparedData, begin: int) -> None:
    """On two ranks and from any step on: tokens, targets and positions."""
    straight = global_steps(prepared, steps=8)
    wanted = range(begin, 8)
    ranks = [
        TrainLoader(prepared.train, T, 5, R, 2, rank, 2, position=begin * R, curriculum=[(8, 6)])
        for rank in range(2)
    ]
    for step, parts in zip(wanted, zip(*ranks, strict=False), strict=False):
        whole = {key: torch.cat([batch[key] for part in parts for batch in part]) for key in parts[0][0]}
        learnt = 8 if step < 6 else T
        assert torch.equal(whole["input_ids"], straight[step]["input_ids"])
        assert torch.equal(whole["reset"], straight[step]["reset"])
        assert torch.equal(whole["labels"][:, :learnt], straight[step]["labels"][:, :learnt])
        assert (whole["labels"][:, learnt:] == -100).all()
        assert [loader.position for loader in ranks] == [(step + 1) * R] * 2


def test_workers_survive_preemption_signals(prepared: PreparedData) -> None:
    received = []
    old = {
        number: signal.signal(number, lambda n, _: received.append(n))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        steps = iter(TrainLoader(prepared.train, T, 5, R, R, num_workers=2))
        got = [next(steps)[0]]
        batches = steps.gi_frame.f_locals["batches"]
        for worker in batches._workers:
            for number in old:
                os.kill(worker.pid, number)
        got += [step[0] for step in itertools.islice(steps, 20)]
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    assert_equal(got, global_steps(prepared, steps=21))
    assert received == [], "and none reached this process"


class OneWorker:
    """In place of a DataLoader: an iterator with a process, which is killed or not and then raises."""

    def __init__(self, error: Exception, killed: bool):
        self.error, self.killed = error, killed

    def __iter__(self) -> "OneWorker":
        self.worker = multiprocessing.Process(target=time.sleep, args=(60,), daemon=True)
        self.worker.start()
        return self

    def __next__(self) -> None:
        if self.killed:
            self.worker.kill()
        raise self.error


ERRORS = (ConnectionResetError(104, "Connection reset"), EOFError(), FileNotFoundError(2, "no socket"))
ERRORS += (UnpicklingError("truncated"), RuntimeError("Pin memory thread exited unexpectedly"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_killed_worker_is_told_whatever_its_pipe_gives(
    prepared: PreparedData, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says so itself only if it already sees that the process is gone."""
    for killed in (True, False):
        made = OneWorker(error, killed)
        monkeypatch.setattr(loader, "DataLoader", lambda *_, made=made, **__: made)
        try:
            with pytest.raises(RuntimeError if killed else type(error)) as raised:
                next(iter(TrainLoader(prepared.train, T, 5, R, R, num_workers=1)))
        finally:  # another test counts the processes that are left
            made.worker.kill()
            made.worker.join()
        assert ("a DataLoader worker was killed" in str(raised.value)) == killed
        assert killed or raised.value is error


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_covers_every_target_once(prepared: PreparedData, world_size: int) -> None:
    shards = prepared.validation
    ranks = [list(validation_batches(shards, T, 4, None, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "each rank takes part in every collective"
    labels = torch.cat([batch["labels"].flatten() for batches in ranks for batch in batches])
    valid = int((labels != -100).sum())
    assert valid == shards.num_tokens - shards.num_documents
    stream = shards.read(0, shards.num_tokens)
    assert torch.bincount(labels[labels != -100], minlength=400).sum() == valid
    if world_size == 1:
        ids = torch.cat([batch["input_ids"].flatten() for batch in ranks[0]])
        assert ids[: len(stream) - 1].tolist() == stream[:-1].tolist(), "in order"
        assert not ids[len(stream) - 1 :].any(), "the tail is padded"


def test_validation_budget(prepared: PreparedData) -> None:
    def rows(max_tokens: int) -> int:
        return sum(
            len(batch["labels"]) for batch in validation_batches(prepared.validation, T, 4, max_tokens)
        )

    assert rows(5 * T) == 5
    assert rows(5 * T + 31) == 5
    assert rows(1) == 1
