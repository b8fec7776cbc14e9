"""Continuous batching: requests join and leave one batch at any token, with the texts of `generate` alone."""

import asyncio
import time
from types import SimpleNamespace

import pytest
import torch
from small_models import small_model, tokens
from transformers import GenerationConfig

from lrnn_lm.model.decoding import batch as batch_module
from lrnn_lm.model.decoding.batch import Batch, Request
from lrnn_lm.model.decoding.prefix import _caches

LENGTHS = (5, 1, 12, 7, 40)  # 5 and 7 are read together, with padding
PROMPTS = [tokens(rows=1, length=length, seed=i) for i, length in enumerate(LENGTHS)]


def alone(model, ids, **options):
    out = model.generate(ids.to(model.device), do_sample=False, **options)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture
def manager():
    """A function that starts the manager of a model; it is stopped at the end."""
    started = []

    def start(model, **options):
        started.append(model.init_continuous_batching(GenerationConfig(**options)))
        started[0].start()
        return started[0]

    yield start
    started[0].stop()
    assert not started[0].is_running()


def results(manager, ids):
    """The last outputs of requests, by id."""
    done = {}
    while len(done) < len(ids):
        output = manager.get_result(timeout=20)
        assert output is not None
        if output.is_finished():
            done[output.request_id] = output
    return done


@pytest.mark.parametrize("name", ["h_lru", "bd_gru", "mamba2", "mlstm"])
def test_texts_are_those_of_generate(name):
    model = small_model(name)
    got = model.generate_batch([ids[0].tolist() for ids in PROMPTS], max_new_tokens=6)
    assert [out.generated_tokens for out in got.values()] == [
        alone(model, p, max_new_tokens=6) for p in PROMPTS
    ]


