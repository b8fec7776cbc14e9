"""LAMBADA, BLiMP and WikiText from local files: what the YAML files in eval/tasks/offline name.

Prompts, metrics and aggregation are those of lm-eval's own tasks; only the documents come from a folder that
`lrnn eval --data DIR` (or lm-eval's metadata `data`) names:

    DIR/lambada_openai.jsonl    {"text": passage} a line
    DIR/blimp/PARADIGM.jsonl    {"sentence_good": .., "sentence_bad": ..} a line; any of the 67 paradigms
    DIR/wikitext2_test.txt      WikiText as it is distributed, articles under ` = Title = `
"""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

LAMBADA, BLIMP, WIKITEXT = "lambada_openai.jsonl", "blimp", "wikitext2_test.txt"


def lambada_dataset(data: str | None = None, **_metadata: Any) -> "dict[str, datasets.Dataset]":
    """Passages whose last word is asked. ValueError if the file is missing or a line cannot be read."""
    path = _find(data, LAMBADA)
    return _split("test", list(_rows(path, ("text",))), path)


def blimp_dataset(data: str | None = None, **_metadata: Any) -> "dict[str, datasets.Dataset]":
    """Minimal pairs of all paradigms that are there, taking turns, so that the first n are a fair sample."""
    folder = _find(data, BLIMP)
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder}: holds no PARADIGM.jsonl")
    paradigms = []
    for file in files:
        rows = _rows(file, ("sentence_good", "sentence_bad"))
        paradigms.append([{"paradigm": file.stem, **row} for row in rows])
    turns = [row for turn in zip_longest(*paradigms) for row in turn if row is not None]
    return _split("validation", turns, folder)


def score_pair(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Whether the good sentence is the likelier: for its paradigm, and for the mean over paradigms."""
    good, bad = (loglikelihood for loglikelihood, _ in results)
    hit = float(good >= bad)
    return {"acc": (doc["paradigm"], hit), f"acc_{doc['paradigm']}": hit}


def mean_over_paradigms(scores: Sequence[tuple[str, float]]) -> float:
    """Accuracy with each paradigm counting the same, as upstream's group `blimp` has it."""
    by_paradigm: dict[str, list[float]] = {}
    for paradigm, hit in scores:
        by_paradigm.setdefault(paradigm, []).append(hit)
    return statistics.fmean(statistics.fmean(hits) for hits in by_paradigm.values())


def error_of_the_mean(scores: dict[str, Any]) -> None:
    """Fill in the standard error of offline_blimp's `acc`, which lm-eval has for its own aggregations only.

    As upstream has it for the group: sqrt(sum of squared errors) / number of paradigms. It stays "N/A" where
    a paradigm has none, as with a single pair.
    """
    own = "acc_stderr,none"
    errors = [scores[key] for key in scores if key.endswith("_stderr,none") and key != own]
    if errors and all(isinstance(error, float) for error in errors):
        scores[own] = math.hypot(*errors) / len(errors)


def wikitext_dataset(data: str | None = None, **_metadata: Any) -> "dict[str, datasets.Dataset]":
    """Articles, each one page."""
    path = _find(data, WIKITEXT)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a UTF-8 text file") from None
    return _split("test", [{"page": page} for page in pages(text)], path)


def pages(text: str) -> Iterator[str]:
    """WikiText cut before each article's title, a line ` = Title = `; a section's is ` = = Title = = `."""
    lines: list[str] = []
    for line in text.split("\n"):
        words = line.split()
        titled = len(words) > 2 and words[0] == words[-1] == "=" and "=" not in (words[1], words[-2])
        if titled and any(kept.strip() for kept in lines):
            yield "\n".join(lines)
            lines = []
        elif titled:
            lines = []
        lines.append(line)
    if any(kept.strip() for kept in lines):
        yield "\n".join(lines)


def _find(data: str | None, name: str) -> Path:
    """A file or folder below the one that `--data` names; ValueError says what is missing."""
    if data is None:
        raise ValueError(f"the offline tasks read local files: pass --data DIR, a folder that holds {name}")
    path = Path(data).expanduser() / name
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder (--data takes the folder that holds {name})")
    return path


def _rows(path: Path, keys: tuple[str, ...]) -> Iterator[dict[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON leaves as it is
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
        if not found or not all(isinstance(text, str) for text in found.values()):
            wanted = ", ".join(f'"{key}"' for key in keys)
            raise ValueError(f"{path}: line {number} is not a JSON object with texts {wanted}")
        yield found


def _split(name: str, rows: list[dict[str, Any]], path: Path) -> "dict[str, datasets.Dataset]":
    from datasets import Dataset

    if not rows:
        raise ValueError(f"{path}: holds no documents")
    return {name: Dataset.from_list(rows)}
