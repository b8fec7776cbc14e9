"""lm-eval's Hugging Face model around a live model, with documents started as they were in training.

Heavy to import (torch, lm_eval): `harness` does so only when it evaluates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .team import ALONE, Team


class LiveLM(HFLM):
    """HFLM over a model in memory.

    start: the token put before every context (BOS), or None to leave that to the tokenizer. A rolling
    log-likelihood starts at BOS in any case, and exactly once. `truncated` counts the requests that did not
    fit max_length tokens and lost the beginning of their context. team: those who share the requests;
    each of them looks like a process alone to lm-eval.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int,
        start: int | None,
        team: Team = ALONE,
    ) -> None:
        self._start, self._rolling, self.truncated, self._team = start, False, 0, team
        self._bare = (
            tokenizer.bos_token_id is None and tokenizer.eos_token_id is None
        )  # nothing to begin with
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",
            add_bos_token=None if start is None else False,  # with `start`, this class adds it
        )

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        if self._bare:
            raise ValueError(
                "a task asks for texts without a context, and this tokenizer has neither BOS nor EOS "
                "to begin with, as in checkpoints of synthetic tasks"
            )
        return super().prefix_token_id

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a text, with the start token unless the caller says otherwise.

        With `start` what spells a control token is text, as in training; other models' texts are read as
        lm-eval reads them.
        """
        if self._rolling or self._bare:
            add_special_tokens = (
                False  # the prefix token is set before the ids, so it must not come with them
            )
        if self._start is None:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        ids = self.tokenizer.encode(string, add_special_tokens=False, split_special_tokens=True)
        ids = ids if add_special_tokens is False else [self._start, *ids]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self, strings: list[str], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded ids and attention mask, each (B, T), with the start token before each text."""
        if self._start is not None:
            mark = self.tokenizer.decode([self._start])
            strings = [text if text.startswith(mark) else mark + text for text in strings]
        return super().tok_batch_encode(strings, *args, **kwargs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text given BOS, in windows of max_length tokens."""
        texts = [request.args[0] for request in requests]

        def score(share: list[Instance]) -> list[float]:
            return super(LiveLM, self).loglikelihood_rolling(share, disable_tqdm=self._quiet(disable_tqdm))

        with self._without_start():
            return self._team.share(requests, range(len(texts)), list(map(len, texts)), score)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of each context."""
        contexts = [request.args[0] for request in requests]

        def write(share: list[Instance]) -> list[str]:
            return super(LiveLM, self).generate_until(share, disable_tqdm=self._quiet(disable_tqdm))

        return self._team.share(requests, range(len(contexts)), list(map(len, contexts)), write)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        fits = self.max_length + 1  # the last token is only predicted
        self.truncated += sum(len(context) + len(target) > fits for _, context, target in requests)
        # A rolling request comes here once a batch: one progress bar each would be a wall of them.
        quiet = self._quiet(disable_tqdm) or override_bs is not None

        def score(share: list[Any]) -> list[tuple[float, bool]]:
            return super(LiveLM, self)._loglikelihood_tokens(share, quiet, override_bs)

        if self._rolling:  # this process's share already
            return score(requests)
        contexts = [tuple(context) for _, context, _ in requests]
        costs = [len(context) + len(target) for _, context, target in requests]
        return self._team.share(requests, contexts, costs, score)

    def _quiet(self, disable_tqdm: bool) -> bool:
        """One progress bar is enough."""
        return disable_tqdm or not self._team.is_main

    @contextmanager
    def _without_start(self) -> Iterator[None]:
        self._rolling = True
        try:
            yield
        finally:
            self._rolling = False
