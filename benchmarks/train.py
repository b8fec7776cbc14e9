"""`lrnn bench train`: time of optimizer steps of whole models with equal parameters, one after another.

A step is the trainer's: fp32 weights, bf16 autocast if the device supports it, compiled blocks, the loss in
chunks, clipping, AdamW (fused on a GPU). Rows hold one document each, so attention needs no mask. Every model
is built, timed and freed before the next. A model that cannot run becomes a row with the reason.

Legend: B rows, T time, V vocabulary.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrnn_lm.files import pick_device
from lrnn_lm.model import LRNNConfig, LRNNForCausalLM
from lrnn_lm.model.accounting import account, saved_bytes
from lrnn_lm.recipe.optim import OptimSection
from lrnn_lm.train.build import compile_block
from lrnn_lm.train.optim import make_optimizer
from lrnn_lm.train.runtime import peak_flops

from . import measure
from .contenders import (
    PAPER_SIZE,
    Contender,
    Size,
    build_config,
    count,
    label_of,
    pick_contenders,
    pick_size,
)
from .peers import associative_backend
from .pictures import draw_training
from .processes import run_in_processes
from .profile import kernel_times
from .results import Budget, JsonLines, Row, failures, median_and_spread, numbers, show, tabulate

DEFAULT = (
    "bd-m4,transformer,transformer-same-shape,mamba2,gated-deltanet,paper-m4,bd-m1,bd-m2,bd-m8,"
    "bd-m16,h-m16,lstm"
)
OPTIMIZER_BYTES = 28 + 4  # a parameter: AdamW reads w, g, m, v and writes w, m, v; the backward pass wrote g


@dataclass(frozen=True)
class TrainSettings:
    """What `lrnn bench train` was asked for; with these it runs again.

    tokens, lengths, sizes: counts and names separated by commas. tokens: B T of a step. width, layers, vocab:
    in place of the sizes' and recipes' own. steps: timed, after `warmup` that compile and fill the caches.
    residual_in_fp32: of the stream between blocks; None for the recipes' own. processes: how often all of it
    is measured, each time in a process of its own.
    """

    contenders: str = DEFAULT
    lengths: str = "2048"
    tokens: str = "32768"
    sizes: str = PAPER_SIZE
    width: int | None = None
    layers: int | None = None
    vocab: int | None = None
    precision: str = "auto"
    compile: bool = True
    steps: int = 10
    warmup: int = 3
    checkpointing: bool = False
    loss_chunk: int | None = None
    profile: int = 0
    residual_in_fp32: bool | None = None
    processes: int = 1
    budget_seconds: float | None = None


class TrainingStep:
    """A model with its optimizer; a call is one optimizer step."""

    def __init__(self, config: LRNNConfig, device: torch.device, settings: TrainSettings, B: int, T: int):
        torch.manual_seed(0)
        with torch.device(device):
            self.model = LRNNForCausalLM(config).train()
        if settings.checkpointing:
            options = {"use_reentrant": False}
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        self.optim = OptimSection()
        self.optimizer = make_optimizer(self.model, self.optim, device)
        self.autocast = partial(_autocast, device, settings.precision)
        ids = torch.randint(config.vocab_size, (B, T + 1), device=device)
        self.batch = {"input_ids": ids[:, :-1].contiguous(), "shift_labels": ids[:, 1:].contiguous()}
        self.targets = float(B * T)

    def compile_blocks(self, mixers: bool = True) -> None:
        for block in self.model.model.layers:
            if not mixers:
                block.mixer.forward = torch.compiler.disable(block.mixer.forward)
            compile_block(block)

    def __call__(self) -> Tensor:
        """The loss before the update, still on the device: nothing here waits for it."""
        with self.autocast():
            loss = self.model(
                **self.batch, num_items_in_batch=self.targets, return_logits=False, use_cache=False
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _autocast(device: torch.device, precision: str) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if is_half(device, precision) else nullcontext()


def is_half(device: torch.device, precision: str) -> bool:
    """Whether products are in bf16; `auto` is that on a GPU. ValueError for an unknown precision."""
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"--precision is auto, bf16 or fp32, not {precision!r}")
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def run(
    settings: TrainSettings,
    device: str = "auto",
    output: Path | None = None,
) -> list[Row]:
    """Measure, print a table, and write JSON lines and pictures to `output` and beside it if given.

    Raises:
        ValueError: settings that name nothing that there is.
    """
    if settings.processes != 1:
        about, rows = run_in_processes(run, settings, device, output, "step_seconds")
        _show(rows, output, about)
        return rows
    where = pick_device(device)
    contenders = pick_contenders(settings.contenders)
    sizes = {}
    for name in settings.sizes.split(","):
        size = pick_size(name.strip(), settings.width, settings.layers)
        sizes[label_of(name.strip(), size)] = size
    lengths, tokens = numbers(settings.lengths, "--lengths"), numbers(settings.tokens, "--tokens")
    least = {"steps": 1, "warmup": 0, "profile": 0, "loss_chunk": 1, "vocab": 1}
    for name, lowest in least.items():
        if (given := getattr(settings, name)) is not None and given < lowest:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {lowest}, not {given}")
    if min(tokens) < max(lengths):
        raise ValueError(f"--tokens {min(tokens)} are less than one row of --lengths {max(lengths)}")
    is_half(where, settings.precision)
    budget = Budget(settings.budget_seconds)
    limits = measure.ceilings(where) if where.type == "cuda" else {}
    about = {"benchmark": "train", **measure.describe(where), **limits, "settings": asdict(settings)}
    file = JsonLines(output, about)
    for size_name, size in sizes.items():
        for step_tokens in tokens:
            for T in lengths:
                for contender in contenders:
                    B = max(1, step_tokens // T)
                    shape = {"contender": contender.name, "size": size_name, "B": B, "T": T}
                    print(f"{contender.name}, {size_name}, B {B}, T {T} ..", flush=True)
                    work = partial(bench_one, contender, size, B, T, settings, where, limits)
                    row = shape | budget.run(work)
                    if settings.compile and may_run_uncompiled(row):
                        plain = replace(settings, compile=False)
                        print(f"  {row['reason']}; again without compiling ..", flush=True)
                        work = partial(bench_one, contender, size, B, T, plain, where, limits)
                        row = {**shape, "compiled": False, **budget.run(work)}
                    file.add(row)
                    print(f"  {_summary(row)}", flush=True)
    _show(file.rows, output, about)
    return file.rows


def bench_one(
    contender: Contender,
    size: Size,
    B: int,
    T: int,
    settings: TrainSettings,
    device: torch.device,
    limits: dict[str, float],
) -> Row:
    """One model's row: seconds a step, and what follows from it."""
    config = build_config(contender, size, settings.vocab, T)
    if settings.loss_chunk is not None:
        config.loss_chunk = settings.loss_chunk
    if settings.residual_in_fp32 is not None:
        config.residual_in_fp32 = settings.residual_in_fp32
    row: Row = {"parameters": count(config), "layers": config.num_hidden_layers}
    row["intermediate_size"], row["residual_in_fp32"] = config.intermediate_size, config.residual_in_fp32
    with associative_backend(contender.backend):
        step = TrainingStep(config, device, settings, B, T)
        for block in step.model.model.layers:
            if contender.backend != "auto":
                block.mixer.backend = contender.backend
        if settings.compile:
            step.compile_blocks(mixers=not contender.foreign)
        started = time.perf_counter()
        float(step())
        row["first_step_seconds"] = time.perf_counter() - started
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # of steps as they are, not of compiling one
        for _ in range(settings.warmup):
            loss = step()
        taken, loss = time_calls(step, settings.steps, device)
        row["step_seconds"], row["spread"] = median_and_spread(taken)
        row["loss"] = float(loss)
        if device.type == "cuda":
            row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        if device.type == "cuda":
            row["host_seconds"] = launch_seconds(step, device)
        if settings.profile:
            row["profile"] = kernel_times(step, device, settings.profile)
    return row | derived(config, B, T, row["step_seconds"], device, settings, limits)


