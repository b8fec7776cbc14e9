"""Generated text: streamed and returned alike, started at BOS, repeatable, mistakes told plainly."""

import io
import json
import os
import shutil
import sys
import threading

import pytest
import torch
from forks import run_lrnn
from safetensors.torch import load_file, save_file

from lrnn_lm.evaluate.generate import generate, prompt_ids
from lrnn_lm.evaluate.prompt import read_text


def test_text_is_streamed_and_returned(checkpoint, capsys):
    text = generate(checkpoint, "The river", max_new_tokens=12, seed=3, device="cpu")
    assert text.startswith("The river")
    assert capsys.readouterr().out == text + "\n"
    assert generate(checkpoint, "The river", max_new_tokens=12, seed=3, device="cpu") == text


def test_greedy_equals_taking_the_likeliest_token(checkpoint, loaded, capsys):
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, "She carried")
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < 8 and ids[-1] != tokenizer.eos_token_id:
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    want = tokenizer.decode(ids, skip_special_tokens=True)
    settings = {"max_new_tokens": 8, "device": "cpu"}
    assert generate(checkpoint, "She carried", greedy=True, **settings) == want
    assert generate(checkpoint, "She carried", temperature=0, **settings) == want
    assert generate(checkpoint, "She carried", top_k=1, **settings) == want
    assert generate(checkpoint, "She carried", top_p=1e-9, seed=1, **settings) == want


def test_an_empty_prompt_starts_from_bos(checkpoint, loaded, capsys):
    assert prompt_ids(loaded[1], "") == [loaded[1].bos_token_id]
    state = torch.get_rng_state()
    text = generate(checkpoint, "", max_new_tokens=5, device="cpu")
    assert capsys.readouterr().out == text + "\n"
    assert torch.equal(torch.get_rng_state(), state)


def test_what_spells_a_control_token_is_text(checkpoint, loaded, capsys):
    _, tokenizer = loaded
    for prompt in ("<s>", "<s>The river", "a </s> b", "</s>"):
        ids = prompt_ids(tokenizer, prompt)
        assert ids[0] == tokenizer.bos_token_id
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:])
        assert generate(checkpoint, prompt, max_new_tokens=3, device="cpu").startswith(prompt)


TEXT = "The gardener — naïve 🙂 — walked\r\nto the river"
SETTINGS = {"max_new_tokens": 6, "greedy": True, "device": "cpu"}


@pytest.fixture(scope="module")
def continued(checkpoint):
    """What comes after TEXT."""
    return generate(checkpoint, TEXT, **SETTINGS)[len(TEXT) :]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("window", [1, 2, 5, 100_000])
def test_a_byte_order_mark_is_no_text(checkpoint, continued, tmp_path, monkeypatch, mark, window):
    monkeypatch.setattr("lrnn_lm.evaluate.prompt.WINDOW", window)
    (tmp_path / "prompt.txt").write_bytes(mark + TEXT.encode())
    assert "".join(read_text(tmp_path / "prompt.txt")) == TEXT
    assert generate(checkpoint, prompt_file=tmp_path / "prompt.txt", **SETTINGS) == continued
    inside = "a\ufeffb"
    (tmp_path / "prompt.txt").write_bytes(mark + inside.encode())
    assert "".join(read_text(tmp_path / "prompt.txt")) == inside, "only the first is a mark"


def test_a_prompt_is_read_twice(checkpoint, tmp_path):
    """The same as the prompt written twice by hand; the file comes before the prompt each time."""
    text = "She carried two buckets"
    twice = f"{text}\n{text}"
    want = generate(checkpoint, twice, **SETTINGS).removeprefix(twice)
    assert generate(checkpoint, text, prompt_twice=True, **SETTINGS) == want
    (tmp_path / "prompt.txt").write_text("She carried")
    found = generate(
        checkpoint, " two buckets", prompt_file=tmp_path / "prompt.txt", prompt_twice=True, **SETTINGS
    )
    assert found == want
    empty = generate(checkpoint, "", **SETTINGS)
    assert generate(checkpoint, "", prompt_twice=True, **SETTINGS) == empty


