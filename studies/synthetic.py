"""The study of the paper's synthetic claims: every task with every mixer, at equal parameters, over seeds.

    python -m studies.synthetic --study final --output runs/study --minutes 5 --processes 4
    python -m studies.synthetic --study states --output runs/study --tasks s3 --models bd_lru-m4

`states` and `mad` train every (task, model) with every learning rate and weight decay, on the search's seeds.
The setting that is best on held-out rows of the training length is then trained with other seeds and reported
on other rows. `final` is both studies. All models of a study have as many parameters as the reference, to
within a few per mille. Runs share the device, in waves and several processes. When the minutes are over, no
wave starts and running ones are dropped. The same command continues; with `--minutes 0` it only writes the
tables of finished runs.

Writes OUTPUT/results.jsonl (a line per run), OUTPUT/STUDY.json, OUTPUT/STUDY.md (the table) and, for state
tasks, OUTPUT/STUDY.png.
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lrnn_lm.data import SYNTHETIC_TASKS
from lrnn_lm.files import pick_device, words_of

from .contenders import MODELS, Fitting, contender
from .jsonl import append_row, read_rows
from .picture import draw_states
from .replicas import Job, train_wave
from .tables import choose, table

TASKS = {
    "states": ["s5", "s4", "s3"],
    "mad": [
        "in_context_recall", "memorisation", "compression", "noisy_in_context_recall",
        "selective_copying", "fuzzy_in_context_recall",
    ],
}  # fmt: skip
TRAINED, TESTED = 32, (32, 64, 128, 256, 512)
REFERENCE = {"states": "bd_lru-m5", "mad": "bd_lru-m4"}  # whose size the others are brought to
BLOCKS = {"bd_lru-m5": 16, "bd_lru-m4": 20}  # at width 64
GRACE = 10.0  # seconds after the deadline that a wave under way may take to look at the clock
_FEWER = [6400, 3200, 1600, 800]
SWEEPS: dict[str, dict[str, list[int | float]]] = {  # what the published benchmark varies, one key at a time
    "in_context_recall": {"vocab_size": [32, 64, 128], "length": [256, 512, 1024], "examples": _FEWER},
    "noisy_in_context_recall": {
        "vocab_size": [48, 80, 144], "length": [256, 512, 1024], "examples": _FEWER, "noise": [0.4, 0.6, 0.8],
    },
    "fuzzy_in_context_recall": {"vocab_size": [32, 64, 128], "length": [256, 512, 1024], "examples": _FEWER},
    "selective_copying": {
        "vocab_size": [32, 64, 128], "length": [512, 1024], "examples": _FEWER, "copies": [32, 64, 96],
    },
    "memorisation": {"vocab_size": [512, 1024, 2048, 4096, 8192]},
    "compression": {"vocab_size": [32, 64, 128], "length": [64, 128, 256], "examples": _FEWER},
}  # fmt: skip
MEMORISATION_STEPS = 400  # 200 times its 256 rows, as published


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m studies.synthetic",
                                     description=(__doc__ or "").split("\n")[0])  # fmt: skip
    add = parser.add_argument
    add("--output", type=Path, required=True)
    add("--study", choices=["states", "mad", "final"], default="states")
    add("--tasks", help="instead of the study's, separated by commas")
    add("--models", default=",".join(MODELS), help="separated by commas")
    add("--gate", default="softmax", help="of bd_lru and h_lru")
    add("--gate-std", type=float, default=1.0, help="spread of their logits at the start; 0: the model's own")
    add("--sweep", action="store_true", help="mad: the published difficulties too, one at a time")
    add("--hidden", type=int, default=64)
    add("--layers", type=int, help="default: 1 for states, 2 for mad")
    add(
        "--short",
        default="4:800,8:600,16:400",
        help="states: length:steps to begin with, separated by commas, or empty",
    )
    add("--steps", type=int, help="at the training length; default: 1800 for states, 4000 for mad")
    add("--rows", type=int, help="a step; default: 256 for states, 128 for mad")
    add("--weight-decays", help="each with each rate; default: 0.1 for states, 0 for mad")
    add("--lrs", default="1e-3,3e-3,1e-2")
    add(
        "--search-seeds",
        default="100,101",
        help="that rates and decays are chosen with, on rows of their own",
    )
    add("--seeds", default="0,1,2", help="that are reported")
    add("--minutes", type=float, default=5.0)
    add("--processes", type=int, default=0, help="0: in this one")
    add("--wave", type=int, default=12, help="runs side by side in a process")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(given)


def named(job: Job) -> Job:
    """`job` with a name that says what it is; equal settings give equal names."""
    settings = asdict(replace(job, name="", seed=0, lr=0.0, search=False))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return replace(job, name=f"{job.study}-{job.task}-{job.model}-{digest}-lr{job.lr:g}-seed{job.seed}")


def base_job(study: str, task: str, options: argparse.Namespace) -> Job:
    """A run of the study but for its model, rate and seed."""
    if task not in SYNTHETIC_TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(SYNTHETIC_TASKS)}")
    kind = SYNTHETIC_TASKS[task]
    states = kind.examples is None
    if states:
        stages, tested = (*_stages(options.short), (TRAINED, options.steps or 1800)), TESTED
    else:
        steps = MEMORISATION_STEPS if task == "memorisation" else options.steps or 4000
        stages, tested = ((kind.length, steps),), (kind.length,)
    return Job(
        name="", task=task, model="", mixer={}, seed=0, lr=0.0, stages=stages, tested=tested,
        rows=options.rows or (256 if states else 128), hidden=options.hidden,
        layers=options.layers or (1 if states else 2), intermediate=2 * options.hidden,
        options={"start": 1} if states else {}, study=study,
    )  # fmt: skip


def _stages(text: str) -> list[tuple[int, int]]:
    """`4:600,8:400` as pairs of length and steps."""
    pairs = [part.split(":") for part in text.split(",") if part]
    if not all(
        len(pair) == 2 and all(number.isdecimal() and int(number) for number in pair) for pair in pairs
    ):
        raise ValueError(f"--short {text}: expected pairs of length and steps, as in 4:600,8:400")
    return [(int(length), int(steps)) for length, steps in pairs]


def variants(task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is changed about a task: nothing, and with --sweep each published difficulty."""
    sweep = SWEEPS.get(task, {}) if options.sweep else {}
    return [{}, *({key: value} for key, values in sweep.items() for value in values)]


