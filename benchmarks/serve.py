"""Tokens per second of `transformers serve --continuous-batching` beside those of decoding alone, on a CPU.

    python -m benchmarks.serve FOLDER [REQUESTS [TOKENS]]     an exported folder; 64 requests of 256 tokens

In turns, three times: the decoding step that `lrnn bench decode` times, at that batch; as many requests at
once whose answers come whole; the same, streamed. The model has one thread. A rate is told by the clock and
per second of CPU time of the process that computes, with all of its threads: on a machine that others use
too, CPU time says more. The server's count the prompts' time, but not their tokens. A text is wrong if it is
not that of decoding alone.
"""

import http.client
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer

from lrnn_lm.model import LRNNForCausalLM
from lrnn_lm.model.cache import make_cache
from lrnn_lm.model.decoding.decode import decode_step

ROUNDS, PORT = 3, 8931
TICK = os.sysconf("SC_CLK_TCK")

Measured = tuple[float, float, list[str]]  # seconds by the clock and of CPU time, texts


class Server:
    """`transformers serve` of a folder, in a process of its own."""

    def __init__(self, folder: str, log: Path):
        self.folder, self.log = folder, log
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu",
                   "--trust-remote-code", "--continuous-batching", "--port", str(PORT)]  # fmt: skip
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)

    def ask(self, prompt: str, tokens: int, stream: bool) -> str:
        """The text after a prompt."""
        connection = http.client.HTTPConnection("localhost", PORT)
        body = {
            "model": self.folder,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": stream,
        }
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse().read().decode()
        parts = [line.removeprefix("data: ") for line in answer.split("\n\n") if line] if stream else [answer]
        try:
            return "".join(json.loads(part)["choices"][0].get("text", "") for part in parts)
        except (ValueError, LookupError):
            raise SystemExit(
                f"the server answered {parts[-1][:200]!r}. If the model is untrained, take a trained one: "
                "its bytes are no UTF-8 text, which tokenizers' DecodeStream refuses"
            ) from None

    def wait(self, prompt: str) -> None:
        """Until it has answered."""
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text()[-3000:])
            try:
                self.ask(prompt, 4, False)
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError("the server does not answer")

    def cpu(self) -> float:
        """Seconds of CPU time that it has taken."""
        times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(times[11]) + int(times[12])) / TICK

    def answer(self, prompts: list[str], tokens: int, stream: bool) -> Measured:
        """All prompts at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            start, cpu = time.perf_counter(), self.cpu()
            texts = list(pool.map(lambda prompt: self.ask(prompt, tokens, stream), prompts))
            return time.perf_counter() - start, self.cpu() - cpu, texts


@torch.no_grad()
def decode_alone(model: LRNNForCausalLM, tokenizer, prompts: list[str], tokens: int) -> Measured:
    """The likeliest tokens after prompts of one length; the prompts are not timed."""
    cache = make_cache(model.config)
    ids = model(torch.tensor(tokenizer(prompts).input_ids), past_key_values=cache).logits[:, -1:].argmax(-1)
    step, written = decode_step(model, cache), [ids]
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(tokens - 1):
        ids = step(model, ids, cache).argmax(-1)
        written.append(ids)
    spent = time.perf_counter() - start, time.process_time() - cpu
    return *spent, tokenizer.batch_decode(torch.cat(written, dim=1), skip_special_tokens=True)


def main() -> None:
    folder, requests, tokens = sys.argv[1], *map(int, [*sys.argv[2:], 64, 256][:2])
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LRNNForCausalLM.from_pretrained(folder).eval()
    begin = " ".join(["The river"] * 5)
    by_length: dict[int, list[str]] = {}
    for prompt in (f"{tokenizer.bos_token}{begin} {i}" for i in range(100, 1000)):
        by_length.setdefault(len(tokenizer(prompt).input_ids), []).append(prompt)
    prompts = max(by_length.values(), key=len)[:requests]
    rows: dict[str, list[Measured]] = {"alone": [], "whole": [], "streamed": []}
    with TemporaryDirectory() as scratch:
        server = Server(folder, Path(scratch) / "log.txt")
        try:
            server.wait(prompts[0])
            for _ in range(ROUNDS):
                rows["alone"].append(decode_alone(model, tokenizer, prompts, tokens))
                rows["whole"].append(server.answer(prompts, tokens, False))
                rows["streamed"].append(server.answer(prompts, tokens, True))
        finally:
            server.process.terminate()
            server.process.wait()
    rates = {name: [[requests * tokens / m[i] for m in runs] for i in (0, 1)] for name, runs in rows.items()}
    print(f"{folder}, {model.num_parameters():,} parameters, {requests} requests of {tokens} tokens")
    for name, runs in rows.items():
        wrong = sum(a != b for run in runs for a, b in zip(run[2], rows["alone"][0][2], strict=True))
        told = [
            f"{median(rate):7,.0f} ({min(rate):,.0f} to {max(rate):,.0f}), {median(rate) / median(of):.2f}"
            for rate, of in zip(rates[name], rates["alone"], strict=True)
        ]
        print(
            f"{name:9} tokens/s {told[0]} of alone; a CPU second {told[1]}; wrong texts {wrong}", flush=True
        )


if __name__ == "__main__":
    main()
