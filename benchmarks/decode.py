"""`lrnn bench decode`: prefill time, and time per token at several batch sizes and context lengths.

Weights are bf16 on a GPU. A token is one step of the model; the likeliest next token is fed back on the
device. Recurrent models use the step of `model/decoding/decode.py`, attention a static cache of the context's
size; both replay a CUDA graph (`captured`). Modes: `graph` is just that; `compiled` compiles the blocks of
attention models; `fused` runs a recurrent layer as four kernels of this project (`kernels/decode/`);
`generate` is the time per token of `model.generate`, its loop included, after a context that was really read;
attention then writes to buffers that grow with the text (`model/decoding/memory.py`).

The context is read in segments. With `--emulate` a recurrent model reads 1,024 tokens and the cache's counter
is set to the context length, because its state has the same size after any text; such a row says `emulated`.

The limit is the time to read the weights that a token needs and to read and write the states, or to read keys
and values, at the speed of a device copy in the same run.

Legend: B rows, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

from lrnn_lm.files import pick_device
from lrnn_lm.model import LRNNConfig, LRNNForCausalLM, prefill
from lrnn_lm.model.accounting import account
from lrnn_lm.model.decoding.decode import decode_step

from . import measure
from .contenders import PAPER_SIZE, Contender, Size, build_config, count, label_of, pick_contenders, pick_size
from .pictures import draw_decoding
from .processes import run_in_processes
from .results import Budget, JsonLines, Row, median_and_spread, numbers, show, tabulate
from .train import is_half, time_calls

DEFAULT = "bd-m4,transformer,transformer-same-shape,h-m16,mamba2,gated-deltanet,lstm,bd-m1,bd-m16"
PREFILL = 1024  # tokens that are read where a context is emulated, and at most before `generate`
SEGMENT = 2048
LONGEST_ATTENTION = 65_536  # further, its prefill alone takes a benchmark's time
PREFILLS, WARMUP = 3, 4  # timed prefills; tokens of `generate` that are not timed
MODES = ("graph", "compiled", "fused", "generate")


@dataclass(frozen=True)
class DecodeSettings:
    """What `lrnn bench decode` was asked for; with these it runs again.

    contexts: tokens before the ones that are timed. modes: of `MODES`. tokens: how many are timed. emulate:
    whether a recurrent model is only told of the context. The rest: as in `bench train`.
    """

    contenders: str = DEFAULT
    batches: str = "1,64"
    contexts: str = "1024,8192,32768,1048576"
    modes: str = "fused,graph,compiled,generate"
    size: str = PAPER_SIZE
    width: int | None = None
    layers: int | None = None
    vocab: int | None = None
    precision: str = "auto"
    tokens: int = 64
    emulate: bool = False
    processes: int = 1
    budget_seconds: float | None = None


def run(settings: DecodeSettings, device: str = "auto", output: Path | None = None) -> list[Row]:
    """Measure, print a table, and write JSON lines and a picture to `output` and beside it if given.

    Raises:
        ValueError: settings that name nothing that there is.
    """
    if settings.processes != 1:
        about, rows = run_in_processes(run, settings, device, output, "token_seconds")
        _show(rows, output, about)
        return rows
    where = pick_device(device)
    contenders = pick_contenders(settings.contenders)
    size = pick_size(settings.size, settings.width, settings.layers)
    batches, contexts = numbers(settings.batches, "--batches"), numbers(settings.contexts, "--contexts")
    modes = [mode.strip() for mode in settings.modes.split(",")]
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"unknown mode {unknown[0]!r}; known: {', '.join(MODES)}")
    if settings.tokens < 2:
        raise ValueError("--tokens must be at least 2")
    if settings.vocab is not None and settings.vocab < 1:
        raise ValueError(f"--vocab must be at least 1, not {settings.vocab}")
    is_half(where, settings.precision)
    budget = Budget(settings.budget_seconds)
    limits = measure.ceilings(where) if where.type == "cuda" else {}
    about = {"benchmark": "decode", **measure.describe(where), **limits, "settings": asdict(settings)}
    file = JsonLines(output, about)
    for contender in contenders:
        for B in batches:
            for mode in modes:
                for context in contexts:
                    shape = {"contender": contender.name, "size": label_of(settings.size, size), "B": B}
                    shape |= {"mode": mode, "context": context}
                    print(f"{contender.name}, batch {B}, {mode}, {context:,} tokens before ..", flush=True)
                    work = partial(bench_one, contender, size, B, mode, context, settings, where, limits)
                    row = shape | budget.run(work)
                    file.add(row)
                    print(f"  {_summary(row)}", flush=True)
    _show(file.rows, output, about)
    return file.rows


@torch.no_grad()
def bench_one(
    contender: Contender,
    size: Size,
    B: int,
    mode: str,
    context: int,
    settings: DecodeSettings,
    device: torch.device,
    limits: dict[str, float],
) -> Row:
    """One model's row: seconds of a prefill and of a token, and what share of the limit that is."""
    config = build_config(contender, size, settings.vocab, PREFILL)
    if contender.backend != "auto":
        raise ValueError("this formulation of the scan trains only: a single step of it is ours")
    dtype = torch.bfloat16 if is_half(device, settings.precision) else torch.float32
    row: Row = {"parameters": count(config), "layers": config.num_hidden_layers}
    torch.manual_seed(0)
    with torch.device(device):
        model = LRNNForCausalLM(config).to(dtype).eval()
    recurrent = "full_attention" not in config.layer_types
    if not recurrent and context > LONGEST_ATTENTION:
        state = account(config, context, cache_bytes=dtype.itemsize).attention_state_bytes
        raise ValueError(
            f"attention is timed up to {LONGEST_ATTENTION:,} tokens; here {state / 1e9:.1f} GB a row"
        )
    if mode == "generate" and recurrent and context > PREFILL:
        raise ValueError(f"generate reads its prompt: contexts of up to {PREFILL:,} tokens are timed in it")
    length = min(PREFILL, context) if recurrent and settings.emulate else context
    if length < context:
        row["emulated"] = True
    text = partial(_text, config.vocab_size, B, length, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _prefill(model, _text(config.vocab_size, B, min(PREFILL, length), device), None)
    times = PREFILLS if length <= SEGMENT else 1
    taken, output = time_calls(lambda: _prefill(model, text(), None), times, device)
    row["prefill_tokens"], row["prefill_seconds"] = length, median(taken)
    if mode == "generate":
        taken = _generate_times(model, torch.cat(list(text()), dim=1), settings.tokens)
    else:
        if recurrent:
            token = _recurrent_token(model, output, context, mode)
        else:
            del output  # keys and values of the whole context
            token = _attention_token(model, text(), context + settings.tokens, mode)
        for _ in range(2):
            token()
        taken, _ = time_calls(token, settings.tokens, device)
    row["token_seconds"], row["spread"] = median_and_spread(taken)
    row["tokens_per_second"] = B / row["token_seconds"]
    row["least_bytes"] = least_bytes(config, B, context, dtype)
    if copy := limits.get("copy_bytes_per_second"):
        row["limit_seconds"] = row["least_bytes"] / copy
        row["share_of_limit"] = row["limit_seconds"] / row["token_seconds"]
    if device.type == "cuda":
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return row


def _text(vocab_size: int, B: int, length: int, device: torch.device) -> Iterator[Tensor]:
    """Random tokens as pieces (B, up to SEGMENT), always the same ones; never held as a whole."""
    generator = torch.Generator(device).manual_seed(0)
    for begin in range(0, length, SEGMENT):
        shape = (B, min(SEGMENT, length - begin))
        yield torch.randint(vocab_size, shape, device=device, generator=generator)


def _prefill(model: LRNNForCausalLM, text: Iterator[Tensor], cache: Any) -> Any:
    return prefill(model, text, SEGMENT, cache)


def _recurrent_token(model: LRNNForCausalLM, output: Any, context: int, mode: str) -> Callable[[], Any]:
    """A decoding step after a prefill's output, `context` tokens by the cache's count."""
    if mode == "compiled":
        raise ValueError("a recurrent model's step is not compiled: see the modes graph and fused")
    cache = output.past_key_values
    for layer in cache.layers:
        layer.seen_tokens = context  # more than were read where the context is emulated
    step = decode_step(model, cache, fused=mode == "fused")
    newest = output.logits[:, -1].argmax(dim=-1, keepdim=True)  # (B, 1)

    def token() -> Tensor:
        newest.copy_(step(model, newest, cache)[:, -1].argmax(dim=-1, keepdim=True))
        if newest.is_cuda and step.memory.graph is None:
            raise RuntimeError("the step could not be captured as a CUDA graph")
        return newest

    return token


# Products of one row become sums that fuse with what is around them.
_INDUCTOR = {"coordinate_descent_tuning": True}


def _attention_token(
    model: LRNNForCausalLM, text: Iterator[Tensor], longest: int, mode: str
) -> Callable[[], Any]:
    """A forward pass on a static cache for `longest` tokens, after the text."""
    if mode == "fused":
        raise ValueError("attention has no fused step")
    cache = StaticCache(config=model.config, max_cache_len=longest + 8)
    newest = _prefill(model, text, cache).logits[:, -1].argmax(dim=-1, keepdim=True)  # (B, 1)
    if mode == "compiled" and newest.is_cuda:
        compile_blocks(model, options=_INDUCTOR)

    def token() -> Tensor:
        logits = model(input_ids=newest, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return newest.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))

    return measure.captured(token) if newest.is_cuda else token


