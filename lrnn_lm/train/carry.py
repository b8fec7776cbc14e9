"""States that rows begin with: that of the row before (`data.rows_in_order`), or of another row.

The rows of a step lie in lanes: row i of every step, counted over all ranks, is in lane i. With
`rows_in_order: C` a lane reads C rows of the text one after another, each from the end state of the one
before; no gradient goes back into that one (truncated backpropagation). The first of C rows begins with
zeros, or, with the probability `train.start_from_other`, with the end state of the row before all the same:
of another text, which teaches a model to go on from states that no single row leads to (arXiv 2507.02782).

A checkpoint holds the states, so a resumed run goes on with the same bits.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..data.order import mix, word
from ..model.carried import Boundary
from ..recipe import Recipe

Batch = dict[str, Tensor]
PREFIX = "carried/"  # of keys in a rank's file of random states


class Carry:
    """The states of one rank's lanes, from step to step.

    lanes: of this rank. first_lane: how many there are on the ranks before.
    """

    def __init__(self, recipe: Recipe, first_lane: int, lanes: int, device: torch.device):
        self._in_order, self._probability = recipe.data.rows_in_order or 1, recipe.train.start_from_other
        self._seed, self._first, self._lanes, self._device = recipe.seed, first_lane, lanes, device
        self._state: Boundary | None = None
        self._ends: list[Boundary] = []

    def before(self, step: int, batch: Batch) -> tuple[Boundary | None, Batch]:
        """What the next micro-batch of a step begins with, and the batch.

        Where a row goes on from another text, its first token starts no document.
        """
        taken = sum(_rows(end) for end in self._ends)
        lanes = slice(taken, taken + len(batch["input_ids"]))
        begins = step % self._in_order == 0
        if self._state is None or (begins and not self._probability):
            return None, batch
        state = _picked(self._state, lanes)
        if not begins:
            return state, batch
        reset = batch["reset"].clone()  # where a row goes on from nothing, it begins as a document does
        reset[:, 0] = torch.tensor([not self._goes_on(step, lane) for lane in range(lanes.start, lanes.stop)])
        return state, batch | {"reset": reset}

    def after(self, end: Boundary) -> None:
        """The end states of that micro-batch."""
        self._ends.append(end)

    def end_step(self, finite: bool) -> None:
        """Go on with the end states; with zeros after a step that was not finite, as they may be neither."""
        self._state = _joined(self._ends) if finite else None
        self._ends = []

    def _goes_on(self, step: int, lane: int) -> bool:
        """Drawn for (seed, step, lane), whatever the number of ranks."""
        drawn = mix(word(self._seed) + mix(word(step) + mix(word(self._first + lane))))
        return int(drawn[0]) < self._probability * 2**64

    def tensors(self) -> dict[str, Tensor]:
        """The states on the CPU, for a checkpoint."""
        if self._state is None:
            return {}
        found = {"seen": torch.tensor([self._state.seen])}
        for i, layer in enumerate(self._state.layers):
            found |= {f"{i}.{k}": tensor for k, tensor in enumerate(layer)}
        if self._state.document_start is not None:
            found["document_start"] = self._state.document_start
        return {PREFIX + key: value.to("cpu", copy=True) for key, value in found.items()}

    def load(self, trainer: Path) -> None:
        """This rank's lanes from the files of all ranks that wrote a checkpoint, however many they were."""
        ranks = []
        for path in sorted(trainer.glob("rng-*.safetensors")):
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
                ranks.append({name.removeprefix(PREFIX): file.get_tensor(name) for name in names})
        if not ranks[0]:
            return
        seen = int(ranks[0].pop("seen"))
        joined = {name: torch.cat([rank[name] for rank in ranks]).to(self._device) for name in ranks[0]}
        document_start = joined.pop("document_start", None)
        layers: list[list[Tensor]] = []
        for name in sorted(joined, key=lambda name: tuple(map(int, name.split(".")))):
            layers += [[]] if name.endswith(".0") else []
            layers[-1].append(joined[name])
        state = Boundary(seen, [tuple(layer) for layer in layers], document_start)
        self._state = _picked(state, slice(self._first, self._first + self._lanes))


def _rows(boundary: Boundary) -> int:
    return boundary.layers[0][0].shape[0]


def _picked(boundary: Boundary, rows: slice) -> Boundary:
    starts = boundary.document_start
    layers = [tuple(tensor[rows] for tensor in layer) for layer in boundary.layers]
    return Boundary(boundary.seen, layers, None if starts is None else starts[rows])


def _joined(parts: list[Boundary]) -> Boundary:
    of_layers = zip(*(part.layers for part in parts), strict=True)
    layers = [tuple(map(torch.cat, zip(*same, strict=True))) for same in of_layers]
    starts = [part.document_start for part in parts]
    return Boundary(parts[0].seen, layers, None if starts[0] is None else torch.cat(starts))
