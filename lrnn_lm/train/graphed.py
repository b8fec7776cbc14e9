"""Forward and backward of a micro-batch as one CUDA graph: the host launches it at once.

A pass launches about a thousand kernels. Where a model is small the device ends them sooner than Python
launches them, and Python limits the speed. The graph holds a pass's activations as long as the run lasts.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..model.decoding.step import first_words, record, replay
from ..recipe import Recipe

Batch = dict[str, Tensor | None]
# Adds the gradients of a micro-batch, whose summed loss is divided by the second argument.
Pass = Callable[[Batch, Tensor], Tensor]


def graphed_passes(
    recipe: Recipe, accelerator: Accelerator, run: Pass, parameters: list[nn.Parameter]
) -> "GraphedPasses | None":
    """What `train.cuda_graphs` asks for; None if it does not, or where ranks exchange gradients meanwhile."""
    if not recipe.train.cuda_graphs or accelerator.num_processes > 1:
        return None
    return GraphedPasses(run, parameters, parameters[0].device)  # with its number, as decoding names it


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """RuntimeError within it where torch makes the host wait for a device, in any thread."""
    # A recording would break off there, after which torch 2.11 keeps freed memory for the rest of the process
    # (pytorch pull request 180395). May go with torch 2.11.
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass
class _Recorded:
    """A pass's graph and the memory that it reads and writes."""

    batch: Batch
    num_items: Tensor
    graph: torch.cuda.CUDAGraph = field(default_factory=lambda: torch.cuda.CUDAGraph())
    result: Tensor | None = None
    gradients: list[Tensor | None] = field(default_factory=list)


class GraphedPasses:
    """Records a pass before its first use, for each shape of a micro-batch, and replays it.

    So all of a run's passes are replayed, those after it was resumed too: their numbers are the same, even
    where a library chooses other kernels in a graph. A step's first pass writes gradients to memory of its
    own, and the others add to them there, so these are different graphs.
    """

    def __init__(self, run: Pass, parameters: list[nn.Parameter], device: torch.device):
        """parameters: without gradients before a step's first pass."""
        self._run, self._parameters, self._device = run, parameters, device
        self._first: tuple | None = None  # key of this step's first pass, to whose gradients the others add
        self._recorded: dict[tuple, _Recorded] = {}
        self._pool: Any = None  # memory that all graphs use, one after the other
        self.obstacle = None if device.type == "cuda" else f"there are none on {device}"

    def __call__(self, batch: Batch, num_items: Tensor, first: bool) -> Tensor:
        """What the pass returns; its tensor is written again by the next call. first: of its step."""
        if self.obstacle is not None:
            return self._run(batch, num_items)
        shapes = tuple(None if each is None else each.shape for each in batch.values())
        key = (shapes, None if first else self._first)
        if first:
            self._first = key
        if key not in self._recorded and not self._record(key, batch, num_items):
            return self._run(batch, num_items)
        recorded = self._recorded[key]
        recorded.num_items.copy_(num_items)
        for name, into in recorded.batch.items():
            if into is not None:
                into.copy_(batch[name], non_blocking=True)
        replay(recorded.graph, self._device)
        self._set_gradients(recorded.gradients)
        return recorded.result

    def _record(self, key: tuple, batch: Batch, num_items: Tensor) -> bool:
        """Whether it could be recorded; if not, passes run as they are from then on."""
        on_device = {name: None if t is None else t.to(self._device) for name, t in batch.items()}
        recorded = _Recorded(on_device, num_items.clone())
        before = [parameter.grad for parameter in self._parameters]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()

        def warm_up() -> None:
            random = torch.cuda.get_rng_state(self._device)
            try:
                for around in (nullcontext(), waiting_is_an_error()):  # kernels are compiled in the first
                    self._set_gradients([None] * len(before))
                    with around:
                        self._run(recorded.batch, recorded.num_items)
            finally:
                self._set_gradients(before)
                torch.cuda.set_rng_state(random, self._device)

        try:
            with record(recorded.graph, self._device, self._pool, warm_up):
                recorded.result = self._run(recorded.batch, recorded.num_items)
        except (RuntimeError, ValueError, OSError) as error:
            self.obstacle = first_words(error)
            warnings.warn(f"training without a CUDA graph: {self.obstacle}", stacklevel=4)
            self._set_gradients(before)
            self._recorded.clear()  # the memory of their passes: passes as they are need as much
            return False
        recorded.gradients = [parameter.grad for parameter in self._parameters]
        self._recorded[key] = recorded
        return True

    def _set_gradients(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
