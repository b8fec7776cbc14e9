"""Documents to tokens, in several processes, in order.

A document becomes first + tokens + last: `first` is the tokenizer's BOS (EOS if it has none), `last` its EOS.
So the end of a document is a target of the loss, and the start of the next one is not.
"""

import multiprocessing
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from .specs import DataError
from .tokenize import TokenizerFacts, load_backend, no_token_told
from .windows import WINDOW, Part, encode_windows

if TYPE_CHECKING:
    from tokenizers import Encoding

BATCH_CHARS = 250_000  # text handed to a process at once
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_Encoded = list[npt.NDArray[np.uint32]]
T = TypeVar("T")


class Encoder:
    """Text to ids (n,) uint32 with the document's first and last token."""

    def __init__(self, folder: Path, facts: TokenizerFacts) -> None:
        self._tokenizer = load_backend(folder)
        self._facts = facts

    def __call__(self, text: str) -> npt.NDArray[np.uint32]:
        with no_token_told(text):
            ids = [encoding.ids[first:stop] for _, encoding, first, stop in self._parts(text)]
        parts = [[self._facts.first], *ids, [self._facts.last]]
        return np.concatenate([np.asarray(part, np.uint32) for part in parts])

    def bytes_of(self, text: str, count: int) -> int:
        """Bytes of UTF-8 that the first `count` ids of a document spell; the first and last token spell none.

        Exact even inside a character whose bytes are several tokens: their offsets are all the whole one's.
        """
        count -= 1  # the document's first token
        self._tokenizer.post_processor = None  # GPT-2's leaves spaces out of the offsets
        for base, encoding, first, stop in self._parts(text):
            if count <= 0:
                return 0
            if count <= stop - first:
                return len(text[:base].encode()) + _bytes_of(encoding, text[base:], first + count)
            count -= stop - first
        return len(text.encode())

    def _parts(self, text: str) -> Iterator[Part]:
        encode = partial(self._tokenizer.encode, add_special_tokens=False)
        if len(text) <= WINDOW:
            encoding = encode(text)
            return iter([(0, encoding, 0, len(encoding))])
        return encode_windows((text[start : start + WINDOW] for start in range(0, len(text), WINDOW)), encode)


def _bytes_of(encoding: "Encoding", text: str, count: int) -> int:
    """Bytes of `text` that the first `count` > 0 tokens of its encoding spell."""
    offsets = encoding.offsets
    first = count  # the first token that shares its character with the token after the counted ones
    while 0 < first < len(offsets) and offsets[first][0] < offsets[first - 1][1]:
        first -= 1
    if first == count:
        return len(text[: offsets[count - 1][1]].encode())
    # A token that holds part of a character is `<0xE6>`, or byte-level: a letter for each of its bytes. What
    # else shares a character is the blank that a tokenizer puts before a text: U+2581 in Llama 2's, U+0120 in
    # byte-level ones, alone or with the first bytes.
    tokens = [
        token if text[start] == " " else token.removeprefix("\u0120")
        for token, (start, _) in zip(encoding.tokens[first:count], offsets[first:count], strict=True)
        if token != "\u2581"
    ]
    sizes = [1 if _BYTE.fullmatch(token) else len(token) for token in tokens]
    return len(text[: offsets[first][0]].encode()) + sum(sizes)


def encode_documents(
    documents: Iterable[tuple[str, T]], folder: Path, facts: TokenizerFacts, num_proc: int | None
) -> Iterator[tuple[str, T, npt.NDArray[np.uint32]]]:
    """(text, tag) pairs to (text, tag, ids), in the same order for any number of processes.

    Only a few batches are in flight, so memory does not grow with the text. Raises DataError if a process
    dies.
    """
    workers = num_proc or _cores()
    if workers == 1:
        encoder = Encoder(folder, facts)
        for text, tag in documents:
            yield text, tag, encoder(text)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),  # a spawned one would import torch first
        initializer=_start_worker,
        initargs=(folder, facts),
    )
    try:
        in_flight: deque[tuple[list[tuple[str, T]], Future[_Encoded]]] = deque()
        for batch in _batches(documents):
            in_flight.append((batch, pool.submit(_encode_batch, [text for text, _ in batch])))
            if len(in_flight) > 2 * workers:
                yield from _collect(*in_flight.popleft())
        for entry in in_flight:
            yield from _collect(*entry)
    except BrokenProcessPool:
        raise DataError(
            f"a tokenising process was killed (out of memory?); use fewer than {workers} with data.num_proc"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """Cores that this process may use (in a job, its share), at most 32."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 32)


def _collect(
    batch: list[tuple[str, T]], future: Future[_Encoded]
) -> Iterator[tuple[str, T, npt.NDArray[np.uint32]]]:
    for (text, tag), ids in zip(batch, future.result(), strict=True):
        yield text, tag, ids


def _batches(documents: Iterable[tuple[str, T]]) -> Iterator[list[tuple[str, T]]]:
    batch: list[tuple[str, T]] = []
    chars = 0
    for text, tag in documents:
        batch.append((text, tag))
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


_encoder: Encoder | None = None  # a tokenising process's own


def _start_worker(folder: Path, facts: TokenizerFacts) -> None:
    """Set up a tokenising process: it ignores Ctrl-C, which its parent handles, and ends with its parent."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _encoder = Encoder(folder, facts)


def _encode_batch(texts: list[str]) -> _Encoded:
    assert _encoder is not None
    return [_encoder(text) for text in texts]
