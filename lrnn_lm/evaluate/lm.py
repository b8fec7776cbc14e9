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


class LiveLM(HFLM):
    """HFLM over a model in memory.

    start: the token put before every context (BOS), or None to leave that to the tokenizer. A rolling
    log-likelihood starts at BOS in any case, and exactly once. `truncated` counts the requests that did not
    fit max_length tokens and lost the beginning of their context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int,
        start: int | None,
    ) -> None:
        self._start, self._rolling, self.truncated = start, False, 0
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

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a text, with the start token unless the caller says otherwise."""
        if self._rolling or self._bare:
            add_special_tokens = (
                False  # the prefix token is set before the ids, so it must not come with them
            )
        if add_special_tokens is not None or self._start is None:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        ids = super().tok_encode(string, add_special_tokens=False, **kwargs)
        ids = ids if ids[:1] == [self._start] else [self._start, *ids]
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
        with self._without_start():
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        fits = self.max_length + 1  # the last token is only predicted
        self.truncated += sum(len(context) + len(target) > fits for _, context, target in requests)
        # A rolling request comes here once a batch: one progress bar each would be a wall of them.
        quiet = disable_tqdm or override_bs is not None
        return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, override_bs=override_bs)

    @contextmanager
    def _without_start(self) -> Iterator[None]:
        self._rolling = True
        try:
            yield
        finally:
            self._rolling = False
