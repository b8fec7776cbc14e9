"""Generated text: streamed and returned alike, started at BOS, repeatable, mistakes told plainly."""

import pytest
import torch

from lrnn_lm.evaluate.generate import generate, prompt_ids


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
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
