"""Offline tasks from a run's held-out documents: bits per byte with gzip beside it, and a last-word cloze.

The functions below are what the YAML files in eval/tasks/heldout name. lm-eval calls the two `*_dataset`
functions with the task's metadata, so the same documents are reached by `lrnn eval`, which fills `data` in,
and by plain lm-eval:

    lm_eval --include_path eval/tasks --tasks heldout_cloze --metadata '{"data": "runs/demo/heldout.jsonl"}'

Everything is a pure function of the file: no randomness, the same passages in the same order every time.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

# As in `runs.layout`: this file is also copied beside the YAML files, and imports nothing of ours.
HELDOUT_NAME = "heldout.jsonl"
FOLDER_NAMES = (HELDOUT_NAME, "validation.jsonl")
MAX_BYTES = 20_000_000  # of text, read at most: a corpus' held-out share can be gigabytes
PASSAGE_CHARACTERS = 8192  # about 2,000 tokens of English; longer documents are scored in pieces

CLOZE_PASSAGES = 300
CLOZE_ENOUGH = 100  # other passages are taken only below this many whose answer occurs earlier
CLOZE_SENTENCES = 3
CLOZE_WORDS = (30, 100)
CLOZE_LETTERS = 4

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)")
_LAST_WORD = re.compile(rf" ([A-Za-z]{{{CLOZE_LETTERS},}})[.!?][\"')\]]*$")
_WORD = re.compile(r"[A-Za-z]+")


def heldout_path(data: str | Path | None = None, checkpoint: str | Path | None = None) -> Path:
    """The JSONL file of held-out documents.

    `data` is the file or its folder (a run, or what `lrnn prepare` wrote); without it, the file is that of
    the run of `checkpoint`. Raises ValueError, with what to pass, if there is none.
    """
    if data is not None:
        path = Path(data).expanduser()
        path = next((path / name for name in FOLDER_NAMES if (path / name).is_file()), path)
        if not path.is_file():
            raise ValueError(
                f'{data}: no such file of held-out documents (one {{"text": ...}} a line), nor a folder'
            )
        return path
    if checkpoint is not None:
        # `checkpoints/latest` is a link: the run is two folders above what it points to.
        path = Path(checkpoint).expanduser().resolve().parents[1] / HELDOUT_NAME
        if path.is_file():
            return path
    raise ValueError(
        "the heldout tasks need held-out documents: evaluate a checkpoint inside a run, or pass "
        "--data FILE.jsonl, such as runs/NAME/heldout.jsonl of the run that a tuned model began from"
    )


def read_documents(path: str | Path, max_bytes: int = MAX_BYTES) -> list[str]:
    """The non-empty texts of a JSONL file in order, up to the document that reaches `max_bytes` of text.

    Raises ValueError naming the line that cannot be read.
    """
    documents, size, number = [], 0, 0
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for line in lines:
                number += 1
                line = line.removeprefix("\ufeff")
                text = json.loads(line)["text"] if line.strip() else ""
                if text.strip():
                    documents.append(text)
                    size += len(text.encode())
                if size >= max_bytes:
                    break
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a UTF-8 text file") from None
    except UnicodeEncodeError:
        raise ValueError(f'{path}: "text" of line {number} holds half a surrogate pair') from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # ValueError: long numbers too
        raise ValueError(f'{path}: line {number} is not a JSON object with a string "text"') from None
    if not documents:
        raise ValueError(f"{path}: holds no documents")
    return documents


def cut(document: str, size: int = PASSAGE_CHARACTERS) -> list[str]:
    """A document in pieces of at most `size` characters; joined, they are the document.

    A piece ends after a line break in its second half, else after other white space there, else anywhere.
    """
    pieces, start = [], 0
    while len(document) - start > size:
        window = document[start : start + size]
        end = window.rfind("\n", size // 2) + 1
        if not end:
            end = max(window.rfind(space, size // 2) for space in " \t") + 1
        pieces.append(window[: end or size])
        start += len(pieces[-1])
    return [*pieces, document[start:]]


def heldout_dataset(
    data: str | None = None, pretrained: str | None = None, **_metadata: Any
) -> "dict[str, datasets.Dataset]":
    """Held-out passages in file order, for `heldout_bits_per_byte`: rows of index and text.

    `data` and `pretrained` (the checkpoint) are lm-eval's metadata; other metadata is ignored.
    """
    documents = read_documents(heldout_path(data, pretrained))
    passages = [piece for document in documents for piece in cut(document)]
    return _test_split([{"index": i, "text": text} for i, text in enumerate(passages)])


def score_passage(doc: dict[str, Any], results: Sequence[float]) -> dict[str, Any]:
    """One passage's part of each metric, from its log-likelihood in nats after BOS.

    Words are what white space separates, as in lm-eval's wikitext task.
    """
    (loglikelihood,) = results
    words, size = len(re.split(r"\s+", doc["text"])), len(doc["text"].encode())
    return {
        "bits_per_byte": (loglikelihood, size),
        "byte_perplexity": (loglikelihood, size),
        "word_perplexity": (loglikelihood, words),
        "gzip_bits_per_byte": (doc["index"], doc["text"]),
    }


def gzip_bits_per_byte(passages: Sequence[tuple[int, str]]) -> float:
    """Bits per byte that `gzip -9` reaches on (index, text) passages joined in order: one stream, level 9."""
    text = "".join(text for _, text in sorted(passages)).encode()
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)


def cloze_dataset(
    data: str | None = None, pretrained: str | None = None, **_metadata: Any
) -> "dict[str, datasets.Dataset]":
    """Passages whose final word is asked, for `heldout_cloze`: rows of context, answer (" word"), repeated.

    As in LAMBADA, the answer should occur earlier in the passage: other passages are added only up to
    CLOZE_ENOUGH in all. At most CLOZE_PASSAGES, ordered by a hash of their text: then the first n are a fair
    sample for any n.
    """
    path = heldout_path(data, pretrained)
    documents = read_documents(path)
    found = {row["context"]: row for text in documents for row in _cloze_passages(text)}
    rows = sorted(found.values(), key=lambda row: hashlib.sha256(row["context"].encode()).digest())
    repeated = [row for row in rows if row["repeated"]]
    others = [row for row in rows if not row["repeated"]]
    chosen = repeated[:CLOZE_PASSAGES] + others[: max(0, CLOZE_ENOUGH - len(repeated))]
    if not chosen:
        few, many = CLOZE_WORDS
        raise ValueError(
            f"{path}: heldout_cloze, of the tag heldout, takes passages of {CLOZE_SENTENCES} sentences and "
            f"{few} to {many} words, and its {len(documents)} documents have none\n"
            "Hold out more or longer text, or ask for heldout_bits_per_byte alone"
        )
    taken = {row["context"] for row in chosen}
    return _test_split([row for row in rows if row["context"] in taken])


def _cloze_passages(document: str) -> Iterator[dict[str, Any]]:
    """Passages of a document: whole sentences without the final word.

    From each sentence on, take the shortest passage whose answer occurs in it, and go on after it. If there
    is none, take the shortest passage at all, unless it overlaps another such.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(document + "\n")]
    starts = [0, *ends[:-1]]
    first = free = 0
    while first < len(ends):
        fits = []
        for last in range(first + CLOZE_SENTENCES - 1, len(ends)):
            passage = document[starts[first] : ends[last]].strip()
            if len(passage.split()) > CLOZE_WORDS[1]:
                break
            if row := _cloze_row(passage):
                fits.append((last + 1, row))
        after, row = next(((after, row) for after, row in fits if row["repeated"]), (None, None))
        if row is not None:
            yield row
            first = free = after
            continue
        if fits and first >= free:
            free, row = fits[0]
            yield row
        first += 1


def _cloze_row(passage: str) -> dict[str, Any] | None:
    """The passage without its final word, and that word; None if too short or without a plain last word."""
    match = _LAST_WORD.search(passage)
    if not match or len(passage.split()) < CLOZE_WORDS[0]:
        return None
    context, word = passage[: match.start()], match[1]
    earlier = {other.casefold() for other in _WORD.findall(context)}
    return {"context": context, "answer": f" {word}", "repeated": word.casefold() in earlier}


def _test_split(rows: list[dict[str, Any]]) -> "dict[str, datasets.Dataset]":
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
