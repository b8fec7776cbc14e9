"""Long inputs in segments: the same numbers as in one pass, and memory that does not grow with the length."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import NAMES, close, small_model, tokens
from tolerances import TOLERANCE

from lrnn_lm.data import windows
from lrnn_lm.evaluate import prompt as prompts
from lrnn_lm.evaluate.generate import generate
from lrnn_lm.model import prefill

SUMS = TOLERANCE["other order of sums"]
SETTINGS = {"max_new_tokens": 6, "greedy": True, "device": "cpu"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("segment", [1, 4, 21, 100])
def test_segments_are_the_whole(name, segment):
    model, ids = small_model(name), tokens()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    got = prefill(model, ids, segment, attention_mask=mask)
    close(got.logits, model(ids, attention_mask=mask).logits[:, -1:], SUMS)
    assert got.past_key_values.get_seq_length() == 21


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_after_a_cache(name):
    model, ids = small_model(name), tokens()
    cache = prefill(model, ids[:, :8], 3).past_key_values
    stream = (ids[:, start:stop] for start, stop in ((8, 9), (9, 9), (9, 15), (15, 21)))
    close(prefill(model, stream, 4, cache).logits, model(ids).logits[:, -1:], SUMS)
    assert cache.get_seq_length() == 21


def test_nothing_to_read():
    model, ids = small_model("bd_lru"), tokens()
    with pytest.raises(ValueError, match="segment must be at least 1"):
        prefill(model, ids, 0)
    with pytest.raises(ValueError, match="no tokens"):
        prefill(model, ids[:, :0])
    with pytest.raises(ValueError, match="one tensor"):
        prefill(model, iter([ids]), attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("window", [1, 7, 60, 400])
def test_windows_are_tokenised_as_the_whole(window, tokenizer, monkeypatch):
    monkeypatch.setattr(windows, "OVERLAP", 50)
    text = ("She carried 两 buckets,  and naïve 🙂🙂 ropes.\n\n\tA program reads " * 20)[:1100]
    want = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [text[i : i + window] for i in range(0, len(text), window)]
    got = [token for ids in prompts.stream_ids(tokenizer, pieces) for token in ids]
    assert got == [tokenizer.bos_token_id, *want]


def test_a_word_longer_than_the_overlap_is_cut(tokenizer, monkeypatch):
    monkeypatch.setattr(windows, "OVERLAP", 4)
    got = [
        token for ids in prompts.stream_ids(tokenizer, ["gardener gar", "dener riv", "er"]) for token in ids
    ]
    assert tokenizer.decode(got[1:]) == "gardener gardener river"


@pytest.mark.parametrize("name", ["bd_lru", "hybrid"])
@pytest.mark.parametrize("segment", [1, 5, 1000])
def test_a_prompt_file_is_a_prompt(name, segment, make_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "WINDOW", 30)
    monkeypatch.setattr(windows, "OVERLAP", 20)
    text, question = "The gardener walked to the river every morning.\r\nShe carried", " two buckets"
    (tmp_path / "text").write_bytes(text.encode())
    want = generate(make_checkpoint(name), text + question, **SETTINGS)
    capsys.readouterr()
    got = generate(
        make_checkpoint(name), question, prompt_file=tmp_path / "text", segment=segment, **SETTINGS
    )
    assert text + question + got == want
    assert capsys.readouterr().out == got + "\n"


def test_prompt_files_that_cannot_be_read(make_checkpoint, tmp_path):
    (tmp_path / "binary").write_bytes(b"abc\xff")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="no such prompt file"):
        generate(make_checkpoint(), prompt_file=tmp_path / "gone", **SETTINGS)
    with pytest.raises(ValueError, match="not UTF-8"):
        generate(make_checkpoint(), prompt_file=tmp_path / "binary", **SETTINGS)
    with pytest.raises(ValueError, match="segment must be at least 1"):
        generate(make_checkpoint(), prompt_file=tmp_path / "empty", segment=0, **SETTINGS)
    whole = generate(make_checkpoint(), "", **SETTINGS)
    assert generate(make_checkpoint(), prompt_file=tmp_path / "empty", **SETTINGS) == whole


def test_memory_does_not_grow_with_the_prompt():
    """Shorter than what benchmarks.prefill measures by default, with the limit that holds there."""
    command = [sys.executable, "-m", "benchmarks.prefill", "4096", "20480"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
