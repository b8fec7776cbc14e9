"""The study of the paper's synthetic claims: tasks against mixers, at equal parameters, over seeds.

    S=eval/studies/synthetic.py
    python $S --output runs/study --study states --minutes 20 --jobs 8
    python $S --output runs/study --study mad --minutes 20 --jobs 8
    python $S --output runs/study --tasks s3 --models bd_lru-m1,bd_lru-m4 --hidden 32 --steps 300

Each (task, model) is trained once for every learning rate with the first seed; the other seeds train with
the rate that was best for it. All models of a task have the parameters of the first (within a few per mille):
the width of the recurrence is fitted, and where a mixer has no such width, that of the SwiGLU. Runs share the
device, `--jobs` processes side by side. When the minutes are over no run is begun; run the command again to
go on. State tasks are probed at 16 times the training length.

Writes OUTPUT/results.jsonl (a line a run), OUTPUT/NAME.json and OUTPUT/NAME.md (the table).
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    **{f"bd_lru-m{m}": {"type": "bd_lru", "block_size": m} for m in (1, 2, 4, 5, 8)},
    **{f"h_lru-m{m}": {"type": "h_lru", "order": m} for m in (2, 4, 8)},
    "lstm": {"type": "lstm"},
    "attention": {"type": "attention", "num_heads": 8},
    "mamba2": {"type": "mamba2", "expand": 2, "head_dim": 32, "state_size": 16},
    "deltanet": {"type": "deltanet", "num_heads": 4, "allow_neg_eigval": False},
    "deltanet-negative": {"type": "deltanet", "num_heads": 4, "allow_neg_eigval": True},
    "gated_deltaproduct": {"type": "gated_deltaproduct", "num_heads": 2, "head_dim": 32},
}
STUDIES = {
    "states": ["s3", "s4", "s5"],
    "mad": [
        "in_context_recall", "fuzzy_in_context_recall", "noisy_in_context_recall", "selective_copying",
        "compression", "memorisation",
    ],
}  # fmt: skip
PROBED = 16  # training lengths
FITTED = {"bd_lru": "num_blocks", "h_lru": "num_blocks", "lstm": "width"}  # else the SwiGLU


def arguments() -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--study", choices=list(STUDIES), default="states")
    parser.add_argument("--tasks", help="instead of the study's, separated by commas")
    parser.add_argument(
        "--models", default=",".join(MODELS), help="separated by commas; the first sets the size"
    )
    parser.add_argument("--gates", default="softmax", help="of bd_lru and h_lru, separated by commas")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--rows", type=int, default=128, help="a step")
    parser.add_argument("--lrs", default="1e-3,3e-3,1e-2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--start", type=int, default=0, help="1: a start symbol before each row of a state task"
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of each run")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def recipe_of(job: dict[str, Any], parameters: int | None = None) -> Any:
    """The recipe of a run; with `parameters`, its widths fitted to that many."""
    from lrnn_lm.recipe import load_recipe

    kind = job["mixer"]["type"]
    overrides = [
        f"name={job['name']}", f"seed={job['seed']}", f"train.runs_dir={job['runs']}",
        f"optim.lr={job['lr']}",
        f"data.cache_dir={job['runs']}/cache", f"model.hidden_size={job['hidden']}",
        f"model.intermediate_size={4 * job['hidden']}", f"train.device={job['device']}",
        f"train.micro_batch={job['rows']}", f"data.num_workers={job['workers']}", "optim.warmup=5%",
        *(f"model.mixer.{key}={json.dumps(value)}" for key, value in job["mixer"].items()),
    ]  # fmt: skip
    if job["start"]:
        overrides.append(f"data.source.options.start={job['start']}")
    path = f"recipes/synthetic/{job['task'].replace('_', '-')}.yaml"
    length = load_recipe(path).data.sequence_length
    overrides.append(f"train.tokens_per_step={job['rows'] * length}")
    if job["steps"]:
        overrides += [f"train.tokens={job['steps'] * job['rows'] * length}"]
        overrides += [
            f"eval.every={max(1, job['steps'] // 5)} steps",
            f"checkpoint.every={job['steps']} steps",
        ]
    if parameters is not None:
        overrides.append(fitted(path, overrides, kind, parameters))
    return load_recipe(path, overrides)


def count(path: str, overrides: list[str]) -> int:
    """Parameters of a recipe's model, as a language model (an auto-encoder's decoder is the same for all)."""
    from lrnn_lm.model.accounting import account
    from lrnn_lm.recipe import load_recipe
    from lrnn_lm.train.build import model_config
    from lrnn_lm.train.info import vocabulary

    recipe = load_recipe(path, overrides)
    return account(model_config(recipe, vocabulary(recipe)), 16).total_parameters


def fitted(path: str, overrides: list[str], kind: str, parameters: int) -> str:
    """The override of a width that brings the model nearest to `parameters`, by bisection."""
    key = f"model.mixer.{FITTED[kind]}" if kind in FITTED else "model.intermediate_size"
    low, high = 1, 2
    while count(path, [*overrides, f"{key}={high}"]) < parameters and high < 2**16:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        below = count(path, [*overrides, f"{key}={middle}"]) < parameters
        low, high = (middle, high) if below else (low, middle)
    gaps = {width: abs(count(path, [*overrides, f"{key}={width}"]) - parameters) for width in (low, high)}
    return f"{key}={min(gaps, key=gaps.__getitem__)}"


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train one run and measure it; what went wrong stands in `error`."""
    import torch
    from rich.console import Console

    from lrnn_lm.data import STATE_TASKS
    from lrnn_lm.evaluate.length import by_multiple, probe_length
    from lrnn_lm.train.build import build_trainer

    torch.set_num_threads(1)
    began = time.monotonic()
    try:
        trainer = build_trainer(recipe_of(job, job["parameters"]), Console(quiet=True))
        checkpoint = trainer.run()
    except ValueError as error:
        return {**job, "error": str(error)}
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["accuracy"] for line in lines if "accuracy" in line]
    result = {
        **job,
        "parameters_had": sum(p.numel() for p in trainer.bare_model.parameters()),
        "accuracy": accuracy[-1],
        "best_accuracy": max(accuracy),
        "seconds": round(time.monotonic() - began, 1),
    }
    if job["task"] in STATE_TASKS:
        facts = probe_length(checkpoint, f"{PROBED}x", rows=64, device=job["device"], quiet=True)
        result["by_length"] = [[where, hits] for where, _, hits in by_multiple(facts)]
    return result