@pytest.mark.parametrize("name", ["bd_lru-all", "bd_matrix-erase", "lstm"])
def test_rows_beside_those_of_requests_change_nothing(name, monkeypatch):
    """A GPU's sizes of a batch, powers of 2, here."""
    monkeypatch.setattr("lrnn_lm.model.decoding.batch._GRAPHS", ("cpu",))
    test_texts_are_those_of_generate(name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_requests_join_and_leave_at_any_token(manager, device):
    model = small_model("bd_lru").to(device)
    end = alone(model, PROMPTS[2], max_new_tokens=30)[7]
    batch = manager(model, eos_token_id=end)
    asked = {}
    for i in range(64):
        prompt, most = PROMPTS[i % 5], 1 + i % 17
        asked[batch.add_request(prompt[0].tolist(), max_new_tokens=most)] = prompt, most
        time.sleep(0.002 * (i % 3))
    for name, output in results(batch, asked).items():
        prompt, most = asked[name]
        assert output.generated_tokens == alone(
            model, prompt, max_new_tokens=most, eos_token_id=end, pad_token_id=end
        )
        assert output.error is None


def test_streams_and_leaves_when_asked(manager):
    model = small_model("h_lru")
    batch = manager(model, max_new_tokens=10**6)
    endless = batch.add_request([3, 4], streaming=True)
    first, later = batch.get_result(endless, timeout=20), batch.get_result(endless, timeout=20)
    assert len(first.generated_tokens) < len(later.generated_tokens)
    batch.cancel_request(endless)
    other = batch.add_request([3, 4], max_new_tokens=5)
    want = alone(model, torch.tensor([[3, 4]]), max_new_tokens=5)
    assert batch.get_result(other, timeout=20).generated_tokens == want


def test_reads_a_document_once(manager):
    model, document = small_model("bd_lru"), tokens(rows=1, length=1500)
    model.config.prefix_cache_bytes = 2**24
    batch = manager(model)
    for length in (9, 12):
        ids = torch.cat([document, tokens(rows=1, length=length, seed=length)], dim=1)
        want = alone(model, ids, max_new_tokens=4, use_cache=True)
        got = batch.get_result(batch.add_request(ids[0].tolist(), max_new_tokens=4), timeout=20)
        assert got.generated_tokens == want
    ends = [max(text.states) for text in _caches[model]._texts]
    assert max(ends) == ids.shape[1] + 3


@pytest.mark.parametrize("kept", [0, 2**24])
def test_a_long_prompt_stops_nobody(kept, monkeypatch):
    monkeypatch.setattr(batch_module, "_MESSAGE", 0)
    model = small_model("bd_lru")
    model.config.prefix_cache_bytes = kept
    batch = Batch(model)
    long, short = (
        Request(name, [3] * length, most=50, ends=set(), streaming=True)
        for name, length in (("long", 5000), ("short", 4))
    )
    with torch.no_grad():
        batch.go_on([short])
        batch.go_on([long])
        read = 0
        while not long.written:
            before = len(short.written)
            assert batch.go_on([]) == [short, *([long] if long.written else [])]
            assert len(short.written) == before + 1
            read += 1
    assert read >= 2
    long.cancelled = True
    with torch.no_grad():
        assert batch.go_on([]) == [short]


@torch.no_grad()
def test_streams_take_turns(monkeypatch):
    """Each is told its first token at once, then as many together as came in a millisecond a stream."""
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(batch_module, "time", clock)
    batch = Batch(small_model("bd_lru"))
    streams = [Request(str(i), [3 + i], most=9, ends=set(), streaming=True) for i in range(4)]
    whole = Request("whole", [3], most=6, ends=set(), streaming=False)
    now = 100.0
    told = [batch.go_on([*streams, whole])]
    for _ in range(7):
        now += 0.0015
        told.append(batch.go_on([]))
    assert len(streams[0].written) == 9
    assert [turn for turn, requests in enumerate(told) if whole in requests] == [4]  # once it is whole
    for stream in streams:
        assert [turn for turn, requests in enumerate(told) if stream in requests] == [0, 3, 6, 7]


def test_draws(manager):
    """Rows are drawn each for itself, from the likeliest tokens only."""
    model = small_model("bd_lru")
    batch = manager(model, do_sample=True, top_k=2, temperature=1.5)
    asked = [batch.add_request([5, 6, 7], max_new_tokens=6) for _ in range(8)]
    texts = [output.generated_tokens for output in results(batch, asked).values()]
    assert len({*map(tuple, texts)}) > 1
    ids = torch.tensor([[5, 6, 7, *texts[0]]])
    with torch.no_grad():
        best = model(ids).logits[0, 2:-1].topk(2).indices
    assert all(token in row for token, row in zip(texts[0], best.tolist(), strict=True))


def test_a_batch_that_fails_tells_those_who_wait(manager, monkeypatch):
    model = small_model("bd_lru")
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    batch = manager(model)
    monkeypatch.setattr(type(batch._batch), "_read", lambda self, group: torch.ones(2) @ torch.ones(3))
    asked = [batch.add_request([token], max_new_tokens=5) for token in (3, 4)]
    assert all("size" in output.error for output in results(batch, asked).values())
    assert batch.background_thread_status.fatal_error is not None
    with pytest.raises(RuntimeError, match="has stopped"):
        batch.add_request([3])


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("hybrid", {}, r"^continuous batching joins recurrent states, and this model has attention layers"),
        ("bd_lru", {"repetition_penalty": 2.0}, "not RepetitionPenaltyLogitsProcessor"),
        ("bd_lru", {"stop_strings": ["x"]}, "not stop_strings"),
        ("bd_lru", {"num_beams": 2, "bad_words_ids": [[3]]}, "not num_beams, bad_words_ids:"),
        ("bd_lru", {"min_new_tokens": 2, "eos_token_id": 3}, "not min_new_tokens:"),
    ],
)
def test_refused(name, options, match):
    with pytest.raises(ValueError, match=match):
        small_model(name).generate_batch([[3, 4], [5]], GenerationConfig(**options), max_new_tokens=2)


def test_lengths_are_those_of_generate(manager):
    """`max_length` counts the prompt; it was ignored, for 20 tokens."""
    model, prompts = small_model("bd_lru"), [[3, 4, 5], [6]]
    for options in ({"max_length": 7}, {"max_length": 7, "max_new_tokens": 2}, {"max_length": 30}):
        config = GenerationConfig(eos_token_id=None, do_sample=False, **options)
        got = [out.generated_tokens for out in model.generate_batch(prompts, config).values()]
        assert got == [alone(model, torch.tensor([ids]), generation_config=config) for ids in prompts]
    batch = manager(model, max_length=3)
    with pytest.raises(
        ValueError, match="the prompt has 3 tokens and max_length is 3, which counts them too"
    ):
        batch.add_request([3, 4, 5])


