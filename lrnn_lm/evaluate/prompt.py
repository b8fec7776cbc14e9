"""A prompt to token ids: a text at once, or a file of any length in pieces."""

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.tokenize import no_token_told
from ..data.windows import WINDOW, encode_stream
from ..files import user_path
from ..runs.load import check_window

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

    from tokenizers import Encoding


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Token ids of a document start (BOS, or EOS for a tokenizer without BOS) and a prompt.

    Raises ValueError if the prompt is empty and the tokenizer has neither.
    """
    return [token for ids in stream_ids(tokenizer, [prompt] if prompt else []) for token in ids]


def stream_ids(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of a document start and of all texts as one, in pieces.

    Raises ValueError if there is no text and no token to start a document with.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    begun = False
    for ids in _encode(tokenizer, texts):
        if not ids:
            continue
        if not begun and start is not None:
            yield [start]
        begun = True
        yield ids
    if not begun:
        if start is None:
            raise ValueError("the tokenizer has no token to start a document with: pass a prompt")
        yield [start]


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of texts as one text. As in training, the spelling of a control token is plain text."""
    if not tokenizer.is_fast:  # no offsets, which reading in pieces needs
        yield tokenizer.encode("".join(texts), add_special_tokens=False, split_special_tokens=True)
        return

    def encode(text: str) -> "Encoding":
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        with no_token_told(text):
            return tokenizer(text, **options).encodings[0]

    yield from encode_stream(texts, encode)


def read_text(file: str | Path) -> Iterator[str]:
    """The text of a file or a pipe in pieces, without a byte order mark.

    Raises ValueError if it cannot be read or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done = 0  # bytes read
    try:
        with user_path(file).open("rb") as stream:
            while data := stream.read(WINDOW):
                done += len(data)
                yield decoder.decode(data)
        yield decoder.decode(b"", final=True)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such prompt file") from None
    except UnicodeDecodeError as error:
        at = done - len(error.object) + error.start
        raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {at})") from None
    except OSError as error:
        raise ValueError(f"{file}: the prompt file cannot be read ({error.strerror or error})") from None


def read_prompt(
    model: "PreTrainedModel", stream: Iterable[list[int]], segment: int, more: int = 0
) -> "tuple[Cache | None, Tensor, int]":
    """Feed all but the last token of a stream to the model, `segment` tokens at a time.

    Raises ValueError as soon as the stream and `more` tokens after it exceed the model's positions.

    Returns:
        the cache (None if there was only one token), the last token (1, 1), and the number of tokens.
    """
    import torch

    from ..model import prefill
    from ..model.cache import CACHE

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
    cache = None if first is None else getattr(prefill(model, chain([first], source), segment), CACHE)
    return cache, torch.tensor([rest[-1:]], device=model.device), count
