"""The language-model study: models with equal parameters and tokens, several runs on one device at a time.

    python -m studies.lm PLAN --data CORPUS --output ROWS.jsonl [--workers 3] [--budget-seconds 500]

PLAN is YAML: `sizes` (a parameter budget and what every model of that size shares), `contenders` (mixers) and
`waves` (which contenders, at which tokens, learning rates and seeds), run in this order. The width of its
SwiGLU brings a contender to the parameters of its size, in steps of 16. Each run is `lrnn train` with
overrides. When it ends, its row (settings, held-out bits per byte at each validation, device, commit) is
appended to ROWS. A run whose row exists is not repeated; an unfinished run resumes from its checkpoint, and
so does, once, a run that failed. A signal, or the end of the budget, saves and ends the trainings.
Exit codes: 0 done or out of time; 2 a mistake in the plan or in a run; 1 a run failed otherwise; 85 a signal.
"""

import argparse
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any
from zlib import crc32

import torch

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.files import finite, words_of
from lrnn_lm.recipe import load_recipe

from .jsonl import append_row, read_rows
from .plan import Contender, Plan, Size, read_plan, waves_of

STEP = 16  # the SwiGLU's width is a multiple of it
STOPPED = 85  # exit code of a run that saved and stopped on a signal
MARGIN = 15  # seconds before the budget's end in which nothing begins
TOLERANCE = 0.005  # parameters may differ by this share
OWN = ("name", "seed", "model", "optim.lr", "train.tokens", "train.runs_dir")  # keys that rows name


@dataclass(frozen=True)
class Run:
    """One row to be made: `model` holds the resolved keys of the recipe's section."""

    wave: str
    contender: str
    size: str
    model: dict[str, Any]
    parameters: int
    tokens: int
    lr: float
    seed: int
    overrides: tuple[str, ...]
    obstacle: str = ""  # the package that its model needs and that is not here; then without a model

    @property
    def name(self) -> str:
        """The run's name, which also tells a row that is there already."""
        extra = "".join("-" + re.sub(r"[^A-Za-z0-9]+", "-", o.partition(".")[2]) for o in self.overrides)
        tokens = f"{self.tokens / 10**6:.0f}M"
        name = f"{self.contender}-{self.size}-{tokens}-lr{self.lr:g}-s{self.seed}{extra}"
        if len(name) > 200:  # what a recipe takes
            name = f"{name[:180]}-{crc32(name.encode()):08x}"
        return name


def runs_of(plan: Plan, only: str | None = None) -> list[Run]:
    """Every run of the plan's waves, in order; of a wave, all contenders before the next seed.

    ValueError if runs that differ have one name.
    """
    # A contender's second seed finds its kernels compiled.
    runs: dict[str, Run] = {}
    for wave in waves_of(plan, only):
        models = {name: _fitted(plan, name, wave.size) for name in wave.contenders}
        for seed in wave.seeds:
            for contender, (model, parameters, obstacle) in models.items():
                for lr in wave.rates:
                    overrides = (*wave.set, *plan.contenders[contender].set)
                    run = Run(
                        wave.name, contender, wave.size, model, parameters, wave.tokens, lr, seed, overrides,
                        obstacle,
                    )  # fmt: skip
                    other = runs.setdefault(run.name, run)
                    if replace(other, wave=wave.name) != run:
                        raise ValueError(
                            f"waves {other.wave!r} and {wave.name!r} have different runs of one name, "
                            f"{run.name}: they differ in tokens by less than a million, or in keys of `set`; "
                            "give one contender another name"
                        )
    return list(runs.values())


def _fitted(plan: Plan, name: str, size: str) -> tuple[dict[str, Any], int, str]:
    """`fitted` of a contender by name, or what it needs that is not installed."""
    try:
        return *fitted(plan.contenders[name], plan.sizes[size]), ""
    except (ValueError, KeyError, TypeError) as error:
        told = f"{error} is missing in its model" if isinstance(error, KeyError) else error
        told = f"contender {name!r}, size {size!r}: {told}"
        if isinstance(error.__cause__, ImportError):
            return {}, 0, told
        raise ValueError(told) from None


def check_overrides(given: Iterable[str]) -> None:
    """ValueError for an override of what a row names: the row would say something else."""
    for key in (override.partition("=")[0] for override in given):
        if key == "model.parameters":  # null lets a tokenizer be of another size than the plan's vocab_size
            continue
        if any(f"{key}.".startswith(f"{own}.") for own in OWN):
            raise ValueError(f"{key}: the study sets it itself, from the plan's sizes, contenders and waves")