def varied(job: Job, change: dict[str, Any]) -> Job:
    """`job` with one of the `variants` of its task: a length, a number of training rows, or an option."""
    (key, value), *_ = change.items() or [("", None)]
    if key == "length":
        return replace(job, stages=((value, job.steps),), tested=(value,))
    if key == "examples":
        return replace(job, examples=value)
    return replace(job, options={**job.options, **change})


def gates(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of gates."""
    return {"gate": options.gate, **({"gate_std": options.gate_std} if options.gate_std else {})}


def study_jobs(study: str, options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> list[Job]:
    """Every setting with every seed of the search; the reported seeds of those whose search is done.

    Raises:
        ValueError: a seed that is in the search and is reported.
    """
    tasks = options.tasks.split(",") if options.tasks else TASKS[study]
    if options.study == "final":
        tasks = [task for task in tasks if task in TASKS[study]]
    seeds, search_seeds = (
        [int(s) for s in text.split(",")] for text in (options.seeds, options.search_seeds)
    )
    if both := sorted({*seeds} & {*search_seeds}):
        raise ValueError(
            f"seed {both[0]} is in --seeds and in --search-seeds: report seeds that chose nothing"
        )
    decays = options.weight_decays or ("0.1" if study == "states" else "0")
    settings = list(product(map(float, options.lrs.split(",")), map(float, decays.split(","))))
    fit = _fitting(study, options)
    jobs = []
    each = [(task, change) for task in tasks for change in variants(task, options)]
    for (task, change), model in product(each, options.models.split(",")):
        job = fit(contender(varied(base_job(study, task, options), change), model, **gates(options)))
        tried = [
            named(replace(job, lr=lr, weight_decay=decay, seed=seed, search=True))
            for lr, decay in settings
            for seed in search_seeds
        ]
        jobs += tried
        if all(one.name in found for one in tried) and (best := choose([found[one.name] for one in tried])):
            jobs += [named(replace(job, lr=best[0], weight_decay=best[1], seed=seed)) for seed in seeds]
    return jobs


_fits: dict[tuple[str, int, int | None], Fitting] = {}


def _fitting(study: str, options: argparse.Namespace) -> Fitting:
    """The widths of a study's models."""
    key = (study, options.hidden, options.layers)
    if key not in _fits:
        model = REFERENCE[study]
        job = contender(
            base_job(study, TASKS[study][0], options), model, num_blocks=BLOCKS[model] * options.hidden // 64
        )
        _fits[key] = Fitting(job)
    return _fits[key]


def jobs_now(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> list[Job]:
    """All runs that can be named by now, in the order in which they should be done."""
    if options.study != "final":
        return study_jobs(options.study, options, found)
    return [job for study in TASKS for job in study_jobs(study, options, found)]


def next_wave(waiting: list[Job], most: int) -> list[Job]:
    """The first job and those that can run beside it: of equal task, rows and stages."""
    first = waiting[0]
    return [job for job in waiting if _data(job) == _data(first)][:most]


def _data(job: Job) -> tuple[Any, ...]:
    return job.task, job.rows, job.stages, job.options, job.examples


def run_wave(jobs: list[Job], device: str, deadline: float) -> list[dict[str, Any]]:
    """A wave in this process, on one thread."""
    torch.set_num_threads(1)
    return train_wave(jobs, torch.device(device), deadline)


class Here:
    """What a pool is, in this process."""

    def apply_async(self, function: Any, inputs: tuple) -> "Here":
        self.value = function(*inputs)
        return self

    def ready(self) -> bool:
        return True

    def get(self) -> Any:
        return self.value


def work(options: argparse.Namespace, deadline: float) -> bool:
    """Run what is not done yet until the deadline; whether all is done."""
    file = options.output / "results.jsonl"
    pool: Any = Here()
    if options.processes:
        pool = multiprocessing.get_context("spawn").Pool(options.processes)
    running: list[tuple[Any, list[Job]]] = []
    while True:
        found = results(file)
        busy = {job.name for _, jobs in running for job in jobs}
        waiting = [job for job in jobs_now(options, found) if job.name not in found and job.name not in busy]
        while waiting and len(running) < max(1, options.processes) and time.monotonic() < deadline:
            wave = next_wave(waiting, options.wave)
            names = {job.name for job in wave}
            waiting = [job for job in waiting if job.name not in names]
            running.append((pool.apply_async(run_wave, (wave, options.device, deadline)), wave))
        if not running or time.monotonic() > deadline + GRACE:
            break
        for future, wave in [pair for pair in running if pair[0].ready()]:
            running.remove((future, wave))
            _keep(file, future.get())
        time.sleep(0.05 if options.processes else 0)
    if options.processes:
        pool.terminate()
    return not waiting


def _keep(file: Path, made: list[dict[str, Any]]) -> None:
    """Append results, a line a run."""
    for result in made:
        append_row(file, result)
        told = result.get("error") or f"{result['accuracy']:.4f} {result.get('by_length', '')}"
        print(result["name"], told, flush=True)


def results(file: Path) -> dict[str, dict[str, Any]]:
    """The runs that are done, by name."""
    return {result["name"]: result for result in read_rows(file)}


def main(given: list[str] | None = None) -> None:
    """Run the study as far as the minutes go, and write its table."""
    options = arguments(given)
    if options.wave < 1:
        raise ValueError(f"--wave {options.wave}: takes 1 or more")
    pick_device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    whole = work(options, time.monotonic() + 60 * options.minutes)
    found = results(options.output / "results.jsonl")
    jobs = jobs_now(options, found)
    text = table(jobs, found)
    settings = {key: str(value) for key, value in vars(options).items()}
    runs = [{key: value for key, value in found[job.name].items() if key != "losses"}
            for job in jobs if job.name in found]  # fmt: skip
    facts = {"command": sys.argv, "settings": settings, "complete": whole, "runs": runs}
    (options.output / f"{options.study}.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    (options.output / f"{options.study}.md").write_text(text, "utf-8")
    draw_states(jobs, found, options.output / f"{options.study}.png")
    print(text)
    print("complete" if whole else "the minutes are over; the same command continues")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as mistake:
        print(f"study: {words_of(mistake)}", file=sys.stderr)
        sys.exit(2)
