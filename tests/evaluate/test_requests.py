"""Requests of every kind and any length: scored as by hand, or refused in a line; never an assertion."""

import contextlib
import math
import pkgutil

import pytest
import torch
from lm_eval.api import metrics
from lm_eval.api.instance import Instance
from short_models import HYBRID, LONG, RECURRENT, WINDOW, build, by_hand, encode

from lrnn_lm.evaluate import lm, scoring
from lrnn_lm.evaluate.lm import LiveLM


@pytest.fixture(scope="module")
def recurrent(tokenizer):
    return build(tokenizer, mixer=RECURRENT)


@pytest.fixture(scope="module")
def hybrid(tokenizer):
    return build(tokenizer, layer_pattern=HYBRID)


def live(model, tokenizer):
    unlimited = "full_attention" not in model.config.layer_types
    return LiveLM(model, tokenizer, batch_size=3, max_length=WINDOW, start=tokenizer.bos_token_id,
                  unlimited=unlimited)  # fmt: skip


def ask(kind, *arguments):
    metadata = ("asked", 0, 1)
    return [Instance(kind, {}, given, i, metadata=metadata) for i, given in enumerate(arguments)]


@pytest.fixture(params=[2048, 7], ids=["one-piece", "pieces"])
def piece(request, monkeypatch):
    monkeypatch.setattr(lm, "PIECE", request.param)


def test_what_is_replaced_in_lm_eval_exists_and_comes_back():
    rows = [*scoring._REPLACED, scoring._NO_BAR]
    owners = [(pkgutil.resolve_name(place), name) for place, name, _ in rows]
    before = [getattr(owner, name) for owner, name in owners]
    with contextlib.suppress(KeyError), scoring._replaced(rows):
        assert all(getattr(*place) is not own for place, own in zip(owners, before, strict=True))
        assert metrics.math.exp(1e4) == metrics.sample_stddev([1e200, 3e200]) == math.inf
        raise KeyError
    assert [getattr(*place) for place in owners] == before


