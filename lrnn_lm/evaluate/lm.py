"""lm-eval's Hugging Face model around a model in memory, with documents started as in training.

Heavy to import (torch, lm_eval): `harness` does so only when it evaluates.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenize import no_token_told, spells
from ..model import prefill
from ..model.cache import CACHE
from .team import ALONE, Team

PIECE = 2048  # tokens of a long request read at once; their logits are the memory peak
_LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's aliases


class LiveLM(HFLM):
    """HFLM over a model in memory.

    Args:
        max_length: tokens a window. A rolling log-likelihood is computed window by window. A longer request
            of another kind loses the beginning of its context and is counted in `truncated`.
        unlimited: read requests of any length whole, except rolling ones. For models without attention, whose
            memory does not grow with the length.
        start: the token before every context (BOS); None: the tokenizer adds it. A rolling log-likelihood
            always starts at BOS, exactly once.
        prompt_twice: read each context twice, a line break between.
        team: the processes that share the requests; to lm-eval each looks like a single process.

    `changed` counts the rolling texts that their tokens do not spell, as they are lower-cased or hold an
    unknown token: what the model need not predict. `undefined` are the tasks with a log-likelihood of NaN.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int,
        start: int | None,
        unlimited: bool = False,
        prompt_twice: bool = False,
        team: Team = ALONE,
    ) -> None:
        self._twice = prompt_twice
        self._start, self._rolling, self.truncated, self._team = start, False, 0, team
        self.changed = 0
        self.undefined: set[str] = set()
        self._window, self._unlimited = max_length, unlimited
        self._bare = tokenizer.bos_token_id is None and tokenizer.eos_token_id is None  # no start token
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=sys.maxsize if unlimited else max_length,
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

        With `start`, the spelling of a control token is plain text, as in training; other models' texts are
        read as lm-eval reads them.
        """
        if self._rolling or self._bare:  # lm-eval puts the prefix token before rolling windows itself
            add_special_tokens = False
        with no_token_told(string):
            if self._start is None:
                return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
            ids = self.tokenizer.encode(
                string, add_special_tokens=False, split_special_tokens=True, verbose=False
            )
        ids = ids if add_special_tokens is False else [self._start, *ids]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask of contexts to continue, each (B, T), padded on the left.

        A row is `tok_encode` of its text; for an empty text, the prefix token.
        """
        rows = [self.tok_encode(text) or [self.prefix_token_id] for text in strings]
        rows = [row[-left_truncate_len:] if left_truncate_len else row for row in rows]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])  # the mask tells padding
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """Text of token ids; None for None, the EOS of a tokenizer without one."""
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation after its context, and whether it is the greedy one.

        Raises ValueError for a continuation longer than the window.
        """
        requests = self._read_twice(requests)
        pairs = [(request.args, *self._encode_pair(*request.args)) for request in requests]
        sizes = [len(context) + len(target) for _, context, target in pairs]
        for request, (_, _, target) in zip(requests, pairs, strict=True):
            if len(target) > self.max_length:
                raise ValueError(
                    f"task {request.task_name}: an answer of {len(target)} tokens is longer than the window "
                    f"of {self.max_length} tokens; pass a larger --max-length"
                )
        self.truncated += sum(size - 1 > self.max_length for size in sizes)  # the last is only predicted
        contexts = [tuple(context) for _, context, _ in pairs]

        def score(share: list[Any]) -> list[tuple[float, bool]]:
            return self._score(share, self._quiet(disable_tqdm))

        answers = self._team.share(pairs, contexts, sizes, score)
        return self._seen(requests, answers, [nats for nats, _ in answers])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text given BOS, in windows of max_length tokens."""
        texts = [request.args[0] for request in requests]

        def score(share: list[Instance]) -> list[float]:
            return super(LiveLM, self).loglikelihood_rolling(share, disable_tqdm=self._quiet(disable_tqdm))

        with self._in_windows():
            self.changed += sum(self._changes(text) for text in texts if self._team.is_main)
            answers = self._team.share(requests, range(len(texts)), list(map(len, texts)), score)
        return self._seen(requests, answers, answers)

    def _seen(self, requests: list[Instance], answers: list[Any], nats: list[float]) -> list[Any]:
        """The answers; notes the tasks of those that are NaN."""
        self.undefined |= {r.task_name for r, n in zip(requests, nats, strict=True) if math.isnan(n)}
        return answers

    def _changes(self, text: str) -> bool:
        """Whether a text's tokens spell another one."""
        ids = self.tok_encode(text)
        return not spells(self.tokenizer, ids, text, clean_up_tokenization_spaces=False)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of each context.

        Raises ValueError for invalid settings, or answers so long that a window has no room for a context.
        """
        requests = self._read_twice(requests)
        requests = [_with_plain_settings(request, self.max_gen_toks) for request in requests]
        contexts = [request.args[0] for request in requests]
        for request in requests:
            context, settings = request.args
            room = self.max_length - settings["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"task {request.task_name}: answers of up to {settings['max_gen_toks']} tokens leave no "
                    f"room for a context in the window of {self.max_length} tokens; pass a larger "
                    "--max-length, or lower max_gen_toks in the task"
                )
            self.truncated += not self._unlimited and len(self.tok_encode(context)) > room

        def write(share: list[Instance]) -> list[str]:
            return super(LiveLM, self).generate_until(share, disable_tqdm=self._quiet(disable_tqdm))

        return self._team.share(requests, range(len(contexts)), list(map(len, contexts)), write)

    def _read_twice(self, requests: list[Instance]) -> list[Instance]:
        """The requests with each context written twice, if it is to be read so."""
        if not self._twice:
            return requests
        twice = []
        for request in requests:
            context, *rest = request.args
            context = f"{context.rstrip()}\n{context}" if context.strip() else context
            twice.append(replace(request, arguments=(context, *rest)))
        return twice

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context, at least one, and of its continuation: the ids of the whole text, cut in two.

        A token that spans the cut, or white space before it, belongs to the continuation; lm-eval does the
        same with white space.
        """
        end = len(context.rstrip())
        context, continuation = context[:end], context[end:] + continuation
        if not context:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            return [self.prefix_token_id], ids[1:] if ids[:1] == [self.prefix_token_id] else ids
        ids, before = self.tok_encode(context + continuation), self.tok_encode(context)
        most = min(len(ids), len(before))
        shared = next((i for i in range(most) if ids[i] != before[i]), most)
        return ids[:shared] or [self.prefix_token_id], ids[shared:]

    def _score(self, pairs: list[Any], quiet: bool) -> list[tuple[float, bool]]:
        """Score this process's share: in batches, and requests too long for a batch one by one."""
        most = max(self._window, PIECE) + 1
        alone = [self._unlimited and len(context) + len(target) > most for _, context, target in pairs]
        batched = [pair for pair, long in zip(pairs, alone, strict=True) if pair[2] and not long]
        scored = iter(self._loglikelihood_tokens(batched, quiet) if batched else ())
        answers = []
        for (_, context, target), long in zip(pairs, alone, strict=True):
            if not target:  # an empty continuation is certain
                answers.append((0.0, True))
            else:
                answers.append(self._score_long(context, target) if long else next(scored))
        return answers

    @torch.no_grad()
    def _score_long(self, context: list[int], target: list[int]) -> tuple[float, bool]:
        """`loglikelihood` of one pair of any length, read in pieces through the cache."""
        ids = torch.tensor([context + target], device=self.device)  # (1, T)
        first, end = len(context) - 1, ids.shape[1] - 1  # the last token is only predicted
        cache = getattr(prefill(self.model, ids[:, :first], PIECE), CACHE) if first else None
        nats, greedy = 0.0, True
        for start in range(first, end, PIECE):
            stop = min(start + PIECE, end)
            output = self.model(ids[:, start:stop], use_cache=True, **{CACHE: cache})
            cache, after = getattr(output, CACHE), ids[0, start + 1 : stop + 1]
            logprobs = output.logits[0].float().log_softmax(dim=-1)  # (t, V)
            nats += float(logprobs.gather(1, after.unsqueeze(1)).sum())
            greedy = greedy and bool((logprobs.argmax(dim=-1) == after).all())
        return nats, greedy

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # Called once for each batch of rolling requests: without this, a progress bar a batch.
        quiet = self._quiet(disable_tqdm) or override_bs is not None
        # lm-eval runs requests of the same tokens once, and reads all answers where the first one's begins.
        places: dict[int, int] = {}  # by a hash: the tokens of all requests take gigabytes
        self.logits_cache = all(
            places.setdefault(hash((*context, *target[:-1])), len(target)) == len(target)
            for _, context, target in requests
        )
        return super()._loglikelihood_tokens(requests, quiet, override_bs)

    def _quiet(self, disable_tqdm: bool) -> bool:
        """Only the main process shows a progress bar."""
        return disable_tqdm or not (self._team.is_main and self._team.shows)

    @contextmanager
    def _in_windows(self) -> Iterator[None]:
        """Inside, requests are rolling: in windows of max_length, with the prefix token added by lm-eval."""
        before, self._max_length, self._rolling = self._max_length, self._window, True
        try:
            yield
        finally:
            self._max_length, self._rolling = before, False


def _with_plain_settings(request: Instance, usual: int) -> Instance:
    """A generation request with `until` as a list of texts and `max_gen_toks` (`usual` if it has no length).

    Raises ValueError for settings of a wrong type.
    """
    context, given = request.args
    settings = {key: value for key, value in given.items() if value is not None}
    until = settings.pop("until", [])
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"task {request.task_name}: until must be a text or a list of texts, not {until!r}")
    lengths = [settings.pop(key) for key in _LENGTH_KEYS if key in settings]
    try:
        length = int((lengths or [usual])[0])
    except (TypeError, ValueError, OverflowError):
        length = 0
    if length < 1:
        raise ValueError(
            f"task {request.task_name}: max_gen_toks must be a whole number above 0, not {lengths[0]!r}"
        )
    stops = [stop for stop in stops if stop]  # an empty text would end every answer at once
    return replace(request, arguments=(context, {**settings, "until": stops, "max_gen_toks": length}))
