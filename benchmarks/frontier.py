"""`lrnn bench frontier`: how much a recurrence can express at what cost, each mixer at equal parameters.

For each contender, rows of three kinds: its speed in training and decoding, and its state; the longest rows
on which it holds a synthetic task after a fixed budget; its loss on a corpus after a fixed budget. Rows are
appended as they are known, and those that are there are not measured again, so the same command continues
where it stopped. A row with a `reason` is of what could not be measured; delete its line to try again. The
picture has the Pareto front of speed against each of the others.

Legend: B rows, T tokens a row.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lrnn_lm import LRNNForCausalLM
from lrnn_lm.data import STATE_TASKS, SYNTHETIC_TASKS
from lrnn_lm.files import pick_device
from lrnn_lm.model.accounting import account
from lrnn_lm.recipe import load_recipe
from studies.contenders import MODELS, Fitting, contender
from studies.jsonl import end_line
from studies.replicas import Job, train_wave

from .frontier_results import HELD, draw, show_table, summarise
from .measure import describe
from .results import Budget, Row, check_output, read_results, release

KINDS = ("speed", "task", "loss")
# What may differ when the command goes on.
ASKED = ("contenders", "tasks", "lrs", "budget_seconds", "processes", "seconds_each")
REFERENCE = "bd_lru-m5"  # whose parameters the others are brought to
ALIGNED = 16  # widths of models whose speed is measured are multiples of it
SIDE_BY_SIDE = 8  # small models that train at once on a GPU
# Lengths, and shares of the steps, that state tasks begin with.
SHORT_ROWS = ((4, 0.22), (8, 0.17), (16, 0.11))
DEFAULT_TASKS = "s5,a5,parity,mqar,selective_copying"


@dataclass(frozen=True)
class FrontierSettings:
    """hidden, layers, steps, rows, length: of the synthetic tasks; `longest` is tested. width, depth, tokens:
    of the speed, in rows of T = `context`; decoded: timed tokens. corpus: a recipe, whose mixer is replaced;
    None for no loss. processes: on each GPU, a contender in each; 0 for none but this one. seconds_each: of
    such a process."""

    contenders: str = ",".join(MODELS)
    tasks: str = DEFAULT_TASKS
    lrs: str = "0.003,0.01"
    hidden: int = 64
    layers: int = 1
    steps: int = 3600
    rows: int = 256
    length: int = 32
    longest: int = 2048
    vocab: int = 256
    width: int = 768
    depth: int = 12
    tokens: int = 32_768
    context: int = 2048
    speed_vocab: int = 8192
    decoded: int = 64
    corpus: str | None = None
    corpus_tokens: int = 20_000_000
    budget_seconds: float | None = None
    processes: int = 0
    seconds_each: float | None = None


SMALL = {
    "hidden": 32, "rows": 64, "width": 64, "depth": 2, "tokens": 2048, "context": 256, "vocab": 64,
    "speed_vocab": 256,
}  # fmt: skip
# Defaults of --small for options that are not given: half a minute on two CPU cores.
SMALL_BUDGET = {"contenders": "bd_lru-m5,lstm,min_gru", "tasks": "s5,parity", "lrs": "0.01", "steps": 50}


def run(settings: FrontierSettings, device: str = "auto", output: Path | None = None) -> list[Row]:
    """Measure what is missing, print a table and draw; returns all rows.

    Raises ValueError for an unknown contender or task, a file of other settings, or processes without a file.
    """
    target = torch.device(pick_device(device))
    names, tasks = split(settings.contenders), split(settings.tasks)
    if settings.steps < 1:
        raise ValueError(f"--steps must be at least 1, not {settings.steps}")
    try:
        rates = [float(lr) for lr in split(settings.lrs)]
    except ValueError:
        rates = []
    if not rates or not all(0 < lr < math.inf for lr in rates):
        raise ValueError(
            f"--lrs: give one learning rate or several, separated by commas, not {settings.lrs!r}"
        )
    for known, given in ((MODELS, names), (SYNTHETIC_TASKS, tasks)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"unknown {unknown[0]!r}; known: {', '.join(known)}")
    if settings.corpus:
        load_recipe(settings.corpus)  # whether it can be read, before an hour is spent
    _begin(settings, target, output)
    if settings.processes:
        from .frontier_processes import run_apart

        if output is None:
            raise ValueError("--processes need --output: the file that all append their rows to")
        run_apart(settings, target.type, output)
        rows = read_results(output)[1]
    else:
        rows = measure_rows(settings, names, KINDS, target, output)
    rows = [row for row in rows if row["contender"] in names]
    summary = summarise(rows, names, tasks)
    show_table(summary, tasks, output)
    if output is not None:
        draw(summary, tasks, output.with_suffix(".png"), str(target))
    return rows


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _begin(settings: FrontierSettings, device: torch.device, output: Path | None) -> None:
    """Begin a file of rows; ValueError for one that was begun with other settings."""
    fixed = {k: v for k, v in asdict(settings).items() if k not in ASKED}
    check_output(output)
    if output is None:
        return
    if output.is_file() and output.read_bytes().startswith(b'{"about"'):
        end_line(output)  # that a killed process has begun
    if not output.is_file():
        append(output, {"about": {"bench": "frontier", "settings": fixed, **describe(device)}})
    elif read_results(output)[0].get("settings") != json.loads(json.dumps(fixed)):
        raise ValueError(
            f"{output}: begun with other settings; name another file, or repeat the first command"
        )


def append(output: Path | None, row: Row) -> None:
    """Add a line in one write, as several processes may add to a file."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _key(row: Row) -> tuple[Any, ...]:
    return row["contender"], row["kind"], row.get("task"), row.get("lr")


