"""The study's runs as tables in Markdown."""

import statistics
from typing import Any

from .replicas import Job


def rank(result: dict[str, Any]) -> tuple[float, float]:
    """What the best learning rate has most of: held-out accuracy at the training length, then a low loss."""
    return round(result.get("accuracy", -1.0), 3), -result.get("loss", float("inf"))


def groups(jobs: list[Job], found: dict[str, dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The runs of each (task, model) at its best learning rate, those of the first seed first."""
    tried: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job in jobs:
        if job.name in found and "error" not in found[job.name]:
            tried.setdefault((label(job), job.model), []).append(found[job.name])
    chosen = {}
    for key, runs in tried.items():
        best = max((run for run in runs if run["seed"] == runs[0]["seed"]), key=rank)
        chosen[key] = [run for run in runs if run["lr"] == best["lr"]]
    return chosen


def table(jobs: list[Job], found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a task and model at its best rate, mean and spread over seeds; what did not run."""
    lines = ["| task | model | parameters | lr | seeds | accuracy | by length |", "|" + " --- |" * 7]
    for (task, model), runs in groups(jobs, found).items():
        cells = [task, model, f"{runs[0]['parameters']:,}", f"{runs[0]['lr']:g}", str(len(runs))]
        lengths = [
            f"{length}: {statistics.fmean(r['by_length'][length] for r in runs):.3f}"
            for length in runs[0].get("by_length", {})
        ]
        cells += [spread([r["accuracy"] for r in runs]), "; ".join(lengths)]
        lines.append("| " + " | ".join(cells) + " |")
    failed = {f"{found[j.name]['model']}: {found[j.name]['error']}" for j in jobs
              if "error" in found.get(j.name, {})}  # fmt: skip
    return "\n".join([*lines, "", *(f"- did not run: {reason}" for reason in sorted(failed))]) + "\n"


def label(job: Job) -> str:
    """A task with its length and what is not its own about it."""
    changed = [f"{key} {value}" for key, value in job.options.items()]
    changed += [f"{job.examples} rows"] if job.examples else []
    return f"{job.task} x {job.stages[-1][0]}" + (f" ({', '.join(changed)})" if changed else "")


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def search_table(jobs: list[Job], found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a setting, by task, the best at four times the training length (or on recall) first."""
    lines = [
        "| task | M | gate | std | width | layers | lr | decay | seed | stages | accuracy | by length |",
        "|" + " --- |" * 12,
    ]
    done = [found[job.name] for job in jobs if job.name in found and "error" not in found[job.name]]

    def merit(r: dict[str, Any]) -> tuple[str, int, float]:
        return r["task"], r["mixer"]["block_size"], -r.get("by_length", {}).get("128", r["accuracy"])

    for r in sorted(done, key=merit):
        mixer, accuracy = r["mixer"], f"{r['accuracy']:.4f}"
        stages = " ".join(f"{length}:{steps}" for length, steps in r["stages"])
        lengths = "; ".join(f"{length}: {hits:.3f}" for length, hits in r.get("by_length", {}).items())
        cells = [r["task"], mixer["block_size"], mixer["gate"], mixer.get("gate_std", ""), r["hidden"],
                 r["layers"], r["lr"], r["weight_decay"], r["seed"], stages, accuracy, lengths]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
