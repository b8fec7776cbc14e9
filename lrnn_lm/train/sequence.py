"""One row among several ranks (`train.sequence_parallel: k`), whose states go from rank to rank.

    row          piece 0   piece 1   piece 2   piece 3   piece 4   piece 5      of `train.segment` tokens, or
    k = 2 ranks  rank 0    rank 1    rank 0    rank 1    rank 0    rank 1       4 a rank where there is none
    pass         0         0         1         1         2         2

A rank waits, layer by layer, for what the piece before carries over, and passes on what its own piece does.
In the backward pass the gradients of the same tensors go the other way. So each piece is computed from the
state that one rank would have there, and its gradient is that of the whole row. Ranks work on different
layers at the same time: the last one begins k - 1 layers after the first, once a row and direction, as a
row's passes follow one another without a gap.

Why not the transfer of each rank's part, (A_total, h), folded over ranks: to find it takes a second pass over
the gates in every layer. Here a rank waits for k - 1 layers, of the number of layers x passes (docs/long.md).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import pad

from ..model import LRNNConfig
from ..model.carried import Boundary, Carried, CarriedStates
from ..recipe import Recipe
from .segments import Batch, backward_by_segments, evaluate_by_segments

PASSES = 4  # over the part of a row that a rank has, without segments


class Ring:
    """The ranks that share rows. Each hears the rank before and speaks to the rank after; back, of gradients.

    rank, ranks: of all; ranks are numbered row by row. All ranks construct it together.
    """

    def __init__(self, size: int, rank: int, ranks: int, device: torch.device, timeout: timedelta):
        self._sent: list[tuple[dist.Work, Tensor]] = []
        first = rank - rank % size
        self._before, self._after = first + (rank - 1) % size, first + (rank + 1) % size
        probe = torch.zeros(1, device=device)
        # Each edge has a group of its own: what is sent over one never waits for what is sent over another.
        for i in range(ranks):
            after = i - i % size + (i + 1) % size
            group = dist.new_group([i, after], timeout=timeout)
            if rank == i:
                self._to_after = group
            if rank == after:
                self._to_before = group
        for i in range(first, first + size):  # NCCL connects at first use, which must not be within a step
            if rank == i:
                dist.send(probe, self._after, group=self._to_after)
            elif self._before == i:
                dist.recv(probe, i, group=self._to_before)

    def send(self, tensor: Tensor, back: bool = False) -> None:
        """Pass a state on to the rank after; or, `back`, its gradient to the rank before."""
        peer, group = (self._before, self._to_before) if back else (self._after, self._to_after)
        tensor = tensor.detach().contiguous()
        self._sent.append((dist.isend(tensor, peer, group=group), tensor))

    def receive(self, like: Tensor, back: bool = False) -> Tensor:
        """What the rank before passed on; or the gradient that comes back of what was passed on."""
        peer, group = (self._after, self._to_after) if back else (self._before, self._to_before)
        tensor = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        dist.recv(tensor, peer, group=group)
        return tensor

    def settle(self) -> None:
        """Let go of what was sent for the rows before, which has arrived by now."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []


class _Arrived(torch.autograd.Function):
    """What the rank before passed on; sends it the gradients."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, *states: Tensor) -> Carried:
        ctx.ring = ring
        return tuple(state.view_as(state) for state in states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        for gradient in gradients:
            ctx.ring.send(gradient, back=True)
        return (None, *(None for _ in gradients))


class _PassedOn(torch.autograd.Function):
    """y, as it is, and in the backward pass the gradients of what was passed on, which wait until then."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, y: Tensor, *states: Tensor) -> Tensor:
        ctx.ring = ring
        ctx.save_for_backward(*states)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, gradient, *(ctx.ring.receive(state, back=True) for state in ctx.saved_tensors)


@dataclass
class _Piece:
    """A piece of rows on this rank. What arrived is kept: a pass that recomputes it asks nobody."""

    boundary: Boundary  # without states
    rows: int
    last: bool  # of its row
    arrived: dict[int, Carried] = field(default_factory=dict)  # by layer
    passed_on: set[int] = field(default_factory=set)


class RelayedStates(CarriedStates):
    """What a pass over a piece begins with comes from the rank before, layer by layer.

    likes: of each layer, what a row of one token carries.
    """

    def __init__(self, config: LRNNConfig, ring: Ring, piece: _Piece, likes: list[Carried]):
        super().__init__(config, piece.boundary)
        self._ring, self._piece, self._likes = ring, piece, likes
        self._windows = [spec.get("window") for spec in config.layer_mixers]

    def take(self, layer: int) -> Carried:
        piece = self._piece
        if not piece.boundary.seen:
            return ()
        if layer not in piece.arrived:
            shapes = [(piece.rows, *like.shape[1:]) for like in self._likes[layer]]
            if (window := self._windows[layer]) is not None:
                tokens = min(piece.boundary.seen, window - 1)
                shapes = [(rows, heads, tokens, width) for rows, heads, _, width in shapes]
            pairs = zip(self._likes[layer], shapes, strict=True)
            arrived = (self._ring.receive(like.new_empty(shape)) for like, shape in pairs)
            piece.arrived[layer] = tuple(state.requires_grad_() for state in arrived)
        return _Arrived.apply(self._ring, *piece.arrived[layer])

    def give(self, layer: int, carried: Carried, hidden_states: Tensor) -> Tensor:
        piece = self._piece
        if piece.last:
            return hidden_states
        if layer not in piece.passed_on:
            piece.passed_on.add(layer)
            for state in carried:
                self._ring.send(state)
        return _PassedOn.apply(self._ring, hidden_states, *carried)