def jobs_of(options: argparse.Namespace, lr_of: dict[tuple[str, str], float] | None) -> list[dict[str, Any]]:
    """The runs of the first seed at every rate; or, with the best rates, those of the other seeds."""
    seeds = [int(seed) for seed in options.seeds.split(",")]
    tasks = options.tasks.split(",") if options.tasks else STUDIES[options.study]
    gates = options.gates.split(",")
    jobs = []
    for task in tasks:
        for model in options.models.split(","):
            if model not in MODELS:
                raise ValueError(f"unknown model {model!r}; known: {', '.join(MODELS)}")
            gated = MODELS[model]["type"] in ("bd_lru", "h_lru")
            for gate in gates if gated else [""]:
                label = f"{model}-{gate}" if gate else model
                mixer = {**MODELS[model], **({"gate": gate} if gate else {})}
                if lr_of is None:
                    pairs = [(float(lr), seeds[0]) for lr in options.lrs.split(",")]
                else:
                    pairs = [(lr_of[task, label], seed) for seed in seeds[1:] if (task, label) in lr_of]
                for lr, seed in pairs:
                    name = f"{task}-{label}-d{options.hidden}-s{options.start}-lr{lr:g}-seed{seed}"
                    jobs.append({
                        "name": name, "task": task, "model": label, "mixer": mixer, "lr": lr, "seed": seed,
                        "hidden": options.hidden, "steps": options.steps, "rows": options.rows,
                        "start": options.start, "runs": str(options.output), "workers": options.workers,
                        "device": options.device, "parameters": None,
                    })  # fmt: skip
    return jobs


def set_parameters(jobs: list[dict[str, Any]]) -> None:
    """Give each task's runs the parameters of its first."""
    wanted: dict[str, int] = {}
    for job in jobs:
        if job["task"] not in wanted:
            recipe = recipe_of(job)
            from lrnn_lm.model.accounting import account
            from lrnn_lm.train.build import model_config
            from lrnn_lm.train.info import vocabulary

            wanted[job["task"]] = account(model_config(recipe, vocabulary(recipe)), 16).total_parameters
        job["parameters"] = wanted[job["task"]]


