"""LAMBADA, BLiMP and WikiText from local files: what the YAML files beside this one name with `!function`.

Prompts, metrics and aggregation are those of lm-eval's own tasks; the documents are in the folder that
`lrnn eval --data DIR` (or lm-eval's metadata `data`) names:

    DIR/lambada_openai.jsonl    {"text": passage} a line
    DIR/blimp/PARADIGM.jsonl    {"sentence_good": .., "sentence_bad": ..} a line; any of the 67 paradigms
    DIR/wikitext2_test.txt      WikiText as distributed, articles under ` = Title = `
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

if TYPE_CHECKING:
    import datasets

__all__ = ["process_results", "wikitext_detokenizer"]  # lm-eval's own, which its YAML files name too

LAMBADA, BLIMP, WIKITEXT = "lambada_openai.jsonl", "blimp", "wikitext2_test.txt"


def lambada_dataset(data: str | None = None, **_metadata: Any) -> "dict[str, datasets.Dataset]":
    """Passages whose last word is asked; ValueError if the file is missing or a line is wrong."""
    path = _find(data, LAMBADA)
    rows = [{"text": row["text"].strip()} for row in _rows(path, ("text",))]  # the answer is what ends it
    if short := [row["text"] for row in rows if " " not in row["text"]]:
        raise ValueError(f"{path}: a passage needs a space before its last word, unlike {short[0][:40]!r}")
    return _split("test", rows, path)


def blimp_dataset(data: str | None = None, **_metadata: Any) -> "dict[str, datasets.Dataset]":
    """Minimal pairs of all paradigms found, in turn, so that the first n are a fair sample."""
    folder = _find(data, BLIMP)
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder}: holds no PARADIGM.jsonl")
    keys = ("sentence_good", "sentence_bad")
    paradigms = [[{"paradigm": file.stem, **row} for row in _rows(file, keys)] for file in files]
    turns = [row for turn in zip_longest(*paradigms) for row in turn if row is not None]
    return _split("validation", turns, folder)


def score_pair(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Whether the good sentence is more likely: for its paradigm, and for the mean over paradigms."""
    good, bad = (loglikelihood for loglikelihood, _ in results)
    hit = float(good >= bad)
    return {"acc": (doc["paradigm"], hit), f"acc_{doc['paradigm']}": hit}


def mean_over_paradigms(scores: Sequence[tuple[str, float]]) -> float:
    """Accuracy with equal weight for each paradigm, as in lm-eval's group `blimp`."""
    by_paradigm: dict[str, list[float]] = {}
    for paradigm, hit in scores:
        by_paradigm.setdefault(paradigm, []).append(hit)
    return statistics.fmean(statistics.fmean(hits) for hits in by_paradigm.values())


def wikitext_dataset(data: str | None = None, **_metadata: Any) -> "dict[str, datasets.Dataset]":
    """Articles, each one page."""
    path = _find(data, WIKITEXT)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a UTF-8 text file") from None
    return _split("test", [{"page": page} for page in pages(text)], path)


def pages(text: str) -> Iterator[str]:
    """WikiText cut before each article's title ` = Title = ` (a section's is ` = = Title = = `)."""
    articles: list[list[str]] = [[]]
    for line in text.split("\n"):
        words = line.split()
        if len(words) > 2 and words[0] == words[-1] == "=" and "=" not in (words[1], words[-2]):
            articles.append([])
        articles[-1].append(line)
    pages = ("\n".join(lines) for lines in articles)
    return (page for page in pages if page.strip())


def _find(data: str | None, name: str) -> Path:
    """A file or folder in the one that `--data` names; ValueError if it is missing."""
    if data is None or Path(data).expanduser().is_file():  # without --data, the run's held-out documents
        raise ValueError(f"the offline tasks read local files: pass --data DIR, a folder that holds {name}")
    path = Path(data).expanduser() / name
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder (--data takes the folder that holds {name})")
    return path


def _rows(path: Path, keys: tuple[str, ...]) -> Iterator[dict[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut JSON at U+2028
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a UTF-8 text file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found = {key: row[key] for key in keys}
        except (json.JSONDecodeError, KeyError, TypeError):
            found = {}
        if not found or not all(isinstance(text, str) and text.strip() for text in found.values()):
            names = ", ".join(f'"{key}"' for key in keys)
            raise ValueError(f"{path}: line {number} is not a JSON object with texts {names}, none empty")
        yield found


def _split(name: str, rows: list[dict[str, Any]], path: Path) -> "dict[str, datasets.Dataset]":
    from datasets import Dataset

    if not rows:
        raise ValueError(f"{path}: holds no documents")
    return {name: Dataset.from_list(rows)}