def test_a_pipe_is_a_prompt_file(checkpoint, continued, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    data = b"\xef\xbb\xbf" + TEXT.encode()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    assert generate(checkpoint, prompt_file=tmp_path / "pipe", **SETTINGS) == continued
    writer.join()
    with pytest.raises(ValueError, match="a pipe can be read only once"):
        generate(checkpoint, prompt_file=tmp_path / "pipe", prompt_twice=True, **SETTINGS)


OPTIONS = ["--max-new-tokens", "6", "--temperature", "0", "--device", "cpu"]


def test_standard_input_is_a_prompt_file(checkpoint, continued):
    done = run_lrnn("generate", checkpoint, *OPTIONS, "--prompt-file", "/dev/stdin", stdin=TEXT)
    assert (done.returncode, done.stdout) == (0, continued + "\n"), done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_terminals_of_any_encoding(checkpoint, monkeypatch, encoding, errors):
    """What the terminal's encoding does not know is printed as an escape; its settings stay as they were."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, newline="")
    monkeypatch.setattr(sys, "stdout", out)
    text = generate(checkpoint, TEXT, **SETTINGS)
    out.flush()
    assert text.startswith(TEXT)
    assert out.errors == errors
    assert out.buffer.getvalue() == (text + "\n").encode(encoding, "backslashreplace")


@pytest.mark.parametrize(
    ("content", "place"),
    [(b"abc\xff", 3), (b"\xff", 0), (b"\xef\xbb\xbfabc\xe2\x82", 6), (b"a" * 70 + b"\x80", 70)],
)
@pytest.mark.parametrize("window", [1, 3, 64, 100_000])
def test_a_prompt_file_that_is_not_utf8_is_told_by_its_byte(tmp_path, monkeypatch, content, place, window):
    monkeypatch.setattr("lrnn_lm.evaluate.prompt.WINDOW", window)
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x: not UTF-8 text \(.* at byte {place}\)$"):
        list(read_text(tmp_path / "x"))


def test_a_folder_is_no_prompt_file(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"the prompt file cannot be read .*directory"):
        generate(checkpoint, prompt_file=tmp_path, **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-40}, "pass 0 for greedy"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_numbers_out_of_range_are_told(checkpoint, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(checkpoint, "x", **settings)


def test_what_is_no_text_or_seed_is_told(checkpoint):
    with pytest.raises(ValueError, match="not UTF-8"):
        generate(checkpoint, "x\udcff")  # a byte 0xff on the command line
    with pytest.raises(ValueError, match="seed"):
        generate(checkpoint, "x", seed=2**64)


def test_a_missing_checkpoint_is_told(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint"):
        generate(tmp_path / "gone", "x")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["\x00 is nowhere"]},
    ],
)
def test_settings_of_a_folder_that_cannot_be_streamed(checkpoint, tmp_path, settings):
    """They ended in a traceback, or in a message about arguments that nobody gave."""
    folder = tmp_path / "set"
    shutil.copytree(checkpoint, folder)
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**own, **settings}))
    greedy = {"max_new_tokens": 5, "greedy": True, "device": "cpu"}
    assert generate(folder, "The", **greedy) == generate(checkpoint, "The", **greedy)


def test_a_package_that_a_folder_asks_for_is_named(checkpoint, tmp_path):
    folder = tmp_path / "quantised"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    asked = {"quant_method": "aqlm", "in_group_size": 8}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": asked}))
    with pytest.raises(ValueError, match=r"cannot be loaded as a model: .*aqlm"):
        generate(folder, "The", device="cpu")


@pytest.mark.parametrize("greedy", [False, True])
def test_weights_that_are_no_numbers_are_told(checkpoint, tmp_path, greedy):
    """Sampling ended in a traceback, and greedy text was the first token without end."""
    folder = tmp_path / "diverged"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="diverged: no text, as logits are NaN"):
        generate(folder, "The", greedy=greedy, device="cpu")
