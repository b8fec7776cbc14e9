"""Long text to the tokens of the whole text, window by window, in the memory of one window."""

import bisect
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding

WINDOW = 100_000  # characters tokenised at once: a tokenizer needs many times the text's memory
OVERLAP = 1_000  # characters that two windows share
_MARGIN = 4  # windows are joined at least a quarter of the overlap away from their ends
# A window's start in the whole text, its tokens, and the range [first, last + 1) of those that count.
Part = tuple[int, "Encoding", int, int]


class _Window:
    """An encoded part of a text, a sequence of token starts: begins at character `base`, at token `first`.

    Starts are looked up one by one: a list of all would cost as much as tokenising.
    """

    def __init__(self, text: str, base: int, encode: Callable[[str], "Encoding"]) -> None:
        self.text, self.base, self.first = text, base, 0
        self.end = base + len(text)
        self._encoding = encode(text)

    def __len__(self) -> int:
        return len(self._encoding) - self.first

    def __getitem__(self, token: int) -> int:
        """Where a token starts in the whole text; increases with the token."""
        return self.base + self._encoding.token_to_chars(self.first + token)[0]

    def between(self, low: int, high: int) -> set[int]:
        """The token starts from low to high."""
        tokens = range(bisect.bisect_left(self, low), bisect.bisect_right(self, high))
        return {self[token] for token in tokens}

    def part(self, before: int | None = None) -> Part:
        """The tokens that start before a place of the whole text; None: all."""
        stop = len(self) if before is None else bisect.bisect_left(self, before)
        return self.base, self._encoding, self.first, self.first + stop


def encode_stream(texts: Iterable[str], encode: Callable[[str], "Encoding"]) -> Iterator[list[int]]:
    """Token ids of all texts as one text, in pieces."""
    for _, encoding, first, stop in encode_windows(texts, encode):
        yield encoding.ids[first:stop]


def encode_windows(texts: Iterable[str], encode: Callable[[str], "Encoding"]) -> Iterator[Part]:
    """The tokens of all texts as one text, in pieces.

    A window begins inside the one before, at a token. The two are joined where a token starts in both, away
    from their ends: there a cut elsewhere has no effect, nor has what a tokenizer does to the beginning of a
    text (Llama 2's puts a space before it). If they agree nowhere, as in a run of spaces longer than the
    overlap, the window before is tokenised again together with the text after it. Only a run longer than
    that is cut.
    """
    window: _Window | None = None  # the last one, whose tokens are not yielded yet
    for text in _merged(texts, 2 * OVERLAP):
        if window is None:
            window = _Window(text, 0, encode)
            continue
        for begin in _beginnings(window):
            after = _Window(window.text[begin - window.base :] + text, begin, encode)
            low, high = begin + OVERLAP // _MARGIN, window.end - OVERLAP // _MARGIN
            if shared := window.between(low, high) & after.between(low, high):
                break
        if shared:
            yield window.part(before=max(shared))
            after.first = bisect.bisect_left(after, max(shared))
        else:
            yield window.part()
            after = _Window(text, window.end, encode)
        window = after
    if window is not None:
        yield window.part()


def _beginnings(window: _Window) -> list[int]:
    """Where the next window may begin: at the last token before the overlap, or at this window's first."""
    if not len(window):
        return [window.base]
    near = window[max(bisect.bisect_right(window, window.end - OVERLAP) - 1, 0)]
    return [near, window[0]] if near > window[0] else [window[0]]


def _merged(texts: Iterable[str], length: int) -> Iterator[str]:
    """The same text in pieces of at least this many characters, except for the last."""
    whole = ""
    for text in texts:
        whole += text
        if len(whole) >= length:
            yield whole
            whole = ""
    if whole:
        yield whole