def missing(settings: FrontierSettings, name: str, kinds: Sequence[str], rows: list[Row]) -> list[Row]:
    """What is to be measured of a contender, of these kinds, and not among `rows`; cheap kinds first."""
    wanted = [{"contender": name, "kind": "speed"}]
    for task, lr in product(split(settings.tasks), map(float, split(settings.lrs))):
        wanted.append({"contender": name, "kind": "task", "task": task, "lr": lr})
    if settings.corpus:
        wanted.append({"contender": name, "kind": "loss"})
    done = {_key(row) for row in rows}
    return [row for row in wanted if row["kind"] in kinds and _key(row) not in done]


def measure_rows(
    settings: FrontierSettings,
    names: list[str],
    kinds: Sequence[str],
    device: torch.device,
    output: Path | None,
) -> list[Row]:
    """Measure in this process what is missing in `output`, and append it; returns all rows."""
    rows = read_results(output)[1] if output is not None else []
    budget, fit = Budget(settings.budget_seconds), Fitter(settings)
    for name in names:
        for wave in _waves(missing(settings, name, kinds, rows), device):
            if budget.refusal():
                print("the budget is spent; the same command continues")
                return rows
            made = budget.run(lambda wave=wave: {"rows": _measure(settings, fit, wave, device, output)})
            for row, rest in zip(wave, made.get("rows", [made] * len(wave)), strict=True):
                rows.append({**row, **rest})
                append(output, rows[-1])
    return rows


def _waves(rows: list[Row], device: torch.device) -> list[list[Row]]:
    """Rows that are measured at once: on a GPU, small models that train on rows of equal length."""
    waves: dict[Any, list[Row]] = {}
    for i, row in enumerate(rows):
        together = row["kind"] == "task" and device.type == "cuda"
        waves.setdefault(row["task"] in STATE_TASKS if together else i + 2, []).append(row)
    return [wave[i : i + SIDE_BY_SIDE] for wave in waves.values() for i in range(0, len(wave), SIDE_BY_SIDE)]


def _measure(
    settings: FrontierSettings, fit: "Fitter", wave: list[Row], device: torch.device, output: Path | None
) -> list[Row]:
    kind, name = wave[0]["kind"], wave[0]["contender"]
    if kind == "task":
        return holds([fit.small(row) for row in wave], device)
    if kind == "speed":
        return [speed(settings, fit.large(name, ALIGNED), device)]
    return [loss(settings, name, device, output)]


