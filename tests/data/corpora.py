"""Small corpora that the data tests write."""

import json
import random
from pathlib import Path

from lrnn_lm.data import DataSpec, SourceSpec
from lrnn_lm.data.sources import documents

TEXT = """the state of a linear recurrence mixes what it has read with what it reads now and so the block
keeps values gates tokens documents in order while rows cross from one shard to another without a seam"""


def make_texts(count: int, seed: int = 0, words: int = 80) -> list[str]:
    """Different little English-like texts, with the white space that tokenizers tend to lose."""
    rng = random.Random(seed)
    words_of_text = TEXT.split()
    texts = []
    for k in range(count):
        body = " ".join(rng.choice(words_of_text) for _ in range(rng.randint(words // 4, words)))
        texts.append(f"Document {seed}.{k}\n\n    {body}.\n\tindented {rng.random():.6f}\n")
    return texts


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_recipe(path: Path, **keys: object) -> Path:
    recipe = {"model_type": "bpe", "vocab_size": 400, **keys}
    path.write_text("".join(f"{key}: {value}\n" for key, value in recipe.items()), encoding="utf-8")
    return path


def read(type: str, path: Path | str, **keys: object) -> list[str]:
    """All documents of a source."""
    return list(documents(SourceSpec(type=type, path=str(path), **keys)))


def leftovers(spec: DataSpec) -> list[str]:
    """Everything in the cache that is neither a lock nor a finished folder."""
    found = [p for kind in ("data", "tokenizers") for p in (Path(spec.cache_dir) / kind).glob("*")]
    finished = ("manifest.json", "tokenizer.json")
    return [
        p.name for p in found if p.suffix != ".lock" and not any((p / name).is_file() for name in finished)
    ]
