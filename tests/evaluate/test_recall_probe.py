"""`lrnn eval --recall`: which tokens a context could tell, and what a diagonal transition would lose."""

import json
from pathlib import Path

import pytest
import torch
from small_models import RECURRENT, byte_tokenizer, small_model, tokens

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.evaluate.probe.recall import (
    only_diagonals,
    probe_recall,
    seen_before,
    split,
    text_rows,
    token_losses,
)
from lrnn_lm.evaluate.tasks.heldout import read_documents


def naive(row: list[int], t: int) -> tuple[int, int]:
    """The longest n-gram that ends at t and stood before, and the distance of the last bigram, by search."""
    best = 0
    for n in range(1, 5):
        if n <= t + 1 and any(row[s - n + 1 : s + 1] == row[t - n + 1 : t + 1] for s in range(n - 1, t)):
            best = n
    back = [t - s for s in range(1, t) if row[s - 1 : s + 1] == row[t - 1 : t + 1]] if t else []
    return best, min(back, default=0)


@pytest.mark.parametrize("seed", range(4))
def test_ngrams_are_those_of_a_plain_search(seed: int) -> None:
    rows = torch.randint(0, 4, (3, 40), generator=torch.Generator().manual_seed(seed))
    order, distance = seen_before(rows)
    for r, row in enumerate(rows.tolist()):
        for t in range(1, 40):
            assert (int(order[r, t - 1]), int(distance[r, t - 1])) == naive(row, t)


@pytest.mark.parametrize("name", [*RECURRENT, "attention", "hybrid"])
def test_parts_make_up_the_whole(name: str) -> None:
    model, ids = small_model(name), tokens(rows=3, length=30)
    facts = split(model, ids[:, :-1], ids[:, 1:])
    with torch.no_grad():
        assert facts["loss"] == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-5)
    for parts in (facts["seen_ngram"].values(), facts["position"], facts["frequency"]):
        assert sum(part["tokens"] for part in parts) == 3 * 29
        whole = sum(part["tokens"] * part["loss"] for part in parts if part["tokens"]) / (3 * 29)
        assert whole == pytest.approx(facts["loss"], rel=1e-5)
    bigrams = sum(part["tokens"] for part in facts["distance"])
    assert bigrams == facts["copyable"]["tokens"] == 3 * 29 - facts["other"]["tokens"]


def test_rows_have_the_tokens_and_targets_of_a_validation(
    loaded: tuple, tokenizer, write_documents, tmp_path: Path
) -> None:
    """A start token, which nothing in training predicts, is no target and in none of the parts."""
    path = write_documents(tmp_path / "heldout.jsonl")
    config = LRNNConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    model = LRNNForCausalLM(config).eval()
    inputs, targets = text_rows(model, tokenizer, path, 50, 24)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = [tokenizer(text)["input_ids"] for text in read_documents(path)]
    stream = torch.tensor([token for ids in texts for token in (start, *ids, end)])[: inputs.numel() + 1]
    assert torch.equal(inputs.flatten(), stream[:-1])
    assert torch.equal(targets.flatten(), stream[1:].masked_fill(stream[1:] == start, -100))
    assert (targets == -100).sum() > 5
    facts = split(model, inputs, targets)
    with torch.no_grad():
        want = float(model(inputs, shift_labels=targets).loss)
    assert facts["loss"] == pytest.approx(want, rel=1e-5)
    assert sum(part["tokens"] for part in facts["frequency"]) == (targets != -100).sum()
    others = text_rows(loaded[0], tokenizer, path, 50, 24)  # of models that were not trained on such rows
    assert torch.equal(others[0].flatten()[:24], torch.tensor(texts[0][:24]))


def test_a_diagonal_is_all_that_is_left() -> None:
    model, ids = small_model("bd_lru"), tokens(rows=2, length=20)
    whole = token_losses(model, ids[:, :-1], ids[:, 1:])
    with only_diagonals(model) as cut:
        assert cut
        diagonal = token_losses(model, ids[:, :-1], ids[:, 1:])
    assert (whole - diagonal).abs().max() > 1e-3
    assert torch.equal(token_losses(model, ids[:, :-1], ids[:, 1:]), whole)  # put back
    with torch.no_grad():  # gates that mix nothing: the diagonal is the whole
        for layer in model.model.layers:
            M, N = layer.mixer.block_size, layer.mixer.num_blocks
            layer.mixer.gate_proj.weight.zero_()
            bias = torch.full((N * M, M + 1), -40.0)
            bias[torch.arange(N * M), torch.arange(N * M) % M] = 1.0
            bias[:, M] = 0.0
            layer.mixer.gate_proj.bias.copy_(bias.T.flatten())
    whole = token_losses(model, ids[:, :-1], ids[:, 1:])
    with only_diagonals(model):
        torch.testing.assert_close(token_losses(model, ids[:, :-1], ids[:, 1:]), whole, rtol=1e-5, atol=1e-5)


def test_slow_gates_have_the_half_lives_that_were_asked_for() -> None:
    model = small_model("bd_lru-all")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.gate_proj.weight.zero_()
            layer.mixer.gate_proj.bias.copy_(layer.mixer.initial_values(0.02)["gate_proj.bias"])
    ids = tokens(rows=2, length=20)
    for layer in split(model, ids[:, :-1], ids[:, 1:])["gates"]:
        lives = layer["half_life"]
        assert 1.9 < lives["0.1"] < lives["0.9"] < 18  # [2, 16], and what the block's other rows pass on


def test_the_command_writes_table_json_and_picture(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from lrnn_lm.cli import app

    with pytest.raises(SystemExit) as ended:
        app([
            "eval", str(checkpoint), "--recall", "--rows", "2", "--device", "cpu", "--output", str(tmp_path),
        ])  # fmt: skip
    assert ended.value.code in (0, None)
    assert "complete a bigram seen before" in capsys.readouterr().out
    facts = json.loads((tmp_path / "recall.json").read_text())
    assert facts[0]["rows"] == 2
    assert (tmp_path / "recall.png").stat().st_size > 10_000


@pytest.mark.parametrize("other", ["nothing", "tokenizer", "row length"])
def test_losses_of_other_tokens_are_told_not_to_compare(
    tokenizer, write_documents, tmp_path: Path, capsys: pytest.CaptureFixture, other: str
) -> None:
    folders, data = [], write_documents(tmp_path / "heldout.jsonl")
    for i in range(2):
        ours = byte_tokenizer(read_documents(data), 330) if other == "tokenizer" and i else tokenizer
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 400}
        length = 12 if other == "row length" and i else 16
        model = LRNNForCausalLM(LRNNConfig(**sizes, max_position_embeddings=length, eos_token_id=1))
        folders.append(tmp_path / f"model{i}")
        model.save_pretrained(folders[-1])
        ours.save_pretrained(folders[-1])
    probe_recall(folders, rows=4, data=data, output=tmp_path / "out", device="cpu")
    told = "their losses a token do not compare" in " ".join(capsys.readouterr().out.split())
    assert told == (other != "nothing")
