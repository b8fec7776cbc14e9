"""`generate` by the ways that tests/model leaves out: embeddings, static caches, chunks, streams."""

from threading import Thread

import pytest
import torch
from small_models import HYBRIDS, OF_EACH_STATE, close, in_turn, small_model, tokens
from tolerances import TOLERANCE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize(("name", "beams"), in_turn([1, 2], OF_EACH_STATE))
def test_from_embeddings(name, beams):
    model, ids = small_model(name), tokens(length=6)
    embeddings = model.get_input_embeddings()(ids)
    want = model.generate(ids, num_beams=beams, **GREEDY)
    mask = torch.ones_like(ids)
    got = model.generate(inputs_embeds=embeddings, attention_mask=mask, num_beams=beams, **GREEDY)
    assert torch.equal(got, want[:, 6:])


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_from_embeddings_and_a_cache(name):
    model, ids = small_model(name), tokens(length=6)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    embeddings = model.get_input_embeddings()(ids)
    want = model.generate(inputs_embeds=embeddings, **options)
    first = model.generate(inputs_embeds=embeddings, **{**options, "max_new_tokens": 4})
    longer = torch.cat([embeddings, model.get_input_embeddings()(first.sequences)], dim=1)
    mask = torch.ones(longer.shape[:2], dtype=torch.long)
    last = model.generate(
        inputs_embeds=longer,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        **{**options, "max_new_tokens": 1},
    )
    close(last.logits[0], want.logits[4], TOLERANCE["other order of sums"])


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_static_caches(name):
    model, ids = small_model(name), tokens(length=6)
    want = model.generate(ids, **GREEDY)
    by_name = model.generate(ids, cache_implementation="static", disable_compile=True, **GREEDY)
    given = StaticCache(config=model.config, max_cache_len=16)
    assert torch.equal(by_name, want)
    assert torch.equal(model.generate(ids, past_key_values=given, disable_compile=True, **GREEDY), want)


@pytest.mark.parametrize(("name", "chunk"), in_turn([1, 4, 100], OF_EACH_STATE))
def test_prefill_in_chunks(name, chunk):
    model, ids = small_model(name), tokens(length=10)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    want = model.generate(ids, attention_mask=mask, **GREEDY)
    got = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": 1},
        {"assistant_model": 3},
        {"assistant_early_exit": 1},
    ],
    ids=["lookup", "smaller", "itself", "early exit"],
)
def test_assisted_decoding_of_attention(options):
    """Wrong guesses are cut out of the cache again: the text is that of greedy decoding. Also where it holds
    the padding token."""
    model, ids = small_model("attention"), tokens(rows=1, length=6).repeat(1, 3)
    if layers := options.get("assistant_model"):
        options = {"assistant_model": small_model("attention", num_hidden_layers=layers)}
    want = model.generate(ids, **GREEDY)
    for pad in (0, *want[0, 18:20].tolist()):
        if pad not in ids:
            settings = GREEDY | {"pad_token_id": pad}
            assert torch.equal(model.generate(ids, **options, **settings), want)


@pytest.mark.parametrize("name", ["bd_lru", "attention-window", *HYBRIDS])
def test_assistants_are_refused_where_not_all_keys_are_kept(name):
    model, attention = small_model(name), small_model("attention")
    for options in ({"assistant_model": attention}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="stateful"):
            model.generate(tokens(rows=1), **options, **GREEDY)
    with pytest.raises(ValueError, match="take an assistant whose layers are all attention"):
        attention.generate(tokens(rows=1), assistant_model=model, **GREEDY)


def test_streamed_text_is_the_text(make_checkpoint, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint())
    inputs = tokenizer("The river", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {**GREEDY, "max_new_tokens": 12}
    worker = Thread(target=model.generate, kwargs={**inputs, **options, "streamer": streamer})
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert text == tokenizer.decode(model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", ["bd_lru", "hybrid"])
def test_pipeline_with_prompts_of_unequal_length(name, make_checkpoint):
    folder = make_checkpoint(name)
    writer = pipeline("text-generation", model=str(folder), device="cpu")
    prompts = ["The river", "She carried two buckets and", "A"]
    options = {"max_new_tokens": 6, "do_sample": False}
    together = [out[0]["generated_text"] for out in writer(prompts, batch_size=3, **options)]
    alone = [writer(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert together == alone
    assert all(text.startswith(prompt) for text, prompt in zip(together, prompts, strict=True))


def test_a_saved_folder_is_enough(make_checkpoint, tmp_path):
    """What `push_to_hub` would upload is what `save_pretrained` writes: it loads by itself."""
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint())
    model.save_pretrained(tmp_path / "copy")
    AutoTokenizer.from_pretrained(make_checkpoint()).save_pretrained(tmp_path / "copy")
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "copy").iterdir()
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    ids = tokens(length=8)
    close(again(ids).logits, model(ids).logits, 0)
