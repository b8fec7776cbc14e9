"""`eval.during`: the tasks that a run scores on its model while it trains."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.layout import RunFolder
from ..runs.load import CheckpointInfo
from .harness import flatten, score_model
from .scoring import quiet_lm_eval, refusals
from .tasks.names import find_tasks, hub_data, usual_window
from .team import Team
from .text import documents_of

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_data(names: list[str], folder: Path) -> None:
    """Load the tasks' data before the first step. Raises ValueError for data that cannot be loaded."""
    with quiet_lm_eval():
        manager, names, hub = _find(names, _info(folder))
        with hub_data(hub), refusals(names):
            manager.load(names)


class LiveScorer:
    """Scores of the model in memory; a `train.tasks.Scorer`. All processes build it alike."""

    def __init__(self, folder: Path, names: list[str], limit: int | None, batch_size: int):
        self._info, self._names, self._limit, self._batch_size = _info(folder), names, limit, batch_size
        self._found: tuple[TaskManager, list[str], bool] | None = None  # once it has scored

    def __call__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        rank: int,
        size: int,
        wait: Callable[[], None],
    ) -> dict[str, float]:
        """{"task/metric": value} on the main process, standard errors left out; {} on the others."""
        with quiet_lm_eval():
            manager, names, hub = found = self._found or _find(self._names, self._info)
            with hub_data(hub, cached=self._found is not None):  # a run must not end because the hub is down
                results, _ = score_model(
                    model, tokenizer, manager, names, self._info, usual_window(names), limit=self._limit,
                    batch_size=self._batch_size, num_fewshot=None, team=Team(rank, size, False, wait),
                    bootstrap=0,
                )  # fmt: skip
        self._found = found
        return {f"{task}/{metric}": value for task, metric, value, _ in flatten(results or {"results": {}})}


def _info(folder: Path) -> CheckpointInfo:
    """Of the checkpoint that the model would be, which need not exist."""
    return CheckpointInfo(RunFolder(folder).latest, folder, None, None)


def _find(names: list[str], info: CheckpointInfo) -> "tuple[TaskManager, list[str], bool]":
    documents: dict[str, Any] = {"data": data} if (data := documents_of(info, None)) else {}
    return find_tasks(names, {"pretrained": str(info.path), **documents})
