"""Batches from any position on: the same global sequence for any number of ranks, workers or micro-batches.

Samples are counted over all ranks and epochs. A step takes the next R = rows_per_step samples; rank r of W
takes the r-th of W equal parts of them, in micro-batches.
"""

import itertools
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pickle import UnpicklingError

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import ConcatDataset, DataLoader

from .mixture import Indices, Mixture, MixtureStage
from .order import rows_at
from .pack import IGNORED, PackedRows, Row, collate
from .shards import TokenShards
from .specs import DataError
from .synthetic.tasks import SyntheticRows

Split = TokenShards | SyntheticRows
Array = npt.NDArray[np.generic]
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class TrainLoader:
    """Endless steps of training rows. Each item is one optimizer step of this rank: a list of micro-batches.

    A micro-batch is a dict of `input_ids`, `labels` (b, T) int64 and `reset` (b, T) bool, b <= micro_batch.

    shards: a split of text, or the rows of a synthetic task; or several splits, with the `mixture` that says
        in which order their rows, or stretches of `in_order` rows, are read.
    position: samples in all steps so far, over all ranks; a new loader resumes there on any number of ranks.
    curriculum: (length, steps) stages in order; in a stage only the first `length` tokens of a row have
        targets.
    in_order: C > 1: row i of a step follows row i of the step before in the text, C rows long; then come C
        others. The last rows of a source, fewer than C, are not read.

    Raises DataError if the text is too short, or a curriculum leaves nothing to learn.
    """

    def __init__(
        self,
        shards: Split | Sequence[Split],
        sequence_length: int,
        seed: int,
        rows_per_step: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        position: int = 0,
        pin_memory: bool = False,
        curriculum: Sequence[tuple[int, int]] = (),
        mixture: Mixture | None = None,
        in_order: int = 1,
    ) -> None:
        sources = shards if isinstance(shards, Sequence) else [shards]
        self.rows = [_rows(source, sequence_length) for source in sources]
        for source, rows in zip(sources, self.rows, strict=True):
            if not rows.num_rows:
                raise DataError(
                    f"the text is too short: {source.num_tokens} {source.split} tokens do not fill one row "
                    f"of sequence_length + 1 = {sequence_length + 1}"
                )
            if rows.num_rows < in_order:
                raise DataError(
                    f"the text is too short: {rows.num_rows} rows, fewer than data.rows_in_order {in_order}"
                )
        for rows in self.rows:
            _check_curriculum(rows, curriculum)
        assert 0 <= rank < world_size
        assert rows_per_step % world_size == 0
        assert micro_batch > 0
        assert position >= 0
        self.mixture = mixture or Mixture([MixtureStage(None, (1.0,))])
        self._offsets = np.cumsum([0, *(rows.num_rows for rows in self.rows)])
        self.sequence_length = sequence_length
        self.seed, self.rows_per_step, self.micro_batch = seed, rows_per_step, micro_batch
        self.rank, self.share = rank, rows_per_step // world_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.curriculum, self.in_order = curriculum, in_order
        self.position = position

    @property
    def num_rows(self) -> int:
        """Rows of all sources, over all ranks."""
        return int(self._offsets[-1])

    def __iter__(self) -> Generator[list[Row], None, None]:
        loader = DataLoader(
            self.rows[0] if len(self.rows) == 1 else ConcatDataset(self.rows),
            batch_sampler=self._own_rows(),
            num_workers=self.num_workers,
            collate_fn=_arrays if self.num_workers else collate,
            pin_memory=self.pin_memory and not self.num_workers,
            worker_init_fn=_leave_signals_to_trainer,
            generator=torch.Generator().manual_seed(0),  # otherwise torch draws from the global generator
        )
        # Block signals while the workers start: none must get one before it ignores them.
        old, child = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS), signal.getsignal(signal.SIGCHLD)
        others = active_children()
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
            # torch's handler raises as soon as a worker dies, which may be in the middle of an update.
            # Without the handler, `next` raises some seconds later, between updates.
            if child is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, child)
        workers = [worker for worker in active_children() if worker not in others]
        while True:
            try:
                step = [self._tensors(next(batches)) for _ in range(0, self.share, self.micro_batch)]
            except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
                _check_alive(workers, error)
                raise
            learnt = self._learnt_length(self.position // self.rows_per_step)
            if learnt < self.sequence_length:
                for batch in step:
                    batch["labels"][:, learnt:] = IGNORED
            self.position += self.rows_per_step
            yield step

    def _tensors(self, batch: Row | dict[str, Array]) -> Row:
        """A micro-batch as tensors; a worker's are arrays."""
        if not self.num_workers:
            return batch
        tensors = {key: torch.from_numpy(array) for key, array in batch.items()}
        return {key: t.pin_memory() for key, t in tensors.items()} if self.pin_memory else tensors

    def _own_rows(self) -> Iterator[list[int]]:
        """Row numbers of this rank's micro-batches, endless, from the loader's position on."""
        for step in itertools.count(self.position, self.rows_per_step):
            rows = self.row_numbers(step + self.rank * self.share, self.share).tolist()
            for start in range(0, self.share, self.micro_batch):
                yield rows[start : start + self.micro_batch]

    def row_numbers(self, first: int, count: int) -> Indices:
        """Rows (count,) of samples first .. first+count-1, counted through all sources one after another."""
        steps, lanes = np.divmod(np.arange(first, first + count, dtype=np.int64), self.rows_per_step)
        turns, places = np.divmod(steps, self.in_order)  # a stretch of rows is read in as many steps
        stretches = turns * self.rows_per_step + lanes
        low = int(stretches.min())
        sources, numbers = self.mixture.places(low, int(stretches.max()) - low + 1)
        sources, numbers = sources[stretches - low], numbers[stretches - low]
        rows = np.empty(count, np.int64)
        for source in np.unique(sources):
            own = sources == source
            drawn = rows_at(numbers[own], self.rows[source].num_rows // self.in_order, self.seed)
            rows[own] = drawn * self.in_order + places[own] + self._offsets[source]
        return rows

    def _learnt_length(self, step: int) -> int:
        """Tokens of a row that have targets in this step.

        The rest stays in the row without targets: so shapes and token counts do not change, and a causal
        model's outputs on the beginning do not depend on it.
        """
        end = 0
        for length, steps in self.curriculum:
            end += steps
            if step < end:
                return length
        return self.sequence_length


def _arrays(rows: list[Row]) -> dict[str, Array]:
    """A worker's micro-batch. A tensor would come in shared memory, with a file open as long as it is held: a
    step of 170 micro-batches had more than `ulimit -n` allows, and hung; and containers have little of it."""
    return {key: tensor.numpy() for key, tensor in collate(rows).items()}


def _leave_signals_to_trainer(worker: int) -> None:
    """Ignore signals in a worker: a scheduler sends them to the whole process group."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _check_alive(workers: Sequence[BaseProcess], error: Exception) -> None:
    """Raise RuntimeError instead of `error` if a worker died.

    What reading from a dead process gives depends on the moment: torch's own words only if it already sees
    that the process is gone, otherwise any error of a pipe.
    """
    # A killed process may take a moment to end. The errors of a living worker's rows wait this long in vain.
    if workers and wait([worker.sentinel for worker in workers], timeout=1):
        *_, words = (str(error) or type(error).__name__).splitlines()
        raise RuntimeError(f"a DataLoader worker was killed ({words})") from error


def _check_curriculum(rows: PackedRows | SyntheticRows, curriculum: Sequence[tuple[int, int]]) -> None:
    """Raise DataError for a stage without targets, and for a task that a curriculum does not shorten."""
    if not curriculum or not isinstance(rows, SyntheticRows):
        return
    task = rows.task
    if task.kind.head == "autoencoder":
        raise DataError(f"data.curriculum: task {task.name} is read whole before anything of it is written")
    labels = torch.stack([row["labels"] for row in rows.__getitems__(list(range(min(8, rows.num_rows))))])
    for length, _ in curriculum:
        if (labels[:, :length] == IGNORED).all():
            raise DataError(
                f"data.curriculum: the first {length} tokens of a row of task {task.name} have no targets"
            )


def _rows(source: Split, sequence_length: int, keep_tail: bool = False) -> PackedRows | SyntheticRows:
    """The rows of a split of text, or a synthetic task's own."""
    if isinstance(source, SyntheticRows):
        assert source.sequence_length == sequence_length
        return source
    return PackedRows(source, sequence_length, keep_tail)


def validation_batches(
    shards: Split,
    sequence_length: int,
    batch_rows: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Row]:
    """The first rows of a split as batches (b, T), b <= batch_rows; at most `max_tokens`, at least one row.

    Ranks take turns batch by batch. Every rank gets the same number of batches, as a forward pass may be
    collective; on some ranks the last one has all targets masked.
    """
    rows = _rows(shards, sequence_length, keep_tail=True)
    count = rows.num_rows if max_tokens is None else min(rows.num_rows, max(1, max_tokens // sequence_length))
    for turn in range(0, count, batch_rows * world_size):
        first = turn + rank * batch_rows
        batch = [rows[row] for row in range(first, min(first + batch_rows, count))]
        yield collate(batch) if batch else _masked(rows[turn])


def _masked(row: Row) -> Row:
    batch = collate([row])
    batch["labels"].fill_(IGNORED)
    return batch
