"""Scoring with several processes: each answers a share of the requests, all get all answers.

Every process builds all requests, so each computes the same metrics from the same list in the same order.
lm-eval itself splits documents and joins metrics by name: it needs a document a process in every task, drops
a metric that the first process did not meet (such as an accuracy by length), and resamples in another order.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..files import world_size

MINUTES = 120  # a process may be this much slower than another


@dataclass(frozen=True)
class Team:
    """This process's rank among `size` processes; rank 0 is the main one.

    shows: whether the main one shows progress bars. wait: called when this process has answered its share,
    before answers are gathered; it returns once all have.
    """

    rank: int = 0
    size: int = 1
    shows: bool = True
    wait: Callable[[], None] = lambda: None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def owners(self, groups: Sequence[Hashable], costs: Sequence[int]) -> list[int]:
        """The process of each request. A group stays together, as one answer may serve all of it.

        Groups are dealt out by falling cost, so that shares are about equal.
        """
        cost: dict[Hashable, int] = {}
        for group, more in zip(groups, costs, strict=True):
            cost[group] = max(cost.get(group, 0), more)
        order = sorted(cost, key=cost.__getitem__, reverse=True)  # stable: the same in all processes
        owner = {group: place % self.size for place, group in enumerate(order)}
        return [owner[group] for group in groups]

    def share(
        self,
        requests: Sequence[Any],
        groups: Sequence[Hashable],
        costs: Sequence[int],
        answer: Callable[[list[Any]], Sequence[Any]],
    ) -> list[Any]:
        """`answer(requests)`, each process answering its share of them."""
        if self.size == 1:
            return list(answer(list(requests)))
        from accelerate.utils import gather_object

        owners = self.owners(groups, costs)
        mine = [i for i, owner in enumerate(owners) if owner == self.rank]
        answers = answer([requests[i] for i in mine]) if mine else []
        self.wait()
        found = dict(gather_object(list(zip(mine, answers, strict=True))))
        return [found[i] for i in range(len(requests))]


ALONE = Team()


def join(device: str) -> tuple[Team, str]:
    """The team that `accelerate launch` (or torchrun) started, and this process's device.

    device: auto, cpu, cuda or cuda:N. One of several processes takes its own GPU unless it is cpu.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or world_size() == 1:  # set by the launcher
        return ALONE, device
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=timedelta(minutes=MINUTES))
    return Team(state.process_index, state.num_processes), str(state.device)


def leave(team: Team) -> None:
    """Close the connection between several processes."""
    if team.size > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