def may_run_uncompiled(row: Row) -> bool:
    """Whether compiling may be to blame for a row's failure: not for memory, time or a wrong wish."""
    reason = row.get("reason", "ValueError")
    return not reason.startswith(("skipped", "ValueError")) and "out of memory" not in reason


def derived(
    config: LRNNConfig,
    B: int,
    T: int,
    seconds: float,
    device: torch.device,
    settings: TrainSettings,
    limits: dict[str, float],
) -> Row:
    """Tokens a second, model FLOPs utilisation, and the least memory traffic as a share of copy speed."""
    flops = account(config, T).flops_per_token_training
    peak = peak_flops(device)
    try:
        least = least_bytes(config, B, T, is_half(device, settings.precision))
    except (
        failures()
    ):  # layers of other packages that cannot be run without data: the times stand all the same
        least = None
    copy = limits.get("copy_bytes_per_second")
    return {
        "tokens_per_second": B * T / seconds,
        "flops_per_token": flops,
        "flops_per_second": flops * B * T / seconds,
        "mfu": None if peak is None else flops * B * T / seconds / peak,
        "least_bytes": least,
        "bandwidth_share": None if copy is None or least is None else least / seconds / copy,
    }


def least_bytes(config: LRNNConfig, B: int, T: int, half: bool) -> int:
    """Bytes that a step must move at least: the optimizer's, the weights in each pass, and what a layer keeps
    for the backward pass, written and read once."""
    dtype = torch.bfloat16 if half else torch.float32
    kinds: dict[tuple, int] = {}
    for i, spec in enumerate(config.layer_mixers):
        kind = tuple(sorted(spec.items()))
        if kind not in kinds:
            kinds[kind] = saved_bytes(config, i, B, T, dtype)
    kept = sum(kinds[tuple(sorted(spec.items()))] for spec in config.layer_mixers)
    return count(config) * (OPTIMIZER_BYTES + 2 * dtype.itemsize) + 2 * kept