class Fitter:
    """Jobs of contenders with the reference's parameters, at the size of the tasks and of the speed."""

    def __init__(self, settings: FrontierSettings) -> None:
        self.settings = settings
        self._fits: dict[tuple[int, int, int], Fitting] = {}

    def small(self, row: Row) -> Job:
        """A row's training run on its task: state tasks begin with short rows, which S5 needs."""
        s, name, task, lr = self.settings, row["contender"], row["task"], row["lr"]
        states = task in STATE_TASKS
        begun = [(n, max(1, round(share * s.steps))) for n, share in SHORT_ROWS if states and n < s.length]
        length = s.length if states else max(s.length, 64)
        stages = (*begun, (length, max(1, s.steps - sum(steps for _, steps in begun))))
        options: dict[str, float] = {"start": 1} if states else {}
        options |= {"vocab_size": s.vocab, "pairs": 8} if task == "mqar" else {}
        lengths = [length]
        while states and lengths[-1] * 2 <= s.longest:
            lengths.append(lengths[-1] * 2)
        job = Job(
            name=f"{name}-{task}-{lr:g}", task=task, model=name, mixer={}, seed=0, lr=lr, stages=stages,
            tested=tuple(lengths), rows=s.rows, hidden=s.hidden, layers=s.layers if states else 2,
            intermediate=2 * s.hidden, weight_decay=0.03 if states else 0.0, options=options,
        )  # fmt: skip
        return self._fitted(job, name)

    def large(self, name: str, step: int = 1) -> Job:
        """The model whose speed or loss is measured; `step` as in Fitting."""
        s = self.settings
        job = Job(
            name=name, task="mqar", model=name, mixer={}, seed=0, lr=1e-3, stages=((s.context, 1),),
            tested=(s.context,), hidden=s.width, layers=s.depth, intermediate=-(-s.width * 8 // 3 // 64) * 64,
            options={"vocab_size": s.speed_vocab, "pairs": 8},
        )  # fmt: skip
        return self._fitted(job, name, step)

    def _fitted(self, job: Job, name: str, step: int = 1) -> Job:
        key = (job.hidden, job.layers, step)
        if key not in self._fits:
            blocks = max(1, job.hidden // 4)
            self._fits[key] = Fitting(contender(job, REFERENCE, num_blocks=blocks, gate_std=1.0), step)
        return self._fits[key](contender(job, name, gate_std=1.0))


def holds(jobs: list[Job], device: torch.device) -> list[Row]:
    """Train jobs side by side; the longest length up to which each holds its task, 0 for none."""
    return [_held(result) for result in train_wave(jobs, device, float("inf"))]


def _held(result: Row) -> Row:
    if "error" in result:
        return {"reason": result["error"]}
    shares = result.get("last_half") or {str(result["tested"][0]): result["accuracy"]}
    held = 0
    for length, share in sorted((int(length), share) for length, share in shares.items()):
        if share < HELD:
            break
        held = length
    kept = {key: result[key] for key in ("parameters", "selection", "loss", "accuracy", "seconds")}
    return {**kept, "held": held, "last_half": shares}


def speed(settings: FrontierSettings, job: Job, device: torch.device) -> Row:
    """Training tokens a second, milliseconds of a decoded token after a short prompt, bytes of state; of half
    as many rows where memory runs out."""
    B = max(1, settings.tokens // settings.context)
    while True:
        try:
            return _speed(settings, job, device, B)
        except torch.OutOfMemoryError:
            if B == 1:
                raise
        B //= 2
        release()  # here the traceback, which holds the model, is gone


def _speed(settings: FrontierSettings, job: Job, device: torch.device, B: int) -> Row:
    T = settings.context
    config = job.config()
    config.use_cache, config.loss_chunk = True, 1024
    torch.manual_seed(0)
    model = LRNNForCausalLM(config).to(device).train()
    half = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, config.vocab_size, (B, T), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = model(ids, shift_labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    train_seconds = _seconds(step, device, calls=5)
    model = model.eval().to(torch.bfloat16 if half else torch.float32)

    def write(count: int) -> float:
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        return _seconds(lambda: model.generate(ids[:1, :16], do_sample=False, **lengths), device, calls=3)

    token_seconds = (write(4 + settings.decoded) - write(4)) / settings.decoded
    found = account(config, T)
    return {
        "parameters": found.total_parameters,
        "tokens_per_second": B * T / train_seconds,
        "decode_ms": 1e3 * max(0.0, token_seconds),
        "state_bytes": sum(4 * layer.mixer.state_elements(T) for layer in model.model.applied_layers),
        "B": B,
        "T": T,
    }


def _seconds(work: Callable[[], Any], device: torch.device, calls: int) -> float:
    """The shortest of some calls, after one that is not counted."""
    times = []
    for _ in range(calls + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def loss(settings: FrontierSettings, name: str, device: torch.device, output: Path | None) -> Row:
    """Train the corpus's recipe with another mixer, brought to the parameters of the reference."""
    from rich.console import Console

    from lrnn_lm.train.build import build_trainer

    model = load_recipe(settings.corpus).model
    size = replace(settings, hidden=model.hidden_size, layers=model.num_hidden_layers)
    job = Fitter(replace(size, width=model.hidden_size, depth=model.num_hidden_layers)).large(name)
    folder = (output.parent if output is not None else Path("runs")) / "frontier"
    recipe = load_recipe(settings.corpus, [
        f"name={name}", f"model.mixer={json.dumps(job.mixer)}", f"model.intermediate_size={job.intermediate}",
        "model.layer_pattern=null", "model.parameters=null", f"train.tokens={settings.corpus_tokens}",
        f"train.runs_dir={folder}", f"train.device={device.type}",
    ])  # fmt: skip
    trainer = build_trainer(recipe, Console(quiet=True))
    trainer.run()
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "validation_loss" in line)
    return {key: last[key] for key in ("tokens", "validation_loss", "bits_per_byte") if key in last}
