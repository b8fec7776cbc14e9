"""`generate`: with and without a cache, by every way of choosing, padded or continued."""

import pytest
import torch
import transformers
from small_models import OF_EACH_KIND, OF_EACH_STATE, close, small_model, tokens
from tolerances import TOLERANCE
from transformers import DynamicCache

from lrnn_lm.model import prefill
from lrnn_lm.model.cache import tokens_seen

OLD = [int(n) for n in transformers.__version__.split(".")[:2]] < [5, 21]  # reads no chunks after a cache
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled-beams": {"do_sample": True, "num_beams": 2},
}


def generate(model, ids, **options):
    torch.manual_seed(5)
    return model.generate(ids, max_new_tokens=7, pad_token_id=0, **options)


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in OF_EACH_STATE for way in WAYS],
)
def test_with_and_without_a_cache(name, way):
    model, ids = small_model(name), tokens(length=6)
    cached = generate(model, ids, use_cache=True, **WAYS[way])
    assert cached.shape == (2, 13)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **WAYS[way]))


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_left_padded_prompts(name):
    model, ids = small_model(name), tokens(length=6)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # one token is left
    padded = generate(model, ids.masked_fill(mask == 0, 0), attention_mask=mask, do_sample=False)
    assert torch.equal(padded[0, 5:], generate(model, ids[:1, 5:], do_sample=False)[0])
    assert torch.equal(padded[1], generate(model, ids[1:], do_sample=False)[0])


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_a_given_cache_is_continued(name):
    model, ids = small_model(name), tokens(length=12)
    for cache in (DynamicCache(config=model.config), None):
        with torch.no_grad():
            cache = model(ids[:, :9], past_key_values=cache, use_cache=True).past_key_values
        assert torch.equal(
            generate(model, ids, past_key_values=cache, do_sample=False),
            generate(model, ids, do_sample=False),
        )


@pytest.mark.parametrize("name", OF_EACH_STATE)
@pytest.mark.parametrize("new", [1, 3, 8])
def test_a_given_cache_is_continued_whatever_the_config_says_of_caches(name, new):
    """Folders that were trained with gradient checkpointing say False: the text was read again after it."""
    model, ids = small_model(name), tokens(length=12)
    want = generate(model, ids, do_sample=False)
    for options in ({"use_cache": False}, {"attention_mask": torch.ones_like(ids)}):
        model.generation_config.use_cache = False
        cache = prefill(model, ids[:, :-new]).past_key_values
        assert torch.equal(generate(model, ids, past_key_values=cache, do_sample=False, **options), want)
    cache = prefill(model, ids[:, :-new]).past_key_values
    options = {"past_key_values": cache, "attention_mask": torch.ones_like(ids), "do_sample": False}
    assert torch.equal(generate(model, ids[:, -new:], **options)[:, new:], want[:, 12:])


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_a_returned_cache_is_continued(name):
    model, ids = small_model(name), tokens(length=6)
    first = generate(model, ids, do_sample=False, return_dict_in_generate=True)
    ids, mask = first.sequences, torch.ones_like(first.sequences)  # a generated 0 is a word, not padding
    longer = generate(model, ids, attention_mask=mask, past_key_values=first.past_key_values, do_sample=False)
    assert torch.equal(longer, generate(model, ids, attention_mask=mask, do_sample=False))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 2}])
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_a_cache_that_has_seen_as_many_tokens_as_there_are(name, options):
    """The new tokens alone, as a tokenizer gives them: unless the mask tells, they seem to have been read."""
    model, ids = small_model(name), tokens(rows=1, length=12)
    for new in (2, 6):  # fewer than the cache has seen, and as many
        question, mask = ids[:, -new:], torch.ones_like(ids)
        embeds = model.get_input_embeddings()(question)
        for given in (
            {"inputs": question},
            {"inputs": question, "attention_mask": torch.ones_like(question)},
            {"inputs": ids[:, :-new], "attention_mask": mask[:, :-new]},  # and the text of the cache again
            {"inputs": None, "inputs_embeds": embeds},
        ):
            with torch.no_grad():
                cache = model(ids[:, :-new], use_cache=True).past_key_values
            cache.batch_repeat_interleave(options.get("num_beams", 1))
            with pytest.raises(ValueError, match=f"the cache has seen {12 - new}, so none is new"):
                model.generate(**given, past_key_values=cache, max_new_tokens=2, do_sample=False, **options)
            assert tokens_seen(cache) == 12 - new
        asked = {"attention_mask": mask, "past_key_values": cache, "do_sample": False, **options}
        if "prefill_chunk_size" in options and OLD:
            with pytest.raises(ValueError, match="does not count a cache's tokens"):
                generate(model, question, **asked)
            continue
        got = generate(model, question, **asked)
        assert torch.equal(got[:, new:], generate(model, ids, do_sample=False, **options)[:, 12:])


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_embeddings_after_a_cache_are_those_of_the_whole_text(name):
    """Of new ones alone as many were dropped as the cache has seen, though the mask tells of all."""
    model, ids = small_model(name), tokens(length=12)
    embeds, mask = model.get_input_embeddings()(ids), torch.ones_like(ids)
    options = {"attention_mask": mask, "do_sample": False}
    whole = {"inputs": None, "max_new_tokens": 7, "pad_token_id": 0, **options}
    for seen in (5, 8):
        for given, refused in ((embeds, False), (embeds[:, seen:], True)):
            cache = prefill(model, ids[:, :seen]).past_key_values
            if refused:
                with pytest.raises(ValueError, match=r"inputs_embeds has .* the whole text"):
                    model.generate(inputs_embeds=given, past_key_values=cache, **whole)
            else:
                got = model.generate(inputs_embeds=given, past_key_values=cache, **whole)
                assert torch.equal(got, generate(model, ids, **options)[:, 12:])


