"""What `lrnn serve` adds to transformers' server: mistakes are told with 400, not with 500 or by silence."""

import shutil
import time

import pytest
from rank_runs import free_port

from lrnn_lm.serve_requests import checked, tell_mistakes

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'critic' %}{{ raise_exception('no critics here') }}"
    "{% endif %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
)
CHAT = [{"role": "user", "content": "Where is the river?"}]


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "batch"])
def client(request, make_checkpoint, tokenizer, tmp_path_factory):
    """Of transformers' server as `lrnn serve` has it, which may sample; without and with a batch."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="pip install 'lrnn-lm[serve]'")
    from openai import OpenAI
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.cli.serve import Serve
    from transformers.cli.serving import chat_completion, completion, response, utils

    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(make_checkpoint("bd_lru"), folder)
    AutoTokenizer.from_pretrained(folder, chat_template=TEMPLATE).save_pretrained(folder)
    GenerationConfig.from_pretrained(folder, do_sample=True).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "CBGenerateManager", utils.CBGenerateManager)
        for handler in (
            completion.CompletionHandler,
            chat_completion.ChatCompletionHandler,
            response.ResponseHandler,
        ):
            patch.setattr(handler, "handle_request", handler.handle_request)
        tell_mistakes("<s>")
        server = Serve(
            str(folder), device="cpu", port=(port := free_port()), non_blocking=True,
            continuous_batching=request.param,
        )  # fmt: skip
        while not server.server.started:
            time.sleep(0.05)
        yield OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
        server.kill_server()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"n": 3}, "n: this server does not know it"),
        ({"logprobs": 0}, "logprobs: this server does not know it"),
        ({"echo": True}, "echo: this"),
        ({"logit_bias": {"5": 100}}, "for chats only"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": "5"}, "max_tokens must be a whole number, not '5'"),
        ({"temperature": -1}, "temperature must be at least 0, not -1"),
        ({"top_p": 2}, "top_p must be from 0 to 1"),
        ({"seed": 2**70}, "seed must be from"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number, not 2.5"),
        ({"stop": 3}, "stop must be a text or a list"),
        ({"prompt": ["a", "b"]}, "prompt must be a string"),
        ({"frequency_penalty": -2}, "strictly positive"),
        ({"model": "gpt-4"}, "Server is pinned"),
        ({"messages": None}, "messages: give at least one"),
        ({"messages": []}, "messages: give at least one"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [{"content": "hello"}]}, r"messages\[0\] must be an object with a role"),
        (
            {"messages": [*CHAT, {"role": "user", "content": [{"type": "image_url"}]}]},
            r"\[1\]: this model reads text",
        ),
        ({"messages": CHAT, "logit_bias": {"5": None}}, "logit_bias must be numbers by token"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "no critics here"),
        ({"messages": CHAT, "n": 2}, "n: this server"),
        ({"messages": CHAT, "logprobs": True}, "logprobs: this"),
        ({"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format: this"),
    ],
)
def test_mistakes_are_told(client, asked, words):
    """They ended in 500 and a traceback in the log, or in an answer to something else."""
    from openai import BadRequestError

    chat = "messages" in asked
    body = {"max_tokens": 2, **({} if chat else {"prompt": "<s>The"}), **asked}
    with pytest.raises(BadRequestError, match=words):
        client.post("/chat/completions" if chat else "/completions", body=body, cast_to=object)


def test_what_says_nothing_is_taken(client):
    """As clients fill in fields that nobody set."""
    nothing = {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "presence_penalty": 0.0, "stop": [],
               "logit_bias": {}, "frequency_penalty": 0, "seed": -1, "top_p": 1}  # fmt: skip
    plain = {"prompt": "<s>", "max_tokens": 9, "temperature": 0}

    def text(**options):
        return client.completions.create(model="", **{**plain, **options}).choices[0].text

    wanted = text()
    assert text(**nothing) == text(stop="") == text(stop=[""]) == wanted
    assert text(max_tokens=9.0, n=1.0, seed=-1.0) == wanted  # as of clients whose numbers are fractions
    assert text(prompt=["<s>"]) == text(prompt="") == text(prompt=None) == wanted
    chats = {"model": "", "messages": CHAT, "max_tokens": 4, "temperature": 0}
    plainly, filled = (
        client.chat.completions.create(**chats, **options).choices[0].message.content
        for options in ({}, {"logprobs": False, "response_format": {"type": "text"}, "stop": [], "n": 1})
    )
    assert plainly == filled


def test_each_request_is_sampled_by_its_own_settings(client):
    """In a batch the first one's held for all."""
    plain = {"model": "", "prompt": "<s>The", "max_tokens": 12}
    settings = [{"temperature": 3.0}, {"temperature": 0}, {"temperature": 3.0}, {"temperature": 0}]
    drawn, likeliest, other, again = (
        client.completions.create(**plain, **options).choices[0].text for options in settings
    )
    assert likeliest == again
    assert likeliest not in (drawn, other)
    assert client.completions.create(**plain, temperature=3.0, top_p=0).choices[0].text == likeliest


def test_stop_strings(client, request):
    from openai import BadRequestError

    asked = {"model": "", "prompt": "<s>The", "max_tokens": 12, "temperature": 0}
    stop = client.completions.create(**asked).choices[0].text[2:4]
    if "batch" in request.node.callspec.id:
        with pytest.raises(BadRequestError, match="not stop_strings"):
            client.completions.create(**asked, stop=stop)
    else:
        assert client.completions.create(**asked, stop=stop).choices[0].finish_reason == "stop"


def test_half_of_a_character_is_no_text():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        checked({"prompt": "a\ud83d"}, "prompt", "")


def test_biases_may_be_whole_numbers():
    """As OpenAI's are; transformers takes fractions only."""
    asked = checked({"messages": CHAT, "logit_bias": {"5": 100}}, "messages", "")
    assert str(asked["logit_bias"]) == "{'5': 100.0}"


def test_an_answer_as_it_was_dumped_is_a_message(client):
    """With fields that are null or empty, as of model_dump(): it was status 500, or its text was not read."""
    asked = {"model": "", "max_tokens": 8, "temperature": 0}
    answer = {"role": "assistant", "content": "By the hill."}
    dumped = {**answer, "refusal": None, "audio": None, "function_call": None, "tool_calls": None}
    texts = [
        client.post(
            "/chat/completions", body={**asked, "messages": [*CHAT, message, *CHAT]}, cast_to=object
        )["usage"]
        for message in (answer, dumped, {**answer, "tool_calls": []})
    ]  # fmt: skip
    assert texts[0] == texts[1] == texts[2]