def work(jobs: list[dict[str, Any]], options: argparse.Namespace, deadline: float) -> bool:
    """Run what is not done yet, side by side, until the deadline; whether all is done."""
    file = options.output / "results.jsonl"
    done = {result["name"] for result in results(file)}
    waiting = [job for job in jobs if job["name"] not in done]
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(options.jobs, max(1, len(waiting)))) as pool:
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < options.jobs and time.monotonic() < deadline:
                running.append(pool.apply_async(run, (waiting.pop(0),)))
            if not running:
                break
            for ready in [future for future in running if future.ready()]:
                running.remove(ready)
                result = ready.get()
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(result) + "\n")
                print(result["name"], result.get("error") or f"{result['best_accuracy']:.4f}", flush=True)
            time.sleep(0.2)
    return not waiting


def results(file: Path) -> list[dict[str, Any]]:
    """The runs that are done."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def score(result: dict[str, Any]) -> float:
    """Held-out accuracy; of a run that failed, none."""
    return result.get("best_accuracy", -1.0)


def best_rates(found: list[dict[str, Any]], seed: int) -> dict[tuple[str, str], float]:
    """The learning rate of the first seed's best run, by task and model."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for result in found:
        key = result["task"], result["model"]
        if result["seed"] == seed and (key not in best or score(result) > score(best[key])):
            best[key] = result
    return {key: result["lr"] for key, result in best.items() if score(result) >= 0}


def table(found: list[dict[str, Any]], rates: dict[tuple[str, str], float]) -> str:
    """Markdown: a row a task and model at its best rate, mean and spread over seeds."""
    lines = ["| task | model | parameters | lr | seeds | accuracy | by length |", "|" + " --- |" * 7]
    for (task, model), lr in rates.items():
        runs = [r for r in found if (r["task"], r["model"], r["lr"]) == (task, model, lr) and score(r) >= 0]
        hits = [score(r) for r in runs]
        spread = f" ± {statistics.stdev(hits):.4f}" if len(hits) > 1 else ""
        lengths = []
        for i, (where, _) in enumerate(runs[0].get("by_length", [])):
            lengths.append(f"{where}: {statistics.fmean(r['by_length'][i][1] for r in runs):.3f}")
        cells = [task, model, f"{runs[0]['parameters_had']:,}", f"{lr:g}", str(len(runs))]
        lines.append(
            "| " + " | ".join([*cells, f"{statistics.fmean(hits):.4f}{spread}", "; ".join(lengths)]) + " |"
        )
    failed = sorted({f"{r['model']}: {r['error']}" for r in found if "error" in r})
    return "\n".join([*lines, "", *(f"- did not run: {reason}" for reason in failed)]) + "\n"


def main() -> None:
    """Run the study as far as the minutes go, and write its table."""
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    file = options.output / "results.jsonl"
    jobs = jobs_of(options, None)
    set_parameters(jobs)
    whole = work(jobs, options, deadline)
    names = {job["name"] for job in jobs}
    seed = int(options.seeds.split(",")[0])
    rates = best_rates([r for r in results(file) if r["name"] in names], seed)
    others = jobs_of(options, rates)
    set_parameters_like(others, jobs)
    whole = work(others, options, deadline) and whole
    names |= {job["name"] for job in others}
    found = [r for r in results(file) if r["name"] in names]
    study = options.study if not options.tasks else options.tasks.replace(",", "-")
    settings = {key: str(value) for key, value in vars(options).items()}
    text = json.dumps({"command": sys.argv, "settings": settings, "complete": whole, "runs": found}, indent=1)
    (options.output / f"{study}.json").write_text(text + "\n", encoding="utf-8")
    (options.output / f"{study}.md").write_text(table(found, rates), encoding="utf-8")
    print(table(found, rates))
    print("complete" if whole else "the minutes are over; the same command goes on")


def set_parameters_like(jobs: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """The same parameters a task as `others` have."""
    wanted = {job["task"]: job["parameters"] for job in others}
    for job in jobs:
        job["parameters"] = wanted[job["task"]]


if __name__ == "__main__":
    try:
        main()
    except ValueError as mistake:
        print(f"study: {mistake}", file=sys.stderr)
        sys.exit(2)
