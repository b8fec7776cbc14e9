"""`train.average`: an exponential moving average of the weights, kept beside them (Polyak averaging).

Often better than the weights of any one step while the learning rate is high. Tensors and
torch._foreach_lerp_, as in torch.optim.swa_utils. Not its AveragedModel, which copies the module: FSDP2
refuses that, and compiled blocks would be compiled again.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..recipe import Recipe
from .parallel import reshard


def check_updated(recipe: Recipe) -> None:
    """Raise ValueError if a run from its first step on would end with its initial weights as the average.

    Not of the schema: runs of older versions stored such recipes, and go on with more tokens.
    """
    average, total = recipe.train.average, recipe.total_steps
    if average is None or average.every <= total:
        return
    if average.start.steps(total, recipe.train.tokens_per_step) == 0:
        raise ValueError(
            f"train.average.every is {average.every} steps and train.tokens pays for {total}: the average "
            "would be the initial weights; lower it"
        )


class Average:
    """The averages of all parameters, sharded like them; of a recipe that asks for them."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        self._model, self._section = model, recipe.train.average
        self._start = self._section.start.steps(recipe.total_steps, recipe.train.tokens_per_step)
        self.values: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.named_parameters()}

    def _pair(self) -> tuple[list[Tensor], list[Tensor]]:
        """The averages, and the weights in the same order."""
        return list(self.values.values()), [parameter.detach() for parameter in self._model.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`, counted from 1. Until `start` the average is the weights."""
        if step <= self._start:  # at every step: else a `start` between two updates leaves it at earlier ones
            self.restart()
        elif step % self._section.every == 0:
            torch._foreach_lerp_(*self._pair(), 1 - self._section.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin at the weights as they are now."""
        torch._foreach_lerp_(*self._pair(), 1.0)  # exact; shards have no _foreach_copy_

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages for weights inside. An error leaves the weights as they were."""
        self._swap()
        try:
            yield
        finally:
            reshard(self._model)  # gathered parameters are the averages
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, live in zip(*self._pair(), strict=True):
            kept = live.clone()
            live.copy_(value)
            value.copy_(kept)
