"""A prompt to token ids: at once, or a file of any length piece by piece."""

import bisect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import check_window

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

WINDOW = 100_000  # characters tokenised at once
OVERLAP = 1_000  # characters that two windows share


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Token ids of a prompt after the document start: BOS, or EOS for a tokenizer that has no BOS.

    Raises ValueError if the prompt is empty and the tokenizer has neither.
    """
    return [token for ids in stream_ids(tokenizer, [prompt] if prompt else []) for token in ids]


def stream_ids(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of a document start and of all texts as one, as they come.

    Raises ValueError if there is no text and no token to start a document with.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    begun = False
    for ids in _encode(tokenizer, texts):
        if not ids:
            continue
        if not begun and start is not None and ids[0] != start:
            yield [start]
        begun = True
        yield ids
    if not begun:
        if start is None:
            raise ValueError("the tokenizer has no token to start a document with: pass a prompt")
        yield [start]


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> Iterator[list[int]]:
    """Tokens of texts as one text, window by window.

    A window begins inside the one before, and is joined to it where both begin a token, away from the ends of
    either: there neither the text cut off before nor that cut off after has a say in what is a token.
    """
    if not tokenizer.is_fast:  # it does not tell where its tokens begin
        yield tokenizer.encode("".join(texts), add_special_tokens=False)
        return
    window, base = "", 0  # base: where the window begins in the whole text
    ids: list[int] = []  # of the window before, not given away yet
    starts: list[int] = []
    for text in _merged(texts, 2 * OVERLAP):
        end = base + len(window)
        tail = window[-OVERLAP:]
        new_ids, new_starts = _tokens(tokenizer, tail + text, end - len(tail))
        join = _join(starts, new_starts, end - len(tail) * 3 // 4, end - len(tail) // 4)
        if join is None:  # a single token as long as the overlap: cut the text
            yield ids
            ids, starts = _tokens(tokenizer, text, end)
            window, base = text, end
            continue
        yield ids[: bisect.bisect_left(starts, join)]
        first = bisect.bisect_left(new_starts, join)
        ids, starts = new_ids[first:], new_starts[first:]
        window, base = tail + text, end - len(tail)
    yield ids


def _merged(texts: Iterable[str], length: int) -> Iterator[str]:
    """The same text in pieces of at least this many characters, the last aside."""
    whole = ""
    for text in texts:
        whole += text
        if len(whole) >= length:
            yield whole
            whole = ""
    if whole:
        yield whole


def _tokens(tokenizer: "PreTrainedTokenizerBase", text: str, base: int) -> tuple[list[int], list[int]]:
    """Token ids of a text that begins at `base`, and where each begins."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], [base + start for start, _ in encoded["offset_mapping"]]


def _join(before: list[int], after: list[int], low: int, high: int) -> int | None:
    """The first place in low .. high where a token begins by both of two sorted lists."""
    shared = set(before[bisect.bisect_left(before, low) : bisect.bisect_right(before, high)])
    return next((place for place in after[bisect.bisect_left(after, low) :] if place in shared), None)


def read_text(file: str | Path) -> Iterator[str]:
    """A text file's characters, a window at a time. Raises ValueError if it is missing or not UTF-8."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file}: no such prompt file")
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            while text := stream.read(WINDOW):
                yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_prompt(
    model: "PreTrainedModel", stream: Iterable[list[int]], segment: int, more: int = 0
) -> "tuple[Cache | None, Tensor, int]":
    """Feed all but the last token of a stream to the model, `segment` at a time.

    Raises ValueError as soon as the stream and `more` tokens after it are longer than the model takes.

    Returns:
        the cache (None if there was but one token), the last token (1, 1), and how many there were in all.
    """
    import torch

    from ..model import prefill

    rest: list[int] = []
    count = 0

    def pieces() -> "Iterator[Tensor]":
        nonlocal count
        for ids in stream:
            rest.extend(ids)
            count += len(ids)
            check_window(model, count + more)
            while len(rest) > segment:
                yield torch.tensor([rest[:segment]])
                del rest[:segment]
        if len(rest) > 1:
            yield torch.tensor([rest[:-1]])

    source = pieces()
    first = next(source, None)
    cache = None if first is None else prefill(model, _chain(first, source), segment).past_key_values
    return cache, torch.tensor([rest[-1:]], device=model.device), count


def _chain(first: "Tensor", rest: "Iterator[Tensor]") -> "Iterator[Tensor]":
    yield first
    yield from rest
