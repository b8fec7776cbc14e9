"""TRL's SFTTrainer: however it packs or pads, each example's logits are those of the example alone."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from small_models import OF_EACH_STATE, VOCAB, close, in_turn, small_model
from tolerances import TOLERANCE
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lrnn_lm.recipe import shipped
from tokenizers import Tokenizer, models, pre_tokenizers

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'lrnn-lm[finetune]'")
LENGTHS = (3, 9, 5, 12, 4, 7, 6, 2)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [*SPECIAL, *(f"w{i}" for i in range(VOCAB - len(SPECIAL)))]
WAYS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 24},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
    "padding-free": {"padding_free": True, "max_length": None},
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    template = shipped("tokenizers/chat.jinja").read_text()
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, **names)


def sentences() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(len(SPECIAL), VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    return [" ".join(WORDS[i] for i in row) for row in ids]


def trainer(name: str, folder, rows: dict[str, list], **options) -> "trl.SFTTrainer":
    arguments = trl.SFTConfig(
        folder, max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", logging_steps=1, learning_rate=1e-2, disable_tqdm=True, **options,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=small_model(name), args=arguments, train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )  # fmt: skip


def examples(batch: dict[str, Tensor]) -> list[tuple[int, slice]]:
    """Where in a batch each example lies."""
    B, T = batch["input_ids"].shape
    if "position_ids" in batch:
        begins = [(b, t) for b in range(B) for t in range(T) if batch["position_ids"][b, t] == 0]
        ends = [*begins[1:], (B, 0)]
        return [
            (b, slice(t, end if row == b else T)) for (b, t), (row, end) in zip(begins, ends, strict=True)
        ]
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert torch.equal(batch["attention_mask"], (torch.arange(T) < torch.tensor(lengths).unsqueeze(1)).long())
    return [(b, slice(0, n)) for b, n in enumerate(lengths)]


def compare(sft: "trl.SFTTrainer") -> None:
    """Logits of every example of the first batch, and the batch's loss, against the examples alone."""
    batch = next(iter(sft.get_train_dataloader()))
    model, nats, targets = sft.model.eval(), 0.0, 0
    got = model(**batch)
    assert len(examples(batch)) > 1
    for b, where in examples(batch):
        alone = model(batch["input_ids"][b : b + 1, where]).logits[0]
        close(got.logits[b, where], alone, TOLERANCE["other order of sums"])
        label = batch["labels"][b, where][1:]
        nats += torch.nn.functional.cross_entropy(alone[:-1], label, reduction="sum")
        targets += int((label != -100).sum())
    assert targets
    close(got.loss, nats / targets, TOLERANCE["other order of sums"])


@torch.no_grad()
@pytest.mark.parametrize(("name", "way"), in_turn(list(WAYS), OF_EACH_STATE))
def test_examples_as_alone(name, way, tmp_path):
    compare(trainer(name, tmp_path, {"text": sentences()}, **WAYS[way]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["bd_lru", "attention", "hybrid"])
@pytest.mark.parametrize("way", ["padded", "packed", "padding-free"])
def test_loss_of_answers_only(name, way, tmp_path):
    """Targets are the assistant's words: no question, no padding, nothing across examples."""
    texts = sentences()
    pairs = zip(texts[::2], texts[1::2], strict=True)
    rows = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    sft = trainer(name, tmp_path, {"messages": rows}, assistant_only_loss=True, **WAYS[way])
    compare(sft)
    batch = next(iter(sft.get_train_dataloader()))
    answers = {WORDS.index(word) for text in texts[1::2] for word in text.split()} | {WORDS.index("</s>")}
    labels = batch["labels"][batch["labels"] != -100]
    assert set(labels.tolist()) <= answers


@pytest.mark.parametrize("way", WAYS)
def test_training(way, tmp_path):
    """In micro-batches, with the Trainer's count of targets."""
    sft = trainer("hybrid", tmp_path, {"text": sentences()}, gradient_accumulation_steps=2, **WAYS[way])
    sft.train()
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("way", ["packed", pytest.param("padding-free", marks=pytest.mark.slow)])
def test_the_example(way, make_checkpoint, tmp_path, monkeypatch, capsys):
    """Run as it is shipped: what it writes answers as it was taught, and loads without this package."""
    taught = {"Where is the river?": "Behind the mill.", "Who carried the buckets?": "The gardener."}
    chats = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in taught.items()
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    script = Path(__file__).parents[2] / "examples/finetune.py"
    checkpoint = str(make_checkpoint("hybrid"))
    options = [f"--way={way}", "--length=256", "--epochs=40", "--lr=0.01"]
    monkeypatch.setattr(
        sys, "argv", [str(script), checkpoint, str(tmp_path / "chats.jsonl"), str(tmp_path / "out"), *options]
    )
    runpy.run_path(str(script), run_name="__main__")
    assert "answers 'Where is the river?' with 'Behind the mill.'" in capsys.readouterr().out
    assert (tmp_path / "out/modeling_lrnn.py").is_file()
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    for chat in chats:
        prompt = tokenizer.apply_chat_template(
            chat["messages"][:1], add_generation_prompt=True, return_tensors="pt"
        )
        written = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == chat["messages"][1]["content"]
