"""Makes docs/results/frontier.md and its picture from the rows of `lrnn bench frontier`.

python -m benchmarks.pages.frontier     fill the page from docs/results/frontier.jsonl, or begin it

What stands between marks is made; the rest is written by hand.
"""

from pathlib import Path

from lrnn_lm.evaluate.show import markdown_table

from ..frontier import SMALL, FrontierSettings, split
from ..frontier_results import draw, panels, summarise, table
from ..results import Row, read_results
from .speed import RESULTS
from .tables import filled

PAGE = """# The frontier of speed and expressivity

How much can a recurrence express at what cost? Each contender has the parameters of `bd_lru-m5`, one trainer
and one search over rates; [baselines.md](../baselines.md#the-frontier-of-speed-and-expressivity) says what is
measured and how. A task's number is the length of the longest rows whose second half is answered with an
accuracy of 0.99. Rows of 32 tokens are trained on, 64 of recall.

![Speed against what is tracked, recalled and modelled](frontier.png)

<!-- table -->
<!-- /table -->

<!-- missing -->
<!-- /missing -->

<!-- made -->
<!-- /made -->
"""


def contents(path: Path) -> dict[str, str]:
    """What stands between the marks of the page of these rows."""
    about, rows = read_results(path)
    summary, names, tasks = _summary(rows)
    columns, cells = table([line for line in summary if len(line) > 1], tasks)
    fronts = {  # rows of length 0 are held by all
        key: {lines[i]["contender"] for i in best if lines[i][key] > 0}
        for key, lines, best in panels(summary, tasks)
    }
    for cell in cells:
        cell.append(", ".join(key.replace("validation_", "") for key, on in fronts.items() if cell[0] in on))
    columns.append("on the front of speed and")
    used = [i for i in range(len(columns)) if any(cell[i] for cell in cells)]
    text = markdown_table([columns[i] for i in used], [[cell[i] for i in used] for cell in cells])
    return {"table": text.strip(), "missing": _missing(rows, names), "made": _made(about, rows, names, tasks)}


def _summary(rows: list[Row]) -> tuple[list[Row], list[str], list[str]]:
    """A line a contender; contenders and tasks, in their usual order."""
    usual = FrontierSettings()
    found = {row["contender"] for row in rows}, {row.get("task") for row in rows}
    names, tasks = ([x for x in split(text) if x in there]
                    for text, there in zip((usual.contenders, usual.tasks), found, strict=True))  # fmt: skip
    return summarise(rows, names, tasks), names, tasks


def _missing(rows: list[Row], names: list[str]) -> str:
    """A line for each empty cell: its reason, or "not measured"; and who ran with fewer rows."""
    lines = []
    all_measured = dict.fromkeys(row.get("task", row["kind"]) for row in rows)
    for name in names:
        own = [row for row in rows if row["contender"] == name]
        for reason in dict.fromkeys(row["reason"] for row in own if "reason" in row):
            what = [row.get("task", row["kind"]) for row in own if row.get("reason") == reason]
            lines.append(f"- `{name}`, {', '.join(dict.fromkeys(what))}: {reason}")
        there = {row.get("task", row["kind"]) for row in own}
        if absent := [what for what in all_measured if what not in there]:
            lines.append(f"- `{name}`, {', '.join(absent)}: not measured")
    full = max((row["B"] for row in rows if "B" in row), default=0)
    small = [f"`{row['contender']}` {row['B']}" for row in rows if row.get("B", full) < full]
    if small:
        lines.append(f"- Speed with fewer rows a step than {full}, as memory ran out: {', '.join(small)}")
    return "\n".join(lines) or "Nothing is missing."


def _made(about: Row, rows: list[Row], names: list[str], tasks: list[str]) -> str:
    """The command, the machine and the commit."""
    given = about["settings"]
    small = ["--small"] if all(given[key] == value for key, value in SMALL.items()) else []
    flags = ("corpus", "corpus_tokens", "steps", "longest")
    words = [f"--{key.replace('_', '-')} {given[key]}" for key in flags if given[key] is not None]
    rates = ",".join(f"{lr:g}" for lr in sorted({row["lr"] for row in rows if "lr" in row}))
    words += [*small, f"--tasks {','.join(tasks)}", f"--lrs {rates}", f"--contenders {','.join(names)}"]
    commit = about.get("commit", "unknown")
    return (
        f"{about['device']}, torch {about['torch']}, commit {commit}. The rows are in "
        "[frontier.jsonl](frontier.jsonl); `python -m benchmarks.pages.frontier` makes this page.\n\n"
        f"    lrnn bench frontier {' '.join(words)} --processes 8 --output frontier.jsonl"
    )


def write(path: Path, page: Path) -> None:
    """Fill the page, or begin it, and draw its picture."""
    text = page.read_text(encoding="utf-8") if page.is_file() else PAGE
    made = {name: lambda part=part: part for name, part in contents(path).items()}
    page.write_text(filled(text, made), encoding="utf-8")
    about, rows = read_results(path)
    summary, _, tasks = _summary(rows)
    draw(summary, tasks, page.with_suffix(".png"), about["device"])


if __name__ == "__main__":
    write(RESULTS / "frontier.jsonl", RESULTS / "frontier.md")