def compile_blocks(model: LRNNForCausalLM, **how: Any) -> None:
    """Compile each block, `how` as for `torch.compile`."""
    # Beside a cache a block's graph depends on its layer's number, and torch compiles a function eight times
    # only. Further blocks would run as they are.
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, 2 * len(model.model.layers))
    for block in model.model.layers:
        block.compile(dynamic=False, **how)


class _Clock(BaseStreamer):
    """Notes when each token is handed out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate_times(model: LRNNForCausalLM, ids: Tensor, tokens: int) -> list[float]:
    """Seconds from token to token of a call of `generate`, the first few aside; after a call to warm up."""
    for most in (WARMUP, WARMUP + tokens):
        clock = _Clock()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=0,
            eos_token_id=None, streamer=clock,
        )  # fmt: skip
    return [after - before for before, after in pairwise(clock.times)][-tokens:]


def least_bytes(config: LRNNConfig, B: int, context: int, dtype: torch.dtype) -> int:
    """Bytes that a token of B rows moves at least: the weights once, the embedding's rows aside; recurrent
    states read and written; keys and values read."""
    costs = account(config, context, cache_bytes=dtype.itemsize)
    looked_up = 0 if config.tie_word_embeddings else costs.parameters["embedding"]
    weights = (costs.total_parameters - looked_up) * dtype.itemsize
    return weights + B * (2 * costs.recurrent_state_bytes + costs.attention_state_bytes)


def _summary(row: Row) -> str:
    if "reason" in row:
        return row["reason"]
    share = f", {row['share_of_limit']:.2f} of the limit" if "share_of_limit" in row else ""
    return (
        f"{1e3 * row['token_seconds']:.3f} ms a token{share}; prefill of {row['prefill_tokens']:,}: "
        f"{1e3 * row['prefill_seconds']:.1f} ms"
    )


def _show(rows: list[Row], output: Path | None, about: dict[str, Any]) -> None:
    columns = ["", "parameters", "B", "mode", "context", "prefill ms", "ms a token", "spread", "processes",
               "tokens/s", "limit ms", "of the limit", "note"]  # fmt: skip
    cells = [
        [
            row["contender"], show(row.get("parameters")), str(row["B"]), row["mode"], show(row["context"]),
            show(row.get("prefill_seconds"), ".1f", 1e3), show(row.get("token_seconds"), ".3f", 1e3),
            show(row.get("spread"), ".1%"), show(row.get("processes")), show(row.get("tokens_per_second")),
            show(row.get("limit_seconds"), ".3f", 1e3), show(row.get("share_of_limit"), ".2f"),
            row.get("reason", "context emulated" if row.get("emulated") else "")[:80],
        ]
        for row in rows
    ]  # fmt: skip
    tabulate("decoding", columns, cells, output)
    if output is not None:
        print(f"written: {output}")
        draw_decoding(rows, output.with_suffix(".png"), about)