def test_settings_are_those_of_generate():
    """Keywords and the model's own settings, beside a config or not; all but max_new_tokens were ignored."""
    model, prompts = small_model("bd_lru"), [[3, 4, 5], [6]]

    def check(*given, **options):
        got = [out.generated_tokens for out in model.generate_batch(prompts, *given, **options).values()]
        as_config = {"generation_config": given[0]} if given else {}
        want = [
            model.generate(torch.tensor([ids]), **as_config, **options)[0, len(ids) :].tolist()
            for ids in prompts
        ]
        assert got == want
        return got

    for given in ((), (GenerationConfig(do_sample=False),)):
        assert [*map(len, check(*given, max_length=7))] == [4, 6]
        (end, *_), _ = check(*given, max_new_tokens=1)
        assert [end] in check(*given, eos_token_id=end, max_length=30)
        model.generation_config.update(max_length=9, eos_token_id=end)
        assert [end] in check(*given)
        assert max(map(len, check(*given, eos_token_id=None))) <= 8
        model.generation_config.update(max_length=None, eos_token_id=None)
    assert model.generation_config.max_new_tokens is None, "a call leaves no setting behind"
    model.generation_config.repetition_penalty = 2.0
    with pytest.raises(ValueError, match="not RepetitionPenaltyLogitsProcessor"):
        model.generate_batch(prompts, GenerationConfig(max_new_tokens=2))


def test_keywords_that_nothing_reads_are_refused():
    """A typo was ignored, and so was a processor of scores; `generate` refuses both, or uses them."""
    model, prompts = small_model("bd_lru"), [[3, 4, 5], [6, 7, 8]]
    for name in ("max_new_token", "logits_processor"):
        with pytest.raises(ValueError, match=f"not used by the model.*'{name}'"):
            model.generate_batch(prompts, **{name: 3})
    theirs = {"progress_bar": False, "warmup": False, "record_timestamps": False}
    got = [out.generated_tokens for out in model.generate_batch(prompts, max_new_tokens=3, **theirs).values()]
    ids = torch.tensor(prompts)
    paged = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, cache_implementation="paged"
    )  # which calls generate_batch with all its keywords
    assert paged.reshape(2, -1)[:, 3:].tolist() == got


@pytest.mark.parametrize("name", ["position_ids", "inputs_embeds", "reset"])
def test_arguments_of_a_pass_are_refused(name):
    """They were dropped, as the model's forward pass knows them."""
    with pytest.raises(ValueError, match=f"takes lists of tokens, and no {name}"):
        small_model("bd_lru").generate_batch([[3, 4]], **{name: torch.ones(1, 2, dtype=torch.long)})


