"""Runs of one process or of several that meet by gloo, forked from a server that has imported all."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from forks import server
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from lrnn_lm.data.shards import TokenShards


class Forked:
    """`lrnn train` in a process forked from the server: what it does, says and ends with, not its imports.

    `first` is called before all else, and before this returns.
    """

    def __init__(self, recipe: Path, *overrides: str, first: Callable[[], object] | None = None):
        self._log = recipe.parent / f"forked-{free_port()}.log"
        self._log.write_text("")
        begun = server().Event()
        self.process = server().Process(
            target=_train, args=(self._log, first, begun, str(recipe), *overrides)
        )
        self.process.start()
        assert begun.wait(60), self._log.read_text()

    def runs(self) -> bool:
        return self.process.exitcode is None

    def send_signal(self, number: signal.Signals) -> None:
        if self.runs():
            os.kill(self.process.pid, number)

    def finish(self, timeout: float = 120) -> tuple[int, str]:
        """Exit code and what it said."""
        self.process.join(timeout)
        if self.runs():
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self._log.read_text()}")
        return self.process.exitcode, self._log.read_text()


EVERY = -1


@dataclass(frozen=True)
class Prank:
    """What befalls a run: `rank`, or EVERY one, gets `signal` within step `step`, or the validation or
    scoring after it; its loss is NaN in the steps that begin at `nan_samples`; step `step` takes `sleep`
    seconds longer, finds no room on its GPU if `full`, or if `lost` does not find the text of the next step
    (or batch; step 0: the first; of scoring, a task's data set)."""

    rank: int = 0
    step: int = 0
    signal: int = 0
    validating: bool = False
    scoring: bool = False
    nan_samples: tuple[int, ...] = ()
    sleep: float = 0.0
    full: bool = False
    lost: bool = False


class Ranks:
    """A run of forked ranks. `wait` for their exit codes; `errors` is what they said."""

    def __init__(
        self,
        recipe: Path,
        count: int,
        *overrides: str,
        parallel: str = "ddp",
        prank: Prank | None = None,
        record: Path | None = None,
    ):
        recipe.parent.joinpath("logs").mkdir(exist_ok=True)
        port = free_port()
        self._log = recipe.parent / "logs" / f"{port}.log"
        self._log.write_text("")
        plan = ["fsdp2", "train.shard_size=2"] if parallel == "hsdp" else [parallel]
        arguments = [str(recipe), f"train.parallel={plan[0]}", *plan[1:], *overrides]
        self.processes: list[BaseProcess] = [
            server().Process(target=_rank, args=(rank, count, port, arguments, prank, record, self._log))
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    @property
    def errors(self) -> str:
        return self._log.read_text()

    def wait(self, timeout: float = 200) -> list[int]:
        for process in self.processes:
            process.join(timeout)
        hung = [process for process in self.processes if process.exitcode is None]
        for process in hung:
            process.kill()
        assert not hung, f"{len(hung)} ranks hang: {self.errors}"
        return [process.exitcode for process in self.processes]

    def expect(self, code: int = 0) -> str:
        """All end with this code; what they said."""
        codes = self.wait()
        assert codes == [code] * len(codes), f"{codes}: {self.errors}"
        return self.errors


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rank(
    rank: int,
    count: int,
    port: int,
    arguments: Sequence[str],
    prank: Prank | None,
    record: Path | None,
    log: Path,
) -> None:
    """One rank, in its own process."""
    _speak_into(log)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    if count > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {key: str(value) for key, value in places.items()}
    torch.set_num_threads(1)
    _disturb(rank, prank)
    if record is not None:
        _record(rank, record)
    from lrnn_lm.cli import main

    main(["train", *arguments])


def _train(log: Path, first: Callable[[], object] | None, begun: Event, *arguments: str) -> None:
    _speak_into(log)
    torch.set_num_threads(1)
    if first is not None:
        first()
    begun.set()
    from lrnn_lm.cli import main

    main(["train", *arguments])


def _speak_into(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _disturb(rank: int, prank: Prank | None) -> None:
    from lrnn_lm.train.loop import Trainer
    from lrnn_lm.train.parallel import is_sharded

    if prank is None or prank.rank not in (rank, EVERY):
        return
    original, forward = Trainer.step, Trainer.forward

    def validating(trainer: Trainer, *arguments: object, **options: object) -> object:
        if trainer.position.step == prank.step and not trainer.model.training:
            if prank.lost:
                _lose(trainer.prepared.validation)
            else:
                os.kill(os.getpid(), prank.signal)
        return forward(trainer, *arguments, **options)

    if prank.scoring:
        meet = Trainer._meet

        def meets(trainer: Trainer, doing: str, *flags: bool, **more: bool) -> bool:
            here = doing == "scoring" and trainer.position.step == prank.step
            if here and prank.signal:
                os.kill(os.getpid(), prank.signal)
            any_works = meet(trainer, doing, *flags, **more)
            if here and (prank.full or prank.lost) and not more:  # after the meeting: in the pass
                model = trainer.bare_model  # or behind it, if others wait within it
                hook = model.register_forward_hook if is_sharded(model) else model.register_forward_pre_hook
                hook(fail)
            return any_works

        def fail(*_: object) -> None:
            if prank.lost:
                raise ValueError("a task's data set cannot be loaded")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has ..")

        Trainer._meet = meets
        return
    if prank.validating:
        Trainer.forward = validating
        return

    if prank.lost and not prank.step:
        train = Trainer._train

        def begins(trainer: Trainer) -> None:
            _lose(trainer.rows.loader.rows[0].shards)
            train(trainer)

        Trainer._train = begins
        return

    def step(trainer: Trainer, batches: list, *rest: object) -> object:
        if trainer.position.step + 1 == prank.step:
            time.sleep(prank.sleep)
            if prank.signal:
                os.kill(os.getpid(), prank.signal)
            if prank.full:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has ..")
            if prank.lost:
                _lose(trainer.rows.loader.rows[0].shards)
        if trainer.position.samples not in prank.nan_samples:
            return original(trainer, batches, *rest)
        loss = trainer._loss
        trainer._loss = lambda *a: loss(*a) * float("nan")
        try:
            return original(trainer, batches, *rest)
        finally:
            del trainer._loss

    Trainer.step = step


def _lose(shards: "TokenShards") -> None:
    shards.folder = shards.folder / "gone"
    shards._maps.clear()


def _record(rank: int, folder: Path) -> None:
    """What training begins with, whole, and the token ids of every step that counted, by the samples seen."""
    from lrnn_lm.train.loop import Trainer
    from lrnn_lm.train.parallel import whole
    from lrnn_lm.train.tensors import training_tensors

    folder.mkdir(exist_ok=True)
    step, train = Trainer.step, Trainer._train

    def stepped(trainer: Trainer, batches: list, *rest: object) -> object:
        ids = np.concatenate([batch["input_ids"].numpy() for batch in batches])
        np.save(folder / f"{trainer.position.samples:08d}-{rank:02d}.npy", ids)
        return step(trainer, batches, *rest)

    def trained(trainer: Trainer) -> None:
        held = {k: whole(v) for k, v in training_tensors(trainer.bare_model, trainer.optimizer).items()}
        if rank == 0:
            save_file(held, folder / f"held-{trainer.position.step:08d}.safetensors")
        train(trainer)

    Trainer.step, Trainer._train = stepped, trained


def recorded(folder: Path) -> dict[int, np.ndarray]:
    """Rows (R, T) of each step, ranks in order, by the samples seen before it."""
    steps: dict[int, list[np.ndarray]] = {}
    for path in sorted(folder.glob("*.npy")):
        steps.setdefault(int(path.name[:8]), []).append(np.load(path))
    return {samples: np.concatenate(parts) for samples, parts in steps.items()}


def weights(checkpoint: Path) -> torch.Tensor:
    """All weights of a plain folder as one vector."""
    stored = load_file(checkpoint / "model.safetensors")
    return torch.cat([stored[name].flatten() for name in sorted(stored)])
