"""`transformers serve` and `lrnn serve`, asked over HTTP by OpenAI's client: the texts of `generate`."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forks import run_code, run_lrnn
from rank_runs import free_port
from small_models import small_model

PROMPTS = [f"The river was {2**i}" for i in range(8)]
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
def checkpoint(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """An export with a chat template that may sample and keeps states, as docs/serving.md says."""
    from transformers import AutoTokenizer, GenerationConfig

    from lrnn_lm.runs.export import export

    served = export(checkpoint, tmp_path_factory.mktemp("served") / "model")
    AutoTokenizer.from_pretrained(served, chat_template=TEMPLATE).save_pretrained(served)
    GenerationConfig.from_pretrained(served, do_sample=True).save_pretrained(served)
    config = json.loads((served / "config.json").read_text())
    (served / "config.json").write_text(json.dumps({**config, "prefix_cache_bytes": 2**24}))
    return str(served)


def a_server(folder, **options):
    """transformers' server of a folder in this process, with a client of it; it ends with the generator."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="pip install 'lrnn-lm[serve]'")
    openai = pytest.importorskip("openai", reason="pip install 'lrnn-lm[serve]'")
    from transformers.cli.serve import Serve

    port = free_port()
    server = Serve(folder, device="cpu", port=port, non_blocking=True, **options)
    while not server.server.started:
        time.sleep(0.05)
    yield openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    server.kill_server()


@pytest.fixture(scope="module")
def client(folder):
    yield from a_server(folder)


@pytest.fixture(scope="module")
def batching(folder):
    """Of a server that decodes requests together."""
    yield from a_server(folder, continuous_batching=True)


@pytest.fixture
def alone(model, tokenizer):
    """The greedy text after a prompt or its tokens, as `generate` writes it."""

    def text(prompt, **options):
        ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        options = {"max_new_tokens": 16, "do_sample": False, **options}
        written = model.generate(torch.tensor([ids]), **options)[0, len(ids) :]
        return tokenizer.decode(written, skip_special_tokens=True)

    return text


@pytest.mark.slow  # a server's start takes seconds
def test_the_command_of_transformers_serves(folder, tmp_path, alone):
    """As a process that has not imported this package: it reads the model's own code."""
    openai = pytest.importorskip("openai", reason="pip install 'lrnn-lm[serve]'")
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--trust-remote-code",
               "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    log = tmp_path / "serve.txt"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.2)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        test_many_requests_at_once_have_the_texts_of_generate(client, folder, alone)
    finally:
        server.terminate()
        server.wait(20)


def test_many_requests_at_once_have_the_texts_of_generate(client, folder, alone):
    def ask(prompt):
        answer = client.completions.create(model=folder, prompt=prompt, max_tokens=16, temperature=0)
        return answer.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, PROMPTS))
    assert texts == [alone(prompt) for prompt in PROMPTS]
    assert len(set(texts)) > 4


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


SERVE_ASK_END = """
import os, sys, threading, time
from openai import APIConnectionError, OpenAI
from lrnn_lm.cli import main

folder, port, prompt, number = sys.argv[1:]
client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)

def ask():
    asked = {"prompt": prompt, "max_tokens": 16, "temperature": 0}
    while True:
        try:
            (model,) = client.models.list()
            print("model:", model.id)
            print("text:", client.completions.create(model=model.id, **asked).choices[0].text)
            break
        except APIConnectionError:
            time.sleep(0.05)
    os.kill(os.getpid(), int(number))

threading.Thread(target=ask, daemon=True).start()
main(["serve", folder, "--port", port, "--device", "cpu"])
"""


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param("plain", signal.SIGINT, marks=pytest.mark.slow),  # a server's start takes seconds
        ("named@oddly", signal.SIGTERM),
    ],
)
def test_lrnn_serve_answers_until_a_signal(checkpoint, tmp_path, alone, name, number):
    pytest.importorskip("fastapi", reason="pip install 'lrnn-lm[serve]'")
    folder, port = tmp_path / name, free_port()
    shutil.copytree(checkpoint, folder)
    done = run_code(SERVE_ASK_END, folder, port, PROMPTS[0], int(number))
    assert done.returncode == 0, done.stderr
    assert f"text: {alone(PROMPTS[0])}\n" in done.stdout
    listed = Path(done.stdout.partition("model: ")[2].splitlines()[0])
    assert not listed.exists() if "@" in name else listed == folder
    assert f"curl http://localhost:{port}/v1/completions" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_url_is_served_from_a_copy(checkpoint, tmp_path):
    from lrnn_lm.serve import _served

    copy = _served(f"file://{checkpoint}", tmp_path)
    assert copy != checkpoint
    assert (copy / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_a_sharded_checkpoint_is_exported_first(checkpoint, tmp_path, monkeypatch):
    from lrnn_lm.serve import _served

    folder, asked = tmp_path / "sharded", []
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "trainer" / "shards").mkdir(parents=True)
    monkeypatch.setattr("lrnn_lm.api.export_checkpoint", lambda *given: asked.append(given))
    assert _served(folder, tmp_path / "model") == tmp_path / "model"
    assert asked == [(folder, tmp_path / "model")]


def test_lrnn_serve_says_that_a_port_is_in_use(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_lrnn("serve", checkpoint, "--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"lrnn: port {port} of localhost is in use; give another --port or --host\n"


def test_a_port_taken_while_the_model_loads(checkpoint):
    code = "import lrnn_lm.serve as s; s._check_port = lambda *_: 0; from lrnn_lm.cli import main; main()"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_code(code, "serve", checkpoint, "--device", "cpu", "--port", taken.getsockname()[1])
    assert done.returncode == 2
    assert "lrnn: the server could not start at localhost, port" in done.stderr
    assert "Traceback" not in done.stderr


BAD_INPUT = [
    (["nothing/here"], "no such checkpoint folder"),
    (["hybrid", "--continuous-batching"], "this model has attention layers too"),
    (["hybrid", "--host", "nowhere.invalid"], "nowhere.invalid cannot be used: Name or"),
    (["hybrid", "--host", "192.0.2.1"], "192.0.2.1 cannot be used: Cannot assign requested address; give"),
    (["hybrid", "--device", "tpu"], "use auto, cpu, cuda"),
]


@pytest.mark.parametrize(("words", "message"), BAD_INPUT)
def test_bad_input_of_lrnn_serve(make_checkpoint, words, message):
    words = [make_checkpoint("hybrid") if word == "hybrid" else word for word in words]
    done = run_lrnn("serve", *words, "--port", free_port())
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_class_that_the_server_does_not_know(make_checkpoint, model):
    from lrnn_lm.serve import _check_model

    class Own(type(model)):
        pass

    own = Own(model.config)
    with pytest.raises(ValueError, match="Own is no class of transformers"):
        _check_model("folder", own, False)