def test_scores_are_the_logits_of_a_full_pass():
    model, ids = small_model("hybrid"), tokens(length=6)
    out = generate(model, ids, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        full = model(out.sequences).logits[:, 5:-1]
    close(torch.stack(out.logits, dim=1), full, TOLERANCE["other order of sums"])


def checkpointed(name, reentrant):
    """In training mode, with layers that are recomputed for the backward pass."""
    model = small_model(name).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("name", "reentrant"),
    [*((name, False) for name in OF_EACH_STATE), *((name, True) for name in OF_EACH_KIND)],
)
def test_gradient_checkpointing_keeps_what_came_before(name, reentrant):
    model, want, ids = checkpointed(name, reentrant), small_model(name), tokens(length=12)
    for way in ("greedy", "beams"):
        assert torch.equal(generate(model, ids, **WAYS[way]), generate(want, ids, **WAYS[way]))
    logits = want(ids).logits[:, -1:]
    close(prefill(model, ids, 5).logits, logits, TOLERANCE["other order of sums"])
    for context in (torch.no_grad(), torch.enable_grad()):
        for first in ({"past_key_values": DynamicCache(config=model.config)}, {"use_cache": True}):
            with context:
                cache = model(ids[:, :7], **first).past_key_values
                got = model(ids[:, 7:], past_key_values=cache)
            assert tokens_seen(got.past_key_values) == 12
            close(got.logits[:, -1:], logits, TOLERANCE["other order of sums"])


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_gradients_through_a_cache_are_those_without_checkpointing(name):
    ids, grads = tokens(length=12), []
    for model in (checkpointed(name, False), small_model(name)):
        cache = model(ids[:, :7], past_key_values=DynamicCache(config=model.config)).past_key_values
        model(ids[:, 7:], past_key_values=cache).logits.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_training_recomputes_layers():
    """Without a cache each block runs twice."""
    model, ids, calls = checkpointed("bd_lru", False), tokens(length=6), []
    model.model.layers[1].mixer.register_forward_hook(lambda *_: calls.append(1))
    out = model(ids, labels=ids)
    assert out.past_key_values is None
    out.loss.backward()
    assert len(calls) == 2
    model.gradient_checkpointing_disable()
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 3


def test_a_model_that_gives_no_cache_back():
    model, ids = small_model("bd_lru"), tokens(length=12)
    model.forward = lambda *args, forward=model.forward, **kwargs: forward(
        *args, **{**kwargs, "use_cache": False}
    )
    with pytest.raises(ValueError, match="no cache back"):
        prefill(model, ids, 5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"inputs": torch.zeros(1, 0)}, r"input_ids of shape \(1, 0\) .*BOS"),  # a tokenizer's, of no text
        ({"inputs": torch.tensor([3, 4])}, r"input_ids of shape \(2,\) must be \(rows, tokens\)"),
        ({"input_ids": [[3, 4]]}, r"input_ids is a list, not a tensor \(rows, tokens\)"),
        ({"input_ids": torch.ones(1, 2).numpy()}, "input_ids is a ndarray, not a tensor"),
        (
            {"inputs_embeds": torch.ones(3, 16)},
            r"inputs_embeds of shape \(3, 16\) must be \(rows, tokens, hid",
        ),
    ],
)
def test_prompts_that_are_none(given, words):
    """Errors from within transformers named no argument."""
    with pytest.raises(ValueError, match=words):
        small_model("bd_lru").generate(**given, max_new_tokens=2)