@pytest.mark.usefixtures("piece")
def test_pairs_of_any_length_are_read_whole(recurrent, tokenizer):
    """In whatever company; a token over the join, and white space before it, belong to the answer."""
    bos = tokenizer.bos_token_id
    pairs = [
        ("the old", " river"), ("the old ", "river"), ("", "the river"), (" \n", "the river"),
        ("the old", LONG), (LONG, " rope"), (LONG, LONG), ("", LONG),
    ]  # fmt: skip
    wanted = []
    for context, answer in pairs:
        before = encode(tokenizer, context.rstrip())
        ids = [bos, *encode(tokenizer, context + answer)]
        assert ids[1 : 1 + len(before)] == before, "no token over the join here"
        wanted.append(by_hand(recurrent, ids, len(ids) - 1 - len(before)))
    scorer = live(recurrent, tokenizer)
    found = scorer.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for pair, got, want in zip(pairs, found, wanted, strict=True):
        assert got[0] == pytest.approx(want[0], rel=1e-4), pair
        assert got[1] == want[1]
    assert scorer.truncated == 0


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_requests_of_the_same_tokens_cut_elsewhere(kind, recurrent, tokenizer):
    """One text asked for after several contexts; and texts that end alike, whose last windows do."""
    text = "the old river was cold"
    asked = [(text[:cut], text[cut:]) for cut in (3, 7, 13, 17)] + [("the old river", " was dry")]
    if kind == "loglikelihood_rolling":
        asked = [(LONG[: len(LONG) // 12 * repeats],) for repeats in (3, 4, 5, 6)]
    for requests in (asked, asked[::-1]):
        alone = [getattr(live(recurrent, tokenizer), kind)(ask(kind, one), True)[0] for one in requests]
        together = live(recurrent, tokenizer)
        together.batch_size_per_gpu = 32  # all windows in one batch
        found = getattr(together, kind)(ask(kind, *requests), True)
        assert torch.tensor(found).numpy() == pytest.approx(torch.tensor(alone).numpy(), rel=1e-4)


def test_contexts_are_read_twice(recurrent, tokenizer):
    """As if they had been written twice; what has no context stays as it is."""
    pairs = [("the old", " river"), ("the old ", "river"), ("", "the river")]
    written = [("the old\nthe old", " river"), ("the old\nthe old ", "river"), ("", "the river")]
    twice = LiveLM(recurrent, tokenizer, batch_size=3, max_length=WINDOW, start=tokenizer.bos_token_id,
                   unlimited=True, prompt_twice=True)  # fmt: skip
    once = live(recurrent, tokenizer)
    found = twice.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    want = once.loglikelihood(ask("loglikelihood", *written), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in want], rel=1e-5)
    settings = {"until": ["."], "max_gen_toks": 5}
    answers = twice.generate_until(ask("generate_until", ("the old", settings)), disable_tqdm=True)
    assert answers == once.generate_until(
        ask("generate_until", ("the old\nthe old", settings)), disable_tqdm=True
    )


@pytest.mark.parametrize("shared", [2, 1])
@pytest.mark.parametrize("answer", ["ers", "ers and the rope"])
def test_a_token_over_the_join_is_of_the_answer(recurrent, tokenizer, shared, answer):
    """` strangers` is one token: what the context begins of it is asked with the rest of it."""
    context = "the old strang" if shared == 2 else "the strang"
    ids = encode(tokenizer, context + answer)
    before = encode(tokenizer, context)
    assert ids[:shared] == before[:shared]
    assert ids[shared] != before[shared], "it does reach over"
    (got,) = live(recurrent, tokenizer).loglikelihood(ask("loglikelihood", (context, answer)), True)
    want = by_hand(recurrent, [tokenizer.bos_token_id, *ids], len(ids) - shared)
    assert got[0] == pytest.approx(want[0], rel=1e-4)


def test_the_first_token_over_the_join_where_nothing_comes_before(loaded):
    """Without a start token the prefix token stands for the context."""
    model, tokenizer = loaded
    scorer = LiveLM(model, tokenizer, batch_size=1, max_length=48, start=None)
    assert len(encode(tokenizer, "The")) == 1
    assert scorer._encode_pair("Th", "e") == ([tokenizer.bos_token_id], encode(tokenizer, "The"))
    (got,) = scorer.loglikelihood(ask("loglikelihood", ("Th", "e")), True)
    want = by_hand(model, [tokenizer.bos_token_id, *encode(tokenizer, "The")], 1)
    assert got[0] == pytest.approx(want[0], rel=1e-4)


def test_nothing_asked_is_certain(recurrent, tokenizer):
    pairs = [("the old", ""), ("the old", " river"), ("", ""), ("<s>", "")]
    found = live(recurrent, tokenizer).loglikelihood(ask("loglikelihood", *pairs), True)
    assert [found[i] for i in (0, 2, 3)] == [(0.0, True)] * 3
    assert found[1][0] < 0


def test_a_greedy_answer_of_several_pieces_is_told(recurrent, tokenizer, monkeypatch):
    monkeypatch.setattr(lm, "PIECE", 3)
    ids = [tokenizer.bos_token_id, *encode(tokenizer, "the old")]
    asked = 40
    for _ in range(asked):
        with torch.no_grad():
            ids.append(int(recurrent(torch.tensor([ids])).logits[0, -1].argmax()))
    context, target = ids[:-asked], ids[-asked:]
    scorer = live(recurrent, tokenizer)
    (right,) = scorer._score([(("", ""), context, target)], True)
    assert right == pytest.approx(by_hand(recurrent, ids, asked), rel=1e-4)
    assert right[1]
    for wrong in (0, 20, asked - 1):  # in the first piece, in the middle, at the end
        other = [(token + 1) % len(tokenizer) if i == wrong else token for i, token in enumerate(target)]
        assert not scorer._score([(("", ""), context, other)], True)[0][1]


def test_attention_loses_the_beginning_of_a_context_and_refuses_a_long_answer(hybrid, tokenizer):
    scorer = live(hybrid, tokenizer)
    (got,) = scorer.loglikelihood(ask("loglikelihood", (LONG, " rope")), True)
    ids = encode(tokenizer, LONG + " rope")
    asked = len(ids) - len(encode(tokenizer, LONG))
    assert got[0] == pytest.approx(by_hand(hybrid, ids[-WINDOW - 1 :], asked)[0], rel=1e-4)
    assert scorer.truncated == 1
    words = "the old"
    while len(encode(tokenizer, words)) + 1 < WINDOW + 1:  # and BOS: the last token is only predicted
        words += " the"
    assert len(encode(tokenizer, words)) == WINDOW
    scorer.loglikelihood(ask("loglikelihood", (words.removesuffix(" the"), " the")), True)
    assert scorer.truncated == 1
    with pytest.raises(
        ValueError, match=r"task asked: an answer of .* window of 16 tokens.*--max-length"
    ) as error:
        scorer.loglikelihood(ask("loglikelihood", ("the old", LONG)), True)
    assert "\n" not in str(error.value)
    fits = encode(tokenizer, LONG)[:WINDOW]
    scorer.loglikelihood(ask("loglikelihood", ("the old", tokenizer.decode(fits))), True)


def test_long_texts_roll_through_windows(recurrent, tokenizer):
    """Also where other requests are read whole: each token once, as lm-eval's users compare them."""
    ids = [tokenizer.bos_token_id, *encode(tokenizer, LONG)]
    nats, done = 0.0, 1
    while done < len(ids):
        end = min(done + WINDOW, len(ids))
        nats += by_hand(recurrent, ids[max(0, end - WINDOW - 1) : end], end - done)[0]
        done = end
    requests = ask("loglikelihood_rolling", (LONG,), ("",), ("the river",))
    scorer = live(recurrent, tokenizer)
    whole, nothing, short = scorer.loglikelihood_rolling(requests, True)
    assert whole == pytest.approx(nats, rel=1e-4)
    assert nothing == 0
    (again,) = scorer.loglikelihood(ask("loglikelihood", ("", "the river")), True)
    assert short == pytest.approx(again[0], rel=1e-4)


def greedy(model, tokenizer, context, count):
    ids = [tokenizer.bos_token_id, *encode(tokenizer, context)]
    start = len(ids)
    while len(ids) < start + count and ids[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


CONTEXTS = ["the old", LONG, "", "she carried"]


@pytest.fixture(scope="module")
def long_answers(recurrent, tokenizer):
    """To CONTEXTS, longer than the window."""
    return [greedy(recurrent, tokenizer, context, 2 * WINDOW) for context in CONTEXTS]


@pytest.mark.parametrize("until", [[], None, [""], ""])
def test_answers_are_as_long_as_they_are_asked(recurrent, tokenizer, long_answers, until):
    """Longer than the window, after contexts of any length beside each other, an empty one too."""
    settings = {"until": until, "max_gen_toks": 2 * WINDOW}
    requests = ask("generate_until", *((context, settings) for context in CONTEXTS))
    scorer = live(recurrent, tokenizer)
    found = scorer.generate_until(requests, disable_tqdm=True)
    assert found == long_answers
    assert scorer.truncated == 0


@pytest.mark.parametrize("key", ["max_gen_toks", "max_new_tokens", "max_tokens"])
def test_stop_texts_and_lengths_in_all_spellings(recurrent, tokenizer, key):
    whole = greedy(recurrent, tokenizer, "the old", 20)
    stop = whole[3:5]
    for until in (stop, [stop], ["not to be found", stop]):
        settings = {"until": until, key: "20", "temperature": None}
        (got,) = live(recurrent, tokenizer).generate_until(ask("generate_until", ("the old", settings)), True)
        assert got == whole.split(stop)[0]


def test_an_answer_without_a_length_is_lm_evals_256_tokens(recurrent, tokenizer):
    (got,) = live(recurrent, tokenizer).generate_until(ask("generate_until", ("the old", {})), True)
    assert got == greedy(recurrent, tokenizer, "the old", 256)


def test_attention_needs_room_for_a_context(hybrid, tokenizer):
    scorer = live(hybrid, tokenizer)
    for length in (WINDOW, WINDOW + 1, None):
        with pytest.raises(ValueError, match=r"answers of up to .* leave no room .*--max-length") as error:
            scorer.generate_until(ask("generate_until", ("the old", {"max_gen_toks": length})), True)
        assert "\n" not in str(error.value)
    (got,) = scorer.generate_until(ask("generate_until", (LONG, {"max_gen_toks": 6})), True)
    assert scorer.truncated == 1
    end = tokenizer.decode(encode(tokenizer, LONG)[-(WINDOW - 6) :])
    ids = encode(tokenizer, end)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(hybrid(torch.tensor([ids])).logits[0, -1].argmax()))
    assert got == tokenizer.decode(ids[-6:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"until": 5}, "until must be a text or a list of texts, not 5"),
        ({"until": ["a", None]}, "until must be a text or a list of texts"),
        ({"max_gen_toks": 0}, "max_gen_toks must be a whole number above 0, not 0"),
        ({"max_gen_toks": "many"}, "max_gen_toks must be a whole number above 0"),
        ({"max_new_tokens": float("inf")}, "max_gen_toks must be a whole number above 0"),
    ],
)
def test_settings_that_are_none(recurrent, tokenizer, settings, message):
    with pytest.raises(ValueError, match=f"task asked: {message}"):
        live(recurrent, tokenizer).generate_until(ask("generate_until", ("the old", settings)), True)