class SequenceParallel:
    """This rank's share of each row, and the passes over it.

    size: k, ranks that share a row; 1: a row is one rank's. length: of a row, T. segment: of the recipe.
    rank, ranks: of all. group, groups: of the ranks that share rows; each has rows of its own.
    """

    def __init__(
        self,
        config: LRNNConfig,
        size: int,
        length: int,
        segment: int | None,
        rank: int,
        ranks: int,
        device: torch.device,
        timeout: timedelta,
    ):
        passes = math.gcd(length // size, PASSES) if size > 1 else 1
        self.size, self.piece = size, segment or length // size // passes
        self._recomputes = segment is not None
        self.by_pieces = size > 1 or segment is not None  # whether a pass takes less than a row
        self.group, self.groups = rank // size, ranks // size
        self._config, self._device, self._place = config, device, rank % size
        self._windowed = "sliding_attention" in config.layer_types
        self._likes: list[Carried] = []
        self._ring = Ring(size, rank, ranks, device, timeout) if size > 1 else None

    def own(self, batch: Batch) -> Batch:
        """Of whole rows (B, T) this rank's pieces, side by side (B, T / k)."""
        if self.size == 1:
            return batch
        if self._windowed:  # at which token the document of the token before began
            steps = torch.arange(batch["reset"].shape[1])
            begun = torch.where(batch["reset"], steps, 0).cummax(dim=1).values
            batch = batch | {"document_start": pad(begun[:, :-1], (1, 0))}
        pieces = {key: rows.split(self.piece, dim=1)[self._place :: self.size] for key, rows in batch.items()}
        own = {key: torch.cat(parts, dim=1) for key, parts in pieces.items()}
        return {k: rows.pin_memory() for k, rows in own.items()} if self._device.type == "cuda" else own

    def backward(
        self,
        forward: Callable[..., Any],
        loss_of: Callable[..., Tensor],
        parts: list[Batch],
        around: Callable[[bool], AbstractContextManager[None]],
        start: Boundary | None = None,
        keep_end: bool = False,
    ) -> tuple[Tensor, Boundary | None]:
        """`backward_by_segments`; with several ranks to a row, of this one's pieces, without start and end.

        The loss is that of the own tokens. Its gradient is not: summed over ranks, it is that of the row.
        """
        if self._ring is None:
            return backward_by_segments(forward, loss_of, self._config, parts, around, start, keep_end)
        passes = list(zip(parts, self._pieces(forward, parts), strict=True))
        if not self._recomputes:
            return self._backward_at_once(loss_of, passes, around), None
        with torch.no_grad():
            for part, piece in passes[:-1]:
                forward(part, self._states(piece))
        total: Tensor | float = 0.0
        for i, (part, piece) in reversed(list(enumerate(passes))):
            with around(i == 0):
                loss = loss_of(part, self._states(piece))
                loss.backward()
            total = total + loss.detach()
        return total, None

    def _backward_at_once(
        self,
        loss_of: Callable[..., Tensor],
        passes: list[tuple[Batch, _Piece]],
        around: Callable[[bool], AbstractContextManager[None]],
    ) -> Tensor:
        """Without recomputing: the graphs of all passes are kept, autograd takes the last one first."""
        *before, (part, piece) = passes
        losses = []
        with around(False):
            for each, its in before:
                losses.append(loss_of(each, self._states(its)))
        with around(True):
            losses.append(loss_of(part, self._states(piece)))
            loss = torch.stack(losses).sum()
            loss.backward()
        return loss.detach()

    @torch.no_grad()
    def evaluate(
        self, forward: Callable[..., Any], parts: list[Batch], return_logits: bool
    ) -> SimpleNamespace:
        """`evaluate_by_segments`; with several ranks to a row, of this one's pieces."""
        states = None
        if self._ring is not None:
            states = [self._states(piece) for piece in self._pieces(forward, parts)]
        return evaluate_by_segments(forward, self._config, parts, return_logits, states)

    def _states(self, piece: _Piece) -> RelayedStates:
        return RelayedStates(self._config, self._ring, piece, self._likes)

    def _pieces(self, forward: Callable[..., Any], parts: list[Batch]) -> list[_Piece]:
        self._ring.settle()
        if not self._likes:
            self._likes = self._of_one_token(forward)
        pieces = []
        for i, part in enumerate(parts):
            nth = i * self.size + self._place  # piece of the row
            start = part["document_start"][:, 0].to(self._device) if nth and self._windowed else None
            boundary = Boundary(nth * self.piece, [()] * len(self._config.layer_mixers), start)
            pieces.append(_Piece(boundary, len(part["input_ids"]), nth + 1 == len(parts) * self.size))
        return pieces

    @torch.no_grad()
    def _of_one_token(self, forward: Callable[..., Any]) -> list[Carried]:
        """What a row of one token carries: only the mixers know the shapes and dtypes of their states."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        states = CarriedStates(self._config)
        with torch.compiler.set_stance("force_eager"):
            forward({"input_ids": token, "reset": token.bool(), "labels": None}, states)
        return states.states


def sequence_parallel(recipe: Recipe, config: LRNNConfig, accelerator: Accelerator) -> SequenceParallel:
    """As the recipe says."""
    return SequenceParallel(
        config,
        recipe.train.sequence_parallel,
        recipe.data.sequence_length,
        recipe.train.segment,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        timedelta(minutes=recipe.train.timeout_minutes),
    )
