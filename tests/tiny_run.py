"""A run of seconds for the trainer's tests: a little text, a tokenizer, 12 steps of 8 rows of 64 tokens.

Also: running it as a process of its own, and looking at what it left.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
LAST = f"checkpoints/step-{STEPS:08d}"
TOKENS_PER_STEP = 512
TEXT = (
    "the state of a linear recurrence mixes what it has read with what it reads now and so the block keeps "
    "values gates tokens documents in order while rows cross from one shard to another without a seam"
)


def write_recipe(folder: Path, documents: int = 150, **sections: Any) -> Path:
    """A text, a tokenizer recipe and a run recipe in `folder`; `sections` are merged into the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer.yaml"
    if not text.exists():
        rng = random.Random(0)
        texts = (" ".join(rng.choices(TEXT.split(), k=rng.randint(20, 120))) for _ in range(documents))
        text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        tokenizer.write_text("{model_type: bpe, vocab_size: 320}\n")
    recipe: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "mixer": {"type": "bd_lru", "num_blocks": 8, "block_size": 2},
        },
        "data": {
            "source": {"type": "jsonl", "path": str(text)},
            "validation_fraction": 0.1,
            "tokenizer": str(tokenizer),
            "sequence_length": 64,
            "cache_dir": str(folder / "cache"),
            "num_proc": 1,
        },
        "optim": {"lr": 0.01, "warmup": "10%"},
        "train": {
            "tokens": STEPS * TOKENS_PER_STEP,
            "tokens_per_step": TOKENS_PER_STEP,
            "micro_batch": 8,
            "device": "cpu",
            "runs_dir": str(folder / "runs"),
        },
        "checkpoint": {"every": "4 steps", "keep_last": 2},
        "eval": {"every": "5 steps", "tokens": 512},
    }
    for section, keys in sections.items():
        recipe[section] = {**recipe[section], **keys} if isinstance(keys, dict) else keys
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def environment() -> dict[str, str]:
    """Of a process: this checkout first, one thread, no network asked."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(recipe: Path, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    """`lrnn train` as a process of its own, with these variables in its environment.

    It imports torch and transformers, which takes seconds: `Forked` does not.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "lrnn_lm.cli", "train", str(recipe), *overrides],
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    """Exit code and stderr."""
    errors = process.communicate(timeout=timeout)[1]
    return process.returncode, errors


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprint(checkpoint: Path) -> dict[str, str]:
    """sha256 of all that a resumed run must have in common with an undisturbed one."""
    names = ("model.safetensors", "trainer/optimizer.safetensors", "trainer/rng-00000.safetensors",
             "trainer/rng-00000.json", "trainer/state.json")  # fmt: skip
    return {name: sha256(checkpoint / name) for name in names}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every training line, as it stands in the file."""
    return [(line["step"], line["loss"]) for line in metrics(run) if "loss" in line]


def validations(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["validation_loss"]) for line in metrics(run) if "validation_loss" in line]


def assert_same_run(run: Path, straight: Path) -> None:
    """The same lines and the same bits as the undisturbed run."""
    assert losses(run) == losses(straight)
    assert validations(run) == validations(straight)
    assert fingerprint(run / LAST) == fingerprint(straight / LAST)
