"""Long text to tokens, window by window: the tokens of the whole text, in memory for one window."""

import bisect
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding

WINDOW = 100_000  # characters tokenised at once; a tokenizer needs many times the text's memory
OVERLAP = 1_000  # characters that two windows share
_MARGIN = 4  # two windows are joined no nearer to the end of either than a quarter of the overlap
# Where in the whole text a window begins, its tokens, and the first and the last + 1 of those that count.
Part = tuple[int, "Encoding", int, int]


class _Window:
    """An encoded part of a text that begins at character `base`, from its token `first` on.

    Where tokens start is looked up one by one: a list of all starts would cost as much as tokenising.
    """

    def __init__(self, text: str, base: int, encode: Callable[[str], "Encoding"]) -> None:
        self.text, self.base, self.first = text, base, 0
        self.end = base + len(text)
        self._encoding = encode(text)

    def __len__(self) -> int:
        return len(self._encoding) - self.first

    def __getitem__(self, token: int) -> int:
        """Where a token starts in the whole text; ascending."""
        return self.base + self._encoding.token_to_chars(self.first + token)[0]

    def from_(self, place: int) -> str:
        """The text from a place of the whole on."""
        return self.text[place - self.base :]

    def between(self, low: int, high: int) -> set[int]:
        """The starts in low .. high."""
        return {
            self[token] for token in range(bisect.bisect_left(self, low), bisect.bisect_right(self, high))
        }

    def part(self, before: int | None = None) -> Part:
        """The tokens that start before a place of the whole text; None: all."""
        stop = len(self) if before is None else bisect.bisect_left(self, before)
        return self.base, self._encoding, self.first, self.first + stop

    def begin_at(self, place: int) -> None:
        """Leave out the tokens that start before a place."""
        self.first += bisect.bisect_left(self, place)


def encode_stream(texts: Iterable[str], encode: Callable[[str], "Encoding"]) -> Iterator[list[int]]:
    """Token ids of all texts as one text, as they come."""
    for _, encoding, first, stop in encode_windows(texts, encode):
        yield encoding.ids[first:stop]


def encode_windows(texts: Iterable[str], encode: Callable[[str], "Encoding"]) -> Iterator[Part]:
    """The tokens of all texts as one text, as they come.

    A window begins inside the one before, at a token. The two are joined where a token starts in both, away
    from their ends: text cut off elsewhere does not matter there, nor what a tokenizer does to the beginning
    of a text (Llama 2's puts a space before it). Where they agree nowhere, as in a run of spaces longer than
    the overlap, the window before is read again with the text after it; only a run longer than that is cut.
    """
    window: _Window | None = None  # its tokens are not given away yet
    for text in _merged(texts, 2 * OVERLAP):
        if window is None:
            window = _Window(text, 0, encode)
            continue
        for begin in _beginnings(window):
            after = _Window(window.from_(begin) + text, begin, encode)
            low, high = begin + OVERLAP // _MARGIN, window.end - OVERLAP // _MARGIN
            if shared := window.between(low, high) & after.between(low, high):
                break
        if shared:
            yield window.part(before=max(shared))
            after.begin_at(max(shared))
        else:
            yield window.part()
            after = _Window(text, window.end, encode)
        window = after
    if window is not None:
        yield window.part()


def _beginnings(window: _Window) -> list[int]:
    """Where the next window may begin: at the last token before the overlap, or where this one's tokens
    do.
    """
    if not len(window):
        return [window.base]
    near = window[max(bisect.bisect_right(window, window.end - OVERLAP) - 1, 0)]
    return [near, window[0]] if near > window[0] else [window[0]]


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
