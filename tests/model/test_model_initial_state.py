"""A learnt initial state: what every document begins with, however its tokens come to the model."""

from pathlib import Path

import pytest
import torch
from small_models import (
    MIXER_ROWS,
    OF_EACH_STATE,
    RECURRENT,
    close,
    small_config,
    small_model,
    states,
    tokens,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.mixers import MIXERS
from lrnn_lm.mixers.base import SequenceContext
from lrnn_lm.model import initial_state
from lrnn_lm.train.optim import decay_groups

LEARNT = [name for name in RECURRENT if MIXERS[MIXER_ROWS[name]["type"]].differentiable_state]
FEW = [*(name for name in OF_EACH_STATE if name in LEARNT), "lstm", "m2rnn", "hybrid"]
PAD = 0
EXACT = 1e-9  # in fp64
ROTARY = 1e-6  # of attention, whose angles are in fp32


def learnt(name: str) -> LRNNForCausalLM:
    """A small model in fp64 whose initial states are far from zero."""
    model = small_model(name, learn_initial_state=True).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for start in starts_of(model):
            start.copy_(torch.randn(start.shape, generator=generator))
    return model


def starts_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("initial_state")]


def packed() -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """Ids and document starts (2, 13), and row, begin and end of each document; starts fall together once."""
    reset = torch.zeros(2, 13, dtype=torch.bool)
    reset[0, [0, 4, 5]] = True
    reset[1, [4, 12]] = True  # its first token begins a row, though no document is said to start there
    documents = [(0, 0, 4), (0, 4, 5), (0, 5, 13), (1, 0, 4), (1, 4, 12), (1, 12, 13)]
    return tokens(2, 13), reset, documents


@pytest.mark.parametrize("name", LEARNT)
def test_a_layer_begins_with_it(name: str) -> None:
    block = learnt(name).model.layers[0]
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    _, empty = block.mixer(x)
    given = block.initial_state.view(1, *empty.shape[1:]).expand_as(empty).to(empty.dtype)
    want, _ = block.mixer(x, given)
    got, _ = initial_state.mix(block.mixer, x, None, SequenceContext(), block.initial_state)
    close(got, want, EXACT)
    assert (want - block.mixer(x)[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "exported"),
    [*((name, False) for name in FEW), ("bd_lru-all", True), ("lstm", True), ("hybrid", True)],
)
def test_packed_documents_are_as_each_alone(
    name: str, exported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, states and gradients; also the way that exported graphs go."""
    monkeypatch.setattr("lrnn_lm.mixers.base.is_exported", lambda: exported)
    model, tolerance = learnt(name), ROTARY if name == "hybrid" else EXACT
    ids, reset, documents = packed()
    out = model(ids, reset=reset, use_cache=True)
    out.logits.square().sum().backward()
    got = [start.grad.clone() for start in starts_of(model)]
    model.zero_grad()
    for row, begin, end in documents:
        alone = model(ids[row : row + 1, begin:end], use_cache=True)
        close(out.logits[row, begin:end], alone.logits[0], tolerance)
        alone.logits.square().sum().backward()
        if end == 13 and name != "hybrid":
            for whole, part in zip(states(out.past_key_values), states(alone.past_key_values), strict=True):
                close(whole[row], part[0], EXACT)
    for grad, start in zip(got, starts_of(model), strict=True):
        assert start.grad.norm() > 0
        assert (grad - start.grad).norm() < tolerance * start.grad.norm()


@torch.no_grad()
def test_two_documents_of_a_token_each() -> None:
    model, ids = learnt("bd_lru"), tokens(1, 2)
    got = model(ids, reset=torch.tensor([[True, True]])).logits
    close(got, torch.cat([model(ids[:, i : i + 1]).logits for i in range(2)], dim=1), EXACT)


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_padding_and_pieces_change_nothing(name: str) -> None:
    """Left and right padding, a cache filled in pieces, and decoding from nothing."""
    model, ids = learnt(name), tokens(2, 9)
    tolerance = ROTARY if name == "hybrid" else EXACT
    want = model(ids, use_cache=False).logits
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3], mask[1, 9:] = 0, 0
    padded = torch.full((2, 12), PAD)
    padded[mask.bool()] = ids.flatten()
    got = model(padded, attention_mask=mask, use_cache=True)
    close(got.logits[mask.bool()].view_as(want), want, tolerance)
    whole = model(ids, use_cache=True).past_key_values
    if name != "hybrid":
        for a, b in zip(states(got.past_key_values), states(whole), strict=True):
            close(a, b, EXACT)
    cache, parts = None, []
    for part in ids.split([1, 1, 4, 3], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    close(torch.cat(parts, dim=1), want, tolerance)


@pytest.mark.parametrize("name", ["bd_lru-all", "lstm"])
@torch.no_grad()
def test_a_row_of_padding_alone_begins_later(name: str) -> None:
    """A cache that has seen padding only still begins with the learnt state."""
    model, ids = learnt(name), tokens(1, 5)
    mask = torch.tensor([[0, 0, 0]])
    cache = model(torch.full((1, 3), PAD), attention_mask=mask, use_cache=True).past_key_values
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    got = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    close(got, model(ids, use_cache=False).logits, EXACT)


def test_left_padded_prompts_are_continued_as_alone() -> None:
    model, ids = learnt("bd_lru"), tokens(2, 6)
    batch = torch.cat([torch.full((2, 2), PAD), ids], dim=1)
    batch[1] = torch.cat([ids[1], ids[1, :2]])
    mask = torch.ones_like(batch)
    mask[0, :2] = 0
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    got = model.generate(batch, attention_mask=mask, **settings)[:, 8:]
    alone = [model.generate(row[None], **settings)[0, len(row) :] for row in (ids[0], batch[1])]
    assert torch.equal(got, torch.stack(alone))


def test_a_new_one_is_zero_is_kept_and_does_not_decay(tmp_path: Path) -> None:
    """At zero it is the model without; off, there is no parameter, and older configs have it off."""
    plain, model = small_model("hybrid"), small_model("hybrid", learn_initial_state=True)
    ids, reset, _ = packed()
    assert [tuple(start.shape) for start in starts_of(model)] == [(15,), (28,)]
    close(model(ids, reset=reset).logits, plain(ids, reset=reset).logits, 1e-5)
    assert starts_of(plain) == []
    assert not LRNNConfig().learn_initial_state
    assert all(start.ndim == 1 for start in starts_of(model))
    _, vectors = decay_groups(model.parameters(), 0.1)
    assert vectors["weight_decay"] == 0
    assert {id(p) for p in starts_of(model)} <= {id(p) for p in vectors["params"]}
    model = learnt("hybrid")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    close(again(ids, reset=reset).logits, model(ids, reset=reset).logits, EXACT)


@pytest.mark.parametrize(
    ("name", "words"), [("attention", ("attention", "recurrent")), ("gla", ("gla", "another mixer"))]
)
def test_layers_without_a_state_to_learn_are_refused(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="learn_initial_state") as refused:
        small_config("bd_lru", mixer={"type": name}, learn_initial_state=True)
    assert all(word in str(refused.value) for word in words)
