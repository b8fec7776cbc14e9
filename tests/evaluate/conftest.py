"""A tiny random language model, its tokenizer and a made-up run to evaluate: nothing is downloaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import byte_tokenizer

_GARDEN = (
    "The gardener walked to the river every morning. She carried two buckets and a long rope. When the sun "
    "rose the water was still cold, and nobody else came near the river.\n\nLater in the day she watered the "
    "roses, the beans and the young trees behind the old stone house. Her neighbour asked what she liked. "
    "She pointed at the roses."
)
_COMPILER = (
    "A compiler reads a program and writes another program. The first program is called the source. The "
    "second one is called the target, and it should do what the source says. Nobody wants a compiler that "
    "changes the source."
)
_ROAD = (
    "Story number {0} is about a traveller who met {0} strangers on the road. They shared bread, water and "
    "an old blanket. In the evening the strangers told tales of the {0} hills. The traveller thanked the "
    "strangers."
)
_BYTES = "Ünïcode — naïve façade, 数学, and an emoji 🙂 to count bytes rather than characters.\n"
DOCUMENTS = [_GARDEN, _COMPILER, "Short one.", _BYTES, *(_ROAD.format(i) for i in range(12))]


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE with BOS and EOS that adds neither by itself."""
    return byte_tokenizer(DOCUMENTS, 400)


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, tokenizer, write_documents) -> Callable[[str, int, Any], Path]:
    """A run with held-out documents and one checkpoint, of this model; returns the checkpoint's folder."""

    def make(name: str, step: int, model: Any) -> Path:
        run = tmp_path_factory.mktemp("runs") / name
        folder = run / "checkpoints" / f"step-{step:08d}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (run / "checkpoints" / "latest").symlink_to(folder.name)
        write_documents(run / "heldout.jsonl")
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoint(make_run, tokenizer) -> Path:
    """The checkpoint of runs/tiny, of another library's model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    return make_run("tiny", 20, LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def loaded(checkpoint):
    from lrnn_lm.runs.load import load_checkpoint

    return load_checkpoint(checkpoint, "cpu")


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """An empty file in place of each picture, which takes half a second to draw."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return list(DOCUMENTS)


@pytest.fixture(scope="session")
def write_documents():
    """A function (path, documents) that writes held-out JSONL and returns the path."""

    def write(path: Path, documents: list[str] = DOCUMENTS) -> Path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        return path

    return write