def time_calls(call: Callable[[], Any], times: int, device: torch.device) -> tuple[list[float], Any]:
    """Seconds of each of `times` calls in a row, and the last result. On a GPU by events, without waiting in
    between: a call is launched while the one before runs, as in training."""
    if device.type != "cuda":
        taken = []
        for _ in range(times):
            started = time.perf_counter()
            result = call()
            taken.append(time.perf_counter() - started)
        return taken, result
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        result = call()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)], result


def launch_seconds(call: Callable[[], Any], device: torch.device, times: int = 3) -> float:
    """The host's part of a call, least of some: how long Python takes to hand out work to an idle GPU."""
    taken = []
    for _ in range(times):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    torch.cuda.synchronize(device)
    return min(taken)


def _summary(row: Row) -> str:
    if "reason" in row:
        return row["reason"]
    memory = show(row.get("peak_memory_bytes"), ".1f", 1 / 1e9)
    return (
        f"{row['tokens_per_second']:,.0f} tokens/s ({1e3 * row['step_seconds']:.1f} ms a step, spread "
        f"{row['spread']:.1%}; first step {row['first_step_seconds']:.0f} s)"
        + (f", MFU {row['mfu']:.3f}" if row.get("mfu") else "")
        + (f", launched in {1e3 * row['host_seconds']:.1f} ms" if "host_seconds" in row else "")
        + (f", {memory} GB" if memory else "")
    )


def _show(rows: list[Row], output: Path | None, about: dict[str, Any]) -> None:
    columns = ["", "size", "parameters", "layers", "B", "T", "ms a step", "host ms", "spread", "processes",
               "tokens/s", "MFU", "least bytes/copy", "peak GB", "note"]  # fmt: skip
    cells = [
        [
            row["contender"], row["size"], show(row.get("parameters")), show(row.get("layers")),
            str(row["B"]), str(row["T"]), show(row.get("step_seconds"), ".1f", 1e3),
            show(row.get("host_seconds"), ".1f", 1e3), show(row.get("spread"), ".1%"),
            show(row.get("processes")), show(row.get("tokens_per_second")), show(row.get("mfu"), ".3f"),
            show(row.get("bandwidth_share"), ".2f"), show(row.get("peak_memory_bytes"), ".1f", 1e-9),
            row.get("reason", "" if row.get("compiled", True) else "not compiled")[:60],
        ]
        for row in rows
    ]  # fmt: skip
    tabulate("training", columns, cells, output)
    if output is not None:
        print(f"written: {output}")
        draw_training(rows, output.with_suffix(".png"), about)
