"""The examples of docs/huggingface.md and docs/states.md, run as they stand from top to bottom."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
OPTIONAL = ("peft", "torchao")


@pytest.fixture
def desk(tmp_path, monkeypatch, make_checkpoint):
    """A folder to work in, with a small checkpoint where the pages expect the demo's, and a document."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/demo/checkpoints/latest").symlink_to(make_checkpoint())
    (tmp_path / "document.txt").write_text("The gardener walked to the river every morning. " * 60)


@pytest.mark.parametrize("page", ["huggingface.md", "states.md"])
def test_examples(page, desk, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        missing = [
            name for name in OPTIONAL if f"from {name}" in block and not importlib.util.find_spec(name)
        ]
        if not missing:
            exec(compile(block, page, "exec"), names)
    if page == "states.md":
        check_answers(names)
    else:
        check_pushed(names)
    assert capsys.readouterr().out


def check_pushed(names: dict) -> None:
    """What came back from the folder in the hub's place is the model that was trained on the page."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("hub/NAME/small")
    ids = tokenizer(tokenizer.bos_token + "Return the", return_tensors="pt").input_ids
    assert torch.equal(ids, names["inputs"].input_ids)
    trained = AutoModelForCausalLM.from_pretrained("runs/tuned/final")
    assert torch.equal(names["pushed"](ids).logits, trained(ids).logits)


def check_answers(names: dict) -> None:
    """Each answer is the one that the document and the question as one prompt would get."""
    import torch

    model, document, questions = names["model"], names["document"], names["questions"]
    for row, padding, answer in zip(questions.input_ids, questions.attention_mask, names["out"], strict=True):
        whole = torch.cat([document, row[padding.bool()].unsqueeze(0)], dim=1)
        want = model.generate(whole, max_new_tokens=20, do_sample=False)[0, whole.shape[1] :]
        assert torch.equal(answer[len(row) :][: len(want)], want)