def test_a_batch_is_made_of_texts_encoded_alone(recurrent, tokenizer):
    """Whatever the tokenizer does with the letters of its control tokens: BOS is put in as an id."""
    scorer = live(recurrent, tokenizer)
    tokenizer.split_special_tokens = True
    try:
        ids, mask = scorer.tok_batch_encode(["the old river", "the", ""])
    finally:
        tokenizer.split_special_tokens = False
    for text, row, kept in zip(["the old river", "the", ""], ids, mask.bool(), strict=True):
        assert row[kept].tolist() == [tokenizer.bos_token_id, *encode(tokenizer, text)]
        assert (kept.int().diff() >= 0).all(), "padding is on the left"


def test_a_tokenizer_without_an_end_answers_too(recurrent, tokenizer):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert bare.eos_token_id is bare.bos_token_id is None
    scorer = LiveLM(recurrent, bare, batch_size=2, max_length=WINDOW, start=None, unlimited=True)
    contexts = ["the old", "she carried two buckets"]
    requests = ask("generate_until", *((context, {"max_gen_toks": 5, "until": []}) for context in contexts))
    for got, context in zip(scorer.generate_until(requests, True), contexts, strict=True):
        ids = encode(tokenizer, context)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(recurrent(torch.tensor([ids])).logits[0, -1].argmax()))
        assert got == bare.decode(ids[-5:], skip_special_tokens=True)
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        scorer.generate_until(ask("generate_until", ("", {"max_gen_toks": 5})), True)
