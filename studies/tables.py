"""Markdown tables of the synthetic study's runs."""

import statistics
from typing import Any

from .replicas import Job

Setting = tuple[float, float]  # learning rate, weight decay


def searched(runs: list[dict[str, Any]]) -> dict[Setting, tuple[float, float]]:
    """Of each setting that ran with every seed: mean accuracy on the rows that choose, and mean loss."""
    each: dict[Setting, list[dict[str, Any]]] = {}
    for run in runs:
        each.setdefault((run["lr"], run["weight_decay"]), []).append(run)
    return {
        setting: (statistics.fmean(r["selection"] for r in same), statistics.fmean(r["loss"] for r in same))
        for setting, same in each.items()
        if not any("error" in r for r in same)
    }


def choose(runs: list[dict[str, Any]]) -> Setting | None:
    """The setting of the highest accuracy at the training length, to three digits, then of the lowest loss;
    None if none ran. Never by what is reported: not by longer rows, not by the reported rows or seeds.
    """
    found = searched(runs)
    return max(found, key=lambda s: (round(found[s][0], 3), -found[s][1])) if found else None


Key = tuple[str, str]  # task with what is changed about it, model


def groups(jobs: list[Job], found: dict[str, dict[str, Any]], search: bool = False) -> dict[Key, list[dict]]:
    """The reported runs of each (task, model), or those of its search."""
    made: dict[Key, list[dict[str, Any]]] = {}
    for job in jobs:
        if job.search == search and "error" not in found.get(job.name, {"error": ""}):
            made.setdefault((label(job), job.model), []).append(found[job.name])
    return made


def table(jobs: list[Job], found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a task and model, mean and deviation over its seeds, the worst seed, and what every
    setting of the search came to; what did not run."""
    head = ["task", "model", "parameters", "lr, decay", "seeds", "accuracy", "worst", "by length", "search"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    tried = groups(jobs, found, search=True)
    for (task, model), runs in groups(jobs, found).items():
        accuracies = [run["accuracy"] for run in runs]
        lengths = [
            f"{length}: {spread([run['by_length'][length] for run in runs], 3)}"
            for length in runs[0].get("by_length", {})
        ]
        settings = [
            f"{lr:g}, {decay:g}: {accuracy:.3f}"
            for (lr, decay), (accuracy, _) in searched(tried[task, model]).items()
        ]
        cells = [
            task, model, f"{runs[0]['parameters']:,}", f"{runs[0]['lr']:g}, {runs[0]['weight_decay']:g}",
            str(len(runs)), spread(accuracies), f"{min(accuracies):.4f}", "; ".join(lengths),
            "; ".join(settings),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    failed = {f"{found[j.name]['model']}: {found[j.name]['error']}" for j in jobs
              if "error" in found.get(j.name, {})}  # fmt: skip
    return "\n".join([*lines, "", *(f"- did not run: {reason}" for reason in sorted(failed))]) + "\n"


def label(job: Job) -> str:
    """A task with its length and what is not its own about it."""
    changed = [f"{key} {value}" for key, value in job.options.items()]
    changed += [f"{job.examples} rows"] if job.examples else []
    return f"{job.task} x {job.stages[-1][0]}" + (f" ({', '.join(changed)})" if changed else "")


def spread(values: list[float], digits: int = 4) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"