def test_padding_is_refused():
    """It was read as text."""
    model, ids, mask = small_model("bd_lru"), torch.tensor([[0, 3], [4, 5]]), torch.tensor([[0, 1], [1, 1]])
    words = "takes lists of tokens, and no padding"
    with pytest.raises(ValueError, match=words):
        model.generate(ids, attention_mask=mask, cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(ValueError, match=words):
        model.generate_batch(ids.tolist(), attention_mask=mask, max_new_tokens=2)


def test_a_model_in_training_stays_in_training():
    """All of it was in evaluation mode after, so a training loop went on without checkpointing or z-loss."""
    model = small_model("bd_lru").train()
    model.lm_head.eval()
    model.generate_batch([[3, 4]], max_new_tokens=2)
    assert [name for name, part in model.named_modules() if not part.training] == ["lm_head"]


@pytest.mark.parametrize(
    "inputs",
    ["text", [["3"]], [[1.5]], [[True]], [torch.tensor([3, 4])], torch.tensor([[3, 4]]), {"input_ids": 3}],
)
def test_prompts_that_are_no_lists_of_tokens(inputs):
    """Some ended in a traceback from within, others in {} for all prompts."""
    with pytest.raises(ValueError, match=r"inputs\[0\]: the prompt must be a list of whole numbers"):
        small_model("bd_lru").generate_batch(inputs, max_new_tokens=2)


def test_outputs_as_they_come(manager):
    """As in transformers' examples: of all requests, and of one that streams."""
    model = small_model("bd_lru")
    batch = manager(model, max_new_tokens=4, do_sample=False)
    batch.add_requests([[3], [4, 5]])
    two = (output for output in batch if output.is_finished())
    got = sorted((next(two).generated_tokens, next(two).generated_tokens))
    assert got == sorted(alone(model, torch.tensor([ids]), max_new_tokens=4) for ids in ([3], [4, 5]))
    mine = batch.add_request([6], streaming=True)
    *_, last = batch.request_id_iter(mine)
    assert last.generated_tokens == alone(model, torch.tensor([[6]]), max_new_tokens=4)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "no token"),
        ([3, 53], "tokens outside of the model's 53"),
        ([3] * 7, "7 tokens and max_length is 7"),
    ],
)
def test_a_prompt_that_is_none_is_named_before_any_is_answered(prompt, match, monkeypatch):
    """transformers logged it, and the whole call returned {}."""
    model = small_model("bd_lru")
    monkeypatch.setattr(model, "init_continuous_batching", None)
    with pytest.raises(ValueError, match=rf"^inputs\[1\]: the prompt has .*{match}"):
        model.generate_batch([[3, 4], prompt, [5]], max_length=7)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate_batch([[3, 4]], max_new_tokens=0)


@pytest.mark.parametrize(("prompt", "match"), [([], "has no token"), ([3, 53], "outside of the model's 53")])
def test_a_prompt_that_is_none(manager, prompt, match):
    with pytest.raises(ValueError, match=match):
        manager(small_model("bd_lru")).add_request(prompt)


def test_a_request_that_cannot_be(manager):
    batch = manager(small_model("bd_lru"), max_new_tokens=10**6)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        batch.add_request([3], max_new_tokens=0)
    batch.add_request([3], "mine")
    with pytest.raises(ValueError, match="'mine' is not answered yet"):
        batch.add_request([3], "mine")
    batch.cancel_request("mine")
    assert batch.add_request([3], "mine", max_new_tokens=1) == "mine"


def test_one_id_twice_leaves_the_first_its_answer(manager):
    """As where a proxy asks again: the second took the first one's handler, so nobody ever answered it."""
    model = small_model("bd_lru")
    batch = manager(model, max_new_tokens=300, do_sample=False)

    async def ask():
        told = asyncio.get_running_loop().create_future()
        batch.register_result_handler("mine", told.set_result)  # as transformers' server, first
        batch.add_request([3], "mine")
        with pytest.raises(ValueError, match="'mine' is not answered yet"):
            batch.register_result_handler("mine", None)
        answer = await asyncio.wait_for(told, 20)
        for _ in range(2):  # nor is an id lost by a prompt that cannot be answered
            batch.register_result_handler("mine", None)
            with pytest.raises(ValueError, match="no token"):
                batch.add_request([], "mine")
        return answer

    assert asyncio.run(ask()).generated_tokens == alone(model, torch.tensor([[3]]), max_new_tokens=300)


def test_each_request_has_its_own_settings(manager):
    """Those of the first held for all. Top 1 of a drawn token is the likeliest."""
    model = small_model("bd_lru")
    batch = manager(model, max_new_tokens=12, do_sample=True)
    settings = [{"do_sample": False}, {"do_sample": True}, {"do_sample": True, "top_k": 1}] * 3
    ids = []
    for number, options in enumerate(settings):
        batch.configure(GenerationConfig(max_new_tokens=12, **options))
        ids.append(batch.add_request([3, 4], str(number)))
    with pytest.raises(ValueError, match="not stop_strings"):
        batch.configure(GenerationConfig(stop_strings=["a"]))
    done = results(batch, ids)
    texts = [done[id].generated_tokens for id in ids]
    likeliest = alone(model, torch.tensor([[3, 4]]), max_new_tokens=12)
    assert [text == likeliest for text in texts] == [options != {"do_sample": True} for options in settings]