def fitted(contender: Contender, size: Size) -> tuple[dict[str, Any], int]:
    """The model section of a contender at a size, and its parameters. ValueError if no SwiGLU fits."""
    shared = {**size.model, **contender.model}
    D = shared["hidden_size"]
    model = {**shared, "mixer": _mixer(contender.mixer, D)}
    if contender.pattern:
        model["layer_pattern"] = [_mixer(entry, D) for entry in contender.pattern]
    narrow, wide = (count({**model, "intermediate_size": width}) for width in (STEP, 2 * STEP))
    width = STEP * max(1, round(1 + (size.parameters - narrow) / (wide - narrow)))
    model["intermediate_size"] = width
    parameters = count(model)
    if abs(parameters / size.parameters - 1) > TOLERANCE:
        raise ValueError(f"{parameters:,} parameters are not within 0.5% of {size.parameters:,}")
    return model, parameters


def _mixer(spec: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """`expansion` is the state's width over hidden_size, for mixers that are sized by their blocks."""
    spec = dict(spec)
    expansion = spec.pop("expansion", None)
    if expansion is not None:
        spec["num_blocks"] = round(expansion * hidden_size / spec.get("block_size", 1))
    return spec


def count(model: dict[str, Any]) -> int:
    """Parameters; none are made."""
    with torch.device("meta"):
        built = LRNNForCausalLM(LRNNConfig(**model))
    return sum(p.numel() for p in built.parameters())


def command(run: Run, recipe: Path, data: Path, runs: Path, more: list[str]) -> list[str]:
    """`lrnn train` for a run."""
    model = {key: value for key, value in run.model.items() if key != "vocab_size"}
    settings = [f"model.{key}={json.dumps(value)}" for key, value in model.items()]
    return [
        sys.executable, "-m", "lrnn_lm.train", str(recipe), f"name={run.name}", f"seed={run.seed}",
        f"optim.lr={run.lr}", f"train.tokens={run.tokens}", f"train.runs_dir={runs}",
        f"data.source.path={data}/train-*.jsonl.zst", f"data.validation_source.path={data}/valid.jsonl.zst",
        f"model.parameters={run.parameters}", *settings, *run.overrides, *more,
    ]  # fmt: skip


def result(run: Run, folder: Path, seconds: float, workers: int, code: int, log: Path) -> dict[str, Any]:
    """The row of a run that has ended."""
    row = {
        "run": run.name, "wave": run.wave, "contender": run.contender, "size": run.size,
        "parameters": run.parameters, "tokens": run.tokens, "lr": run.lr, "seed": run.seed,
        "overrides": list(run.overrides), "model": run.model, "seconds": round(seconds, 1),
        "workers": workers, "device": device_name(), "commit": commit(),
    }  # fmt: skip
    path = folder / "metrics.jsonl"
    lines = finite(read_rows(path))  # numbers that are not finite are None
    validations = [(line["step"], line["bits_per_byte"]) for line in lines if "bits_per_byte" in line]
    speeds = sorted(line["tokens_per_second"] for line in lines if line.get("tokens_per_second"))
    row["curve"] = [[step, round(bits, 5)] for step, bits in validations if bits is not None]
    row["tokens_per_second_shared"] = round(speeds[len(speeds) // 2]) if speeds else None
    if code == STOPPED:
        row["failed"] = f"cut at step {lines[-1]['step'] if lines else 0}"
    elif code == 0 and validations and validations[-1][1] is None:
        row["failed"] = "the last validation has no finite bits per byte"
    elif code == 0 and validations:
        row["bits_per_byte"] = validations[-1][1]
    else:
        lines = log.read_text(errors="replace").strip().splitlines()
        # A crash of the device's library ends in frames of C++; what happened stands above them.
        told = [line for line in lines if "Error" in line or "what():" in line] or lines
        row["failed"] = f"exit code {code}: " + " / ".join(told[-3:])[-600:]
    return row


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def commit() -> str:
    """Of the code; STUDY_COMMIT where the tree is a copy whose history says something else."""
    if "STUDY_COMMIT" in os.environ:
        return os.environ["STUDY_COMMIT"]
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"


def visible_devices() -> list[str]:
    """Names of the devices that this process may use, as its trainings are told them."""
    # A training that is told "0" takes the machine's first device, whichever ones this process was given.
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return given or [str(i) for i in range(torch.cuda.device_count())]


class Pool:
    """Runs several trainings at a time until the queue or the budget is spent, or a signal stops it."""

    def __init__(self, recipe: Path, options: argparse.Namespace, deadline: float):
        self.recipe, self.deadline = recipe, deadline
        self.data, self.runs, self.output = options.data, options.runs, options.output
        self.workers, self.more = options.workers, options.set
        self.codes: list[int] = []  # of the runs that ended
        self.lock = Lock()
        self.devices: SimpleQueue[str] = SimpleQueue()  # a place a worker: devices take turns
        visible = visible_devices()
        # Each process would take all cores: 16 of them on 64 cores trained at a third of the speed.
        self.threads = str(max(1, (os.cpu_count() or 1) // (2 * self.workers)))
        for i in range(self.workers):
            self.devices.put(visible[i % len(visible)] if visible else "")

    def make(self, runs: list[Run]) -> None:
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(self._one, runs))

    def stop(self, *_: Any) -> None:
        """What a signal does: trainings save and end, and no other begins."""
        self.deadline = 0.0

    def _one(self, run: Run) -> None:
        if time.time() > self.deadline - MARGIN:
            return
        device = self.devices.get()
        log = self.runs / f"{run.name}.log"
        log.unlink(missing_ok=True)
        began = time.time()
        try:
            code = self._train(run, device, log)
            if failed := code not in (0, 2, STOPPED) and time.time() < self.deadline - MARGIN:
                code = self._train(run, device, log)  # on from its last checkpoint
        finally:
            self.devices.put(device)
        row = result(run, self.runs / run.name, time.time() - began, self.workers, code, log)
        if failed:
            row["restarts"] = 1
        with self.lock:
            self.codes.append(code if code or "bits_per_byte" in row else 1)
            append_row(self.output, row)
        bits = row.get("bits_per_byte")
        print(
            f"{run.name}: {f'{bits:.4f}' if bits else row['failed']} ({row['seconds']:.0f} s, "
            f"{row['tokens_per_second_shared']} tokens/s, SwiGLU {run.model['intermediate_size']})",
            flush=True,
        )

    def _train(self, run: Run, device: str, log: Path) -> int:
        """Train until the run or the budget ends; the exit code."""
        environment = {**os.environ, "OMP_NUM_THREADS": self.threads}
        if device:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with log.open("a") as file:
            process = subprocess.Popen(
                command(run, self.recipe, self.data, self.runs, self.more),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            while time.time() < self.deadline:
                try:
                    return process.wait(min(1.0, max(0.0, self.deadline - time.time())))
                except subprocess.TimeoutExpired:
                    continue
            process.send_signal(signal.SIGTERM)  # it saves, and goes on from there another time
            return process.wait()


def arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of train-*.jsonl.zst, valid.jsonl.zst"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time on this device")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--only", help="waves, by name, with commas")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of every run that change no number")
    parser.add_argument("--list", action="store_true", help="print the runs and end")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error("--workers: takes 1 or more")
    return options


def waiting(options: argparse.Namespace) -> tuple[Path, list[Run]]:
    """The recipe, and the runs that have no row yet. ValueError for a mistake in any of them."""
    plan = read_plan(options.plan)
    recipe = options.plan.parent / plan.recipe
    if not (options.data / "valid.jsonl.zst").exists() or not any(options.data.glob("train-*.jsonl.zst")):
        raise ValueError(
            f"{options.data}: holds no train-*.jsonl.zst or no valid.jsonl.zst; --data is the corpus' folder"
        )
    done = {row.get("run"): row for row in read_rows(options.output) if "bits_per_byte" in row}
    runs = []
    for run in runs_of(plan, options.only):
        check_overrides([*run.overrides, *options.set])
        if run.name not in done:
            if run.obstacle and not options.list:
                raise ValueError(f"{run.obstacle}; or name waves without it in --only")
            if not run.obstacle:
                load_recipe(recipe, command(run, recipe, options.data, options.runs, options.set)[4:])
            runs.append(run)
        elif not run.obstacle and any(
            done[run.name].get(key) != getattr(run, key) for key in ("tokens", "model")
        ):
            print(f"{run.name}: its row is of other tokens or another model, and it is not repeated")
    return recipe, runs


def claim(output: Path) -> Any:
    """The file of rows, which no other study writes to until it is closed. ValueError if one does."""
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{output}: another study writes to it; wait, or give another --output") from None
    except OSError:  # a file system without locks
        pass
    return file


def main() -> None:
    """The command line."""
    options = arguments()
    deadline = time.time() + options.budget_seconds
    try:
        if options.list:
            for run in waiting(options)[1]:
                told = run.obstacle or f"{run.parameters} {run.model['intermediate_size']}"
                print(run.name, told)
            return
        with claim(options.output):
            recipe, runs = waiting(options)
            options.runs.mkdir(parents=True, exist_ok=True)
            pool = Pool(recipe, options, deadline)
            for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(name, pool.stop)
            pool.make(runs)
    except (ValueError, OSError) as error:
        print(f"studies.lm: {words_of(error)}", file=sys.stderr)
        sys.exit(2)
    failed = [code for code in pool.codes if code not in (0, STOPPED)]
    if left := len(runs) - pool.codes.count(0):
        print(f"{left} of {len(runs)} runs are left, {len(failed)} of them failed; run this again to go on")
    sys.exit(STOPPED if pool.deadline == 0.0 else 2 if 2 in failed else 1 if failed else 0)


if __name__ == "__main__":
    main()
