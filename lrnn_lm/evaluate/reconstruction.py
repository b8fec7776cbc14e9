"""The auto-encoder of MAD's compression task as an lm-eval model: it reads a row and writes it again.

Heavy to import (torch, lm_eval): `harness` does so only when it evaluates.

Legend: b rows of a batch, T length of a row.
"""

from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model import LRNNForReconstruction
from .team import ALONE, Team

TASKS = ("mad_compression",)  # for this model only


class Reconstruction(LM):
    """Writes the most likely token at every position of a row, all positions at once. team: as in LiveLM."""

    def __init__(
        self,
        model: LRNNForReconstruction,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        team: Team = ALONE,
    ) -> None:
        super().__init__()
        self._model, self._tokenizer, self._batch_size, self._team = model.eval(), tokenizer, batch_size, team
        self.truncated = self.changed = 0  # rows are read whole
        self.undefined: set[str] = set()  # no log-likelihoods

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each row as the model writes it, numbers between blanks."""
        texts = [request.args[0] for request in requests]
        return self._team.share(texts, range(len(texts)), list(map(len, texts)), self._write)

    def _write(self, texts: list[str]) -> list[str]:
        ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        written: dict[int, str] = {}
        for length in sorted(set(map(len, ids))):  # no padding: the model reads out at the last position
            alike = [i for i, row in enumerate(ids) if len(row) == length]
            for start in range(0, len(alike), self._batch_size):
                chosen = alike[start : start + self._batch_size]
                rows = torch.tensor([ids[i] for i in chosen], device=self._model.device)  # (b, T)
                with torch.no_grad():
                    found = self._model(rows).logits.argmax(dim=-1).tolist()
                written |= {i: " ".join(map(str, row)) for i, row in zip(chosen, found, strict=True)}
        return [written[i] for i in range(len(texts))]

    # Abstract in LM. Its TASKS never ask for them, and `check_kind` refuses other tasks.
    loglikelihood = loglikelihood_rolling = None


def encodes(model: PreTrainedModel) -> bool:
    return isinstance(model, LRNNForReconstruction)


def check_kind(checkpoint: Path, model: PreTrainedModel, names: list[str]) -> None:
    """Raise ValueError if an auto-encoder gets a language model's task, or the other way round."""
    others = [name for name in names if (name in TASKS) != encodes(model)]
    if not others:
        return
    if encodes(model):
        raise ValueError(
            f"{checkpoint}: an auto-encoder (task compression), which is no language model; of the tasks it "
            f"has an answer for {', '.join(TASKS)} only"
        )
    raise ValueError(
        f"task {others[0]} asks an auto-encoder (`lrnn train recipes/synthetic/compression.yaml` makes one), "
        f"and {checkpoint} is a language model"
    )
