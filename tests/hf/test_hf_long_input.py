"""Long inputs in segments: the same numbers as in one pass, and memory that does not grow with the length."""

import pytest
import torch
from forks import run_code
from small_models import OF_EACH_STATE, close, in_turn, small_model, tokens
from tolerances import TOLERANCE

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.data import windows
from lrnn_lm.data.synthetic.prepare import write_symbols
from lrnn_lm.evaluate import prompt as prompts
from lrnn_lm.evaluate.generate import generate
from lrnn_lm.model import prefill

SUMS = TOLERANCE["other order of sums"]
SETTINGS = {"max_new_tokens": 6, "greedy": True, "device": "cpu"}


@pytest.mark.parametrize(("name", "segment"), in_turn([1, 4, 100], OF_EACH_STATE))
def test_segments_are_the_whole(name, segment):
    model, ids = small_model(name), tokens()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    got = prefill(model, ids, segment, attention_mask=mask)
    close(got.logits, model(ids, attention_mask=mask).logits[:, -1:], SUMS)
    assert got.past_key_values.get_seq_length() == 21


@pytest.mark.parametrize("name", OF_EACH_STATE)
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


GENERATE = """
import resource
from lrnn_lm.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_prompt(tmp_path):
    """By less than 6 MB for 12288 tokens more, the least of two processes each; in one piece it is 26 MB."""
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    LRNNForCausalLM(LRNNConfig(**sizes)).save_pretrained(tmp_path)
    write_symbols(256, tmp_path)
    peaks = []
    for length in (4096, 16384):
        (tmp_path / "prompt.txt").write_text("".join(f"{i * 7919 % 256} " for i in range(length)))
        words = ("generate", tmp_path, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", "4")
        both = [run_code(GENERATE, *words, "--greedy", "--device", "cpu") for _ in range(2)]
        assert [done.returncode for done in both] == [0, 0], both[0].stderr
        peaks.append(min(float(done.stdout.split()[-1]) for done in both))  # MB
    assert peaks[1] < peaks[0] + 6, peaks
