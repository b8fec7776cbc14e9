"""The prefix cache: what was read before costs nothing again, answers are the same, its bytes are bounded."""

import copy
import random
import threading

import pytest
import torch
from small_models import OF_EACH_STATE, small_model, tokens

from lrnn_lm.model.decoding import prefix
from lrnn_lm.model.decoding.prefix import PrefixCache

DOCUMENT = tokens(rows=1, length=1500)
QUESTIONS = [tokens(rows=1, length=length, seed=length) for length in (9, 30, 17)]
NEW = 4
NEAR = 2 * 64  # tokens before a question that may be read again


@pytest.fixture
def fed(monkeypatch):
    """A function that calls another and returns what that returns, and the tokens that the model was fed."""
    counted, embedding = [], torch.nn.functional.embedding

    def counting(ids, *args, **kwargs):
        counted.append(ids.numel())
        return embedding(ids, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "embedding", counting)

    def count(function, *args):
        counted.clear()
        return function(*args), sum(counted)

    return count


def asked(model, ids, **options):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)


def with_cache(name="bd_lru", most=2**24, **changes):
    model = small_model(name, **changes)
    model.config.prefix_cache_bytes = most
    return model


def after(*texts):
    return torch.cat(texts, dim=1)


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_a_second_question_costs_its_own_tokens(name, fed):
    plain, model = small_model(name), with_cache(name)
    document = DOCUMENT if name == "hybrid" else DOCUMENT[:, -200:]
    costs = []
    for question in [*QUESTIONS, QUESTIONS[0]]:
        ids = after(document, question)
        text, cost = fed(asked, model, ids)
        assert torch.equal(text, asked(plain, ids))
        costs.append(cost - question.shape[1] - NEW)
    assert costs[0] >= document.shape[1] - 1
    assert max(costs[1:3]) <= NEAR
    assert costs[3] <= 0


def test_an_answer_is_gone_on_from(fed):
    plain, model = small_model("bd_lru"), with_cache()
    answer = asked(model, DOCUMENT)
    more = after(answer, QUESTIONS[0])
    text, cost = fed(asked, model, more)
    assert torch.equal(text, asked(plain, more))
    assert cost <= QUESTIONS[0].shape[1] + 1 + NEW


@pytest.mark.parametrize("name", ["bd_lru", "hybrid"])
def test_with_transformers_loop(name, fed):
    plain, model = small_model(name), with_cache(name)
    options = {"return_dict_in_generate": True, "output_scores": True}
    for question in QUESTIONS:
        ids = after(DOCUMENT, question)
        out, cost = fed(lambda ids=ids: asked(model, ids, **options))
        want = asked(plain, ids, **options)
        assert torch.equal(out.sequences, want.sequences)
        for got, score in zip(out.scores, want.scores, strict=True):
            torch.testing.assert_close(got, score, rtol=0, atol=1e-4)
    assert cost <= QUESTIONS[-1].shape[1] + NEAR + NEW


def test_other_weights_begin_anew(fed):
    model = with_cache()
    asked(model, DOCUMENT)
    for change in ("data", "rows", "columns", "within rows", "signs", "plain", "inference"):
        with torch.inference_mode(change == "inference"), torch.no_grad():
            weight = model.model.layers[1].mlp.up_proj.weight
            if change == "rows":
                weight.data.copy_(weight.data.flip(0))
            elif change in ("columns", "within rows"):  # in a sum, all numbers or all pairs of them are there
                weight.data.copy_(weight.data.roll(1 if change == "columns" else 2, 1))
            elif change == "signs":  # each adds 2^63 to a sum of pairs, and four of them 0
                weight.data[:, 1:8:2].neg_()
            else:
                (weight.data if change == "data" else weight)[0, 0] += 1
        text, cost = fed(asked, model, DOCUMENT)
        assert cost >= DOCUMENT.shape[1]
        model.config.prefix_cache_bytes = 0
        assert torch.equal(text, asked(model, DOCUMENT))
        model.config.prefix_cache_bytes = 2**24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_two_signs_of_a_row_tell(dtype):
    """In whichever columns: a sum without factors, or with one each, had half of them in common."""
    weight, draw = torch.randn(8, 64).to(dtype), random.Random(0)
    before = prefix._sum_of_bits(weight)
    for _ in range(100):
        other, places = weight.clone(), draw.sample(range(64), 2)
        other[draw.randrange(8), places] *= -1
        assert prefix._sum_of_bits(other) != before, places
    assert prefix._sum_of_bits(weight[:0]) == 0


