"""Before the first step: ranks wait for one another without hanging, and fail or stop together.

Why not Accelerate's `main_process_first`: its barrier is a collective. A rank in one hears no signal, so a
job that SLURM stops during an hour of tokenisation would be killed, not requeued; it times out after
`train.timeout_minutes`; and a rank that failed leaves the others waiting. So while the first rank prepares
data the others poll the rendezvous store a few times a second. A stop on any of them reaches the first one
through the same store. An error on one rank ends all of them, with its message.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed as dist

from ..files import words_of
from .stop import Stopped, StopSignal

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 10.0
_STOPPED = "stopped:"
_MISTAKE = "mistake:"
Result = TypeVar("Result")


class Together:
    """The ranks of a run while it is being built."""

    def __init__(self, accelerator: Accelerator, stop: StopSignal):
        """With several ranks `stop` is held by now: signals wait, except inside `main_first`."""
        self._stop = stop
        self._alone = accelerator.num_processes == 1
        self._ranks, self._main = accelerator.num_processes, accelerator.is_main_process
        self._round = 0
        if not self._alone:
            # The process group's rendezvous store, which has no public name in torch.
            store = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("lrnn-start", store)

    def main_first(self, work: Callable[[], Result]) -> Result:
        """Do `work` on the main rank, however long, then on the others. Raises as `all`, or Stopped."""
        if self._alone:
            return work()
        self._round += 1
        done, stop = f"{self._round}/done", f"{self._round}/stop"
        if self._main:
            result = self._lead(work, done, stop)
        else:
            self._follow(done, stop)
        return self.all(lambda: result if self._main else work())

    def all(self, work: Callable[[], Result]) -> Result:
        """Do `work` on every rank. If one fails, all raise ValueError, the main rank with the message."""
        if self._alone:
            return work()
        problem, result = None, None
        try:
            result = work()
        except (ValueError, OSError) as error:
            problem = words_of(error)
        message = next((text for text in gather_object([problem]) if text is not None), None)
        if message is not None:
            raise ValueError(message if self._main else "") from None
        return result

    def from_main(self, value: Result) -> Result:
        """The main rank's value, on every rank."""
        if self._alone:
            return value
        box = [value]
        broadcast_object_list(box)
        return box[0]

    def _lead(self, work: Callable[[], Result], done: str, stop: str) -> Result:
        ended = threading.Event()
        listener = threading.Thread(target=self._listen, args=(stop, ended), daemon=True)
        listener.start()
        verdict = "ok"
        try:
            with self._stop.released():
                return work()
        except Stopped as stopped:
            verdict = _STOPPED + str(stopped)
            raise
        except (ValueError, OSError) as error:
            verdict = _MISTAKE + words_of(error)
            raise
        finally:
            ended.set()
            listener.join()
            self._store.set(done, verdict)
            # Let the others read it before this process ends, which may host the store that they poll.
            deadline = time.monotonic() + _PATIENCE_SECONDS if verdict != "ok" else 0.0
            while time.monotonic() < deadline and self._store.add(f"{done}/heard", 0) < self._ranks - 1:
                time.sleep(_POLL_SECONDS)

    def _listen(self, stop: str, ended: threading.Event) -> None:
        """Send this process the signal that another rank received."""
        while not ended.wait(_POLL_SECONDS):
            if self._store.check([stop]):
                os.kill(os.getpid(), int(self._store.get(stop)))
                return

    def _follow(self, done: str, stop: str) -> None:
        """Wait for the main rank's verdict. A stop here is passed on to it and comes back in the verdict."""
        passed_on = False
        while not self._store.check([done]):
            time.sleep(_POLL_SECONDS)
            if self._stop.asked and not passed_on:
                self._store.set(stop, str(int(signal.Signals[self._stop.name])))
                passed_on = True
        verdict = self._store.get(done).decode()
        self._store.add(f"{done}/heard", 1)
        if verdict.startswith(_STOPPED):
            raise Stopped(verdict.removeprefix(_STOPPED), tell=False)
        if verdict.startswith(_MISTAKE):
            raise ValueError("")


def cpu_group(accelerator: Accelerator, timeout_minutes: float) -> dist.ProcessGroup | None:
    """A gloo group of all ranks, for threads that write checkpoints while training uses the default group."""
    if accelerator.num_processes == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
