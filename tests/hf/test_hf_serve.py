"""`transformers serve` on an exported folder, asked over HTTP by OpenAI's client: the texts of `generate`."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_models import small_model

PROMPTS = [f"The river was {2**i}" for i in range(16)]
CHAT = [{"role": "user", "content": "Where is the river?"}]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def model(tokenizer):
    """One that writes letters: a stream holds back an unfinished character, which `generate` shows."""
    model = small_model("bd_lru", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1)
    others = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).strip().isalpha()]
    with torch.no_grad():
        model.lm_head.weight[others] = 0
    return model


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    """An export with a chat template that may sample and keeps states, as docs/serving.md says."""
    from transformers import AutoTokenizer, GenerationConfig

    from lrnn_lm.runs.export import export

    checkpoint = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    served = export(checkpoint, tmp_path_factory.mktemp("served") / "model")
    AutoTokenizer.from_pretrained(served, chat_template=TEMPLATE).save_pretrained(served)
    GenerationConfig.from_pretrained(served, do_sample=True).save_pretrained(served)
    config = json.loads((served / "config.json").read_text())
    (served / "config.json").write_text(json.dumps({**config, "prefix_cache_bytes": 2**24}))
    return str(served)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="pip install 'lrnn-lm[serve]'")
    openai = pytest.importorskip("openai", reason="pip install 'lrnn-lm[serve]'")
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--trust-remote-code",
               "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    log = tmp_path_factory.mktemp("log") / "serve.txt"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=log.parent, stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.2)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def alone(model, tokenizer):
    """The greedy text after a prompt or its tokens, as `generate` writes it."""

    def text(prompt, **options):
        ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        options = {"max_new_tokens": 16, "do_sample": False, **options}
        written = model.generate(torch.tensor([ids]), **options)[0, len(ids) :]
        return tokenizer.decode(written, skip_special_tokens=True)

    return text


def test_many_requests_at_once_have_the_texts_of_generate(client, folder, alone):
    def ask(prompt):
        answer = client.completions.create(model=folder, prompt=prompt, max_tokens=16, temperature=0)
        return answer.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, PROMPTS))
    assert texts == [alone(prompt) for prompt in PROMPTS]
    assert len(set(texts)) > 8


def test_questions_on_one_document_have_the_texts_of_generate(client, folder, alone):
    for number in range(3):
        prompt = "The gardener walked to the river. " * 40 + f"Question {number}"
        answer = client.completions.create(model=folder, prompt=prompt, max_tokens=8, temperature=0)
        assert answer.choices[0].text == alone(prompt, max_new_tokens=8)


def test_streams(client, folder, alone):
    stream = client.completions.create(
        model=folder, prompt="<s>The river", max_tokens=16, temperature=0, stream=True
    )
    parts = [chunk.choices[0].text for chunk in stream]
    assert len(parts) > 8
    assert "".join(parts) == alone("<s>The river")


def test_a_client_that_leaves_harms_nobody(client, folder, alone):
    options = {"model": folder, "prompt": PROMPTS[1], "temperature": 0}
    with client.completions.create(stream=True, max_tokens=4000, **options) as stream:
        next(iter(stream))
    assert client.completions.create(max_tokens=16, **options).choices[0].text == alone(PROMPTS[1])


def test_stop_string_ends_the_text(client, folder, tokenizer, alone):
    whole = alone(PROMPTS[0])
    stop = whole[len(whole) // 2 :][:3]
    options = {"model": folder, "prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0, "stop": [stop]}
    answer = client.completions.create(**options).choices[0]
    assert answer.text == alone(PROMPTS[0], stop_strings=[stop], tokenizer=tokenizer)
    assert answer.finish_reason == "stop"
    assert whole.startswith(answer.text)
    assert answer.text != whole
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **options))
    assert streamed == answer.text


def test_chat_goes_by_the_template(client, folder, tokenizer, alone):
    want = alone(
        tokenizer.apply_chat_template(
            CHAT, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
        )
    )
    options = {"model": folder, "messages": CHAT, "max_tokens": 16, "temperature": 0}
    assert client.chat.completions.create(**options).choices[0].message.content == want
    stream = client.chat.completions.create(stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == want


def test_temperature_samples(client, folder, alone):
    def ask(seed):
        answer = client.completions.create(
            model=folder, prompt=PROMPTS[0], max_tokens=16, temperature=2, seed=seed
        )
        return answer.choices[0].text

    first = ask(1)
    assert ask(1) == first != ask(2)
    assert first != alone(PROMPTS[0])


def test_stop_strings_of_generate(tokenizer, alone):
    whole = alone(PROMPTS[0])
    stop = whole[len(whole) // 2 :][:3]
    text = alone(PROMPTS[0], stop_strings=[stop], tokenizer=tokenizer)
    assert whole.startswith(text)
    assert stop in text != whole
    beams = alone(PROMPTS[0], num_beams=2)
    assert alone(PROMPTS[0], num_beams=2, stop_strings=["0"], tokenizer=tokenizer) == beams


@pytest.fixture(scope="module")
def batching(client, folder):
    """A client of a server in this process that decodes requests together."""
    from openai import OpenAI
    from transformers.cli.serve import Serve

    port = free_port()
    server = Serve(folder, continuous_batching=True, device="cpu", port=port, non_blocking=True)
    while not server.server.started:
        time.sleep(0.05)
    yield OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    server.kill_server()


def test_64_requests_in_one_batch(batching, folder, alone):
    prompts = [f"The river was {i}" for i in range(64)]

    def ask(i):
        options = {"model": folder, "prompt": prompts[i], "max_tokens": 4 + i % 9, "temperature": 0}
        if i % 2:
            return batching.completions.create(**options).choices[0].text
        return "".join(chunk.choices[0].text for chunk in batching.completions.create(stream=True, **options))

    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(ask, range(64)))
    wrong = [i for i, text in enumerate(texts) if text != alone(prompts[i], max_new_tokens=4 + i % 9)]
    assert wrong == []
    assert len(set(texts)) > 32


def test_chat_in_a_batch(batching, folder, tokenizer, alone):
    options = {"chat_template": TEMPLATE, "add_generation_prompt": True, "return_dict": False}
    answer = batching.chat.completions.create(model=folder, messages=CHAT, max_tokens=16, temperature=0)
    assert answer.choices[0].message.content == alone(tokenizer.apply_chat_template(CHAT, **options))


def test_a_client_that_leaves_a_batch(batching, folder, alone):
    options = {"model": folder, "prompt": PROMPTS[1], "temperature": 0}
    with batching.completions.create(stream=True, max_tokens=10**6, **options) as stream:
        next(iter(stream))
    assert batching.completions.create(max_tokens=16, **options).choices[0].text == alone(PROMPTS[1])