@pytest.mark.parametrize(
    ("name", "change"), [("attention-window", {"sliding_window": 8}), ("bd_lru", {"num_hidden_layers": 2})]
)
def test_other_layers_begin_anew(name, change):
    """What the config says of layers is read at each pass."""
    model, ids = with_cache(name), DOCUMENT[:, :200]
    asked(model, ids)
    for key, value in change.items():
        setattr(model.config, key, value)
    text = asked(model, ids)
    model.config.prefix_cache_bytes = 0
    assert torch.equal(text, asked(model, ids))


def test_bytes_are_bounded_and_the_least_used_goes():
    model, cache = small_model("hybrid"), PrefixCache(0)
    texts = [tokens(rows=1, length=200, seed=seed) for seed in (1, 2, 3)]

    def read(text):
        from lrnn_lm.model.cache import make_cache

        with torch.no_grad():
            cache.read(model, text, make_cache(model.config))
        assert cache.size() <= cache.most_bytes

    read(texts[0])
    assert cache.size() == 0
    cache.most_bytes = 2**24
    read(texts[0])
    one = cache.size()
    cache.most_bytes = 2 * one
    for text in (texts[1], texts[0], texts[2]):
        read(text)
    kept = [text.ids.tolist() for text in cache._texts]
    assert kept == [texts[0][0, :-1].tolist(), texts[2][0, :-1].tolist()]
    cache.most_bytes = one - 1  # a text too large by itself keeps its last state
    read(tokens(rows=1, length=200, seed=4))
    assert [max(text.states) for text in cache._texts] == [199]
    read(tokens(rows=1, length=900, seed=4))  # begins otherwise, and its keys take too much: left out
    read(torch.cat([tokens(rows=1, length=200, seed=4), DOCUMENT], dim=1))  # goes on, and is left out too
    assert [max(text.states) for text in cache._texts] == [199]


def test_only_where_states_are_those_of_tokens(fed):
    model = with_cache()
    asked(model, DOCUMENT)
    ids = after(DOCUMENT, QUESTIONS[0])
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    whole = ids.shape[1]
    assert fed(lambda: asked(model, ids, attention_mask=padded))[1] >= whole
    assert fed(lambda: asked(model, ids.repeat(2, 1)))[1] >= 2 * whole
    with torch.autocast("cpu", torch.bfloat16):
        assert fed(asked, model, ids)[1] >= whole
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 0)
    assert fed(asked, model, ids)[1] >= whole
    handle.remove()
    assert fed(asked, model, ids)[1] <= QUESTIONS[0].shape[1] + NEAR + NEW


def test_a_copy_of_the_model_has_its_own(fed):
    model = with_cache()
    asked(model, DOCUMENT)
    assert fed(asked, copy.deepcopy(model), DOCUMENT)[1] >= DOCUMENT.shape[1]
    assert len(prefix._caches) >= 1


@pytest.mark.parametrize("most", ["1 GB", 2.5, -1])
def test_a_size_that_is_none(most):
    with pytest.raises(ValueError, match="prefix_cache_bytes must be a whole number"):
        with_cache(prefix_cache_bytes=most)


def test_threads():
    plain, model = small_model("bd_lru"), with_cache(most=60_000)  # texts are dropped meanwhile
    prompts = [after(DOCUMENT[:, : 100 * (i % 3 + 1)], tokens(rows=1, length=9, seed=i)) for i in range(12)]
    want, got = [asked(plain, ids) for ids in prompts], [None] * len(prompts)

    def ask(first):
        for i in range(first, len(prompts), 4):
            got[i] = asked(model, prompts[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
