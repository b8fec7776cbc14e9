"""Measured numbers in the pages: benchmarks.pages.tables makes the tables, sentences agree with them."""

import importlib
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.compare import settings_of
from benchmarks.decode import DecodeSettings
from benchmarks.results import read_results
from benchmarks.train import TrainSettings
from lrnn_lm.cli import main
from lrnn_lm.model.accounting import account
from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import model_config
from studies.lm_report import (
    HEADLINE,
    SHIPPED,
    best_rates,
    bits_at,
    by_seed,
    rates_table,
    read_rows,
    read_speeds,
    results_table,
    seconds_table,
    seconds_to,
)
from studies.width import BASE, WIDTHS, best_rate

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"
BENCH = sorted([*RESULTS.glob("*-h100.jsonl"), *RESULTS.glob("sizes/*.jsonl")])
# Nor the rows of train.fp8, which was removed: they are history, and nothing makes them again.
BENCH = [path for path in BENCH if not path.name.startswith(("synthetic", "train-fp8"))]
PERFORMANCE = (DOCS / "performance.md").read_text(encoding="utf-8")
SYNTHETIC = (RESULTS / "synthetic.md").read_text(encoding="utf-8")
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables():
    return importlib.import_module("benchmarks.pages.tables")


def one_line(page: str) -> str:
    """A page without its line breaks and marks of emphasis, so that sentences can be looked for."""
    return " ".join(page.replace("**", "").split())


@pytest.mark.parametrize(
    "name", ["README", "docs/performance", "docs/results/synthetic", "docs/certificate", "docs/scaling"]
)
def test_tables_are_what_the_rows_make(tables, name):
    page = (DOCS.parent / f"{name}.md").read_text(encoding="utf-8")
    assert tables.filled(page, tables.PAGES[f"{name}.md"]) == page


def test_the_best_rate_is_carried_from_width_to_width():
    """Within a factor of 1.5 at all widths; the numbers on the page are the rows'."""
    rows = [json.loads(line) for line in (RESULTS / "width.jsonl").read_text().splitlines()]
    best = {
        base: [best_rate([r for r in rows if (r["width"], r["base_width"]) == (w, base)]) for w in WIDTHS]
        for base in (BASE, None)
    }
    assert max(best[BASE]) < 1.5 * min(best[BASE])
    told = [f"{f(best[base]):.4f}" for base, f in itertools.product((BASE, None), (min, max))]
    page = one_line((DOCS / "training.md").read_text(encoding="utf-8"))
    assert f"the best rate was {told[0]} to {told[1]}, without it {told[3]} to {told[2]}" in page


def test_a_changed_row_changes_its_table(tables, tmp_path, monkeypatch):
    """The table is read from the rows, and a number changed by hand does not survive."""
    files = RESULTS.rglob("*.json*")
    for path in files:
        copy = tmp_path / path.relative_to(RESULTS)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    file = tmp_path / "train-h100.jsonl"
    file.write_text(
        file.read_text().replace('"tokens_per_second": 419425.1', '"tokens_per_second": 838850.2')
    )
    monkeypatch.setattr(tables.speed, "RESULTS", tmp_path)
    made = tables.speed.train()
    assert "838,850" in made
    assert "| 2.72 |" in made
    page = PERFORMANCE.replace("419,425", "419,426")
    assert tables.filled(page, tables.PAGES["docs/performance.md"]) != page


@pytest.mark.parametrize("path", BENCH, ids=lambda path: path.stem)
def test_rows_can_be_made_again(path):
    """A file names its commit and all that its rows were measured with; every file is in the page."""
    about, rows = read_results(path)
    kind = {"train": TrainSettings, "decode": DecodeSettings}[about["benchmark"]]
    settings = settings_of(about, kind)
    assert about["commit"]
    assert f"results/{path.relative_to(RESULTS)}" in PERFORMANCE or path.name == "train-before-h100.jsonl"
    for row in (row for row in rows if "reason" not in row):
        if kind is TrainSettings:
            assert row["residual_in_fp32"] is settings.residual_in_fp32
            assert row["tokens_per_second"] == pytest.approx(row["B"] * row["T"] / row["step_seconds"])
            assert row["mfu"] == pytest.approx(
                row["tokens_per_second"] * row["flops_per_token"] / 989e12, rel=0.01
            )
        else:
            assert row.get("emulated", False) == (row["prefill_tokens"] < row["context"])
            assert settings.emulate >= row.get("emulated", False)
            assert row["tokens_per_second"] == pytest.approx(row["B"] / row["token_seconds"])


COMMANDS = sorted(set(re.findall(r"`(lrnn bench (?:train|decode) [^`]*)`", PERFORMANCE)))


WRITTEN = dict(re.findall(r"```yaml\n# ([\w-]+)\.yaml.*\n((?:.+\n)+)```", PERFORMANCE))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_contender_written_out_in_the_page_is_that_of_the_rows(name, tmp_path):
    for other, text in WRITTEN.items():
        text = text.replace("extends: recipes/", f"extends: {DOCS.parent}/recipes/")
        (tmp_path / f"{other}.yaml").write_text(text)
    recipe = load_recipe(tmp_path / f"{name}.yaml")
    counted = account(model_config(recipe, recipe.model.vocab_size), 2048).total_parameters
    lines = "".join((RESULTS / f"train-{kind}-h200.jsonl").read_text() for kind in ("padding", "heads"))
    measured = [row for row in map(json.loads, lines.splitlines()) if row.get("contender") == name]
    assert measured
    for row in measured:
        assert row["parameters"] == counted
        assert row["residual_in_fp32"] is recipe.train.residual_in_fp32


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_whole(command, monkeypatch):
    """The command line takes each as it stands; what it would run is left out."""
    seen = []
    for module in ("train", "decode"):
        bench = importlib.import_module(f"benchmarks.{module}")
        monkeypatch.setattr(bench, "run", lambda settings, device, output: seen.append(settings))
    assert ".." not in command
    with pytest.raises(SystemExit) as done:
        main(command.split()[1:])
    assert not done.value.code
    assert len(seen) == 1


def test_a_source_repeats_its_settings(tables, monkeypatch):
    """The command above a table gives the settings in the file back, flags of two words and `--no-` too."""
    for path in BENCH:
        name = str(path.relative_to(RESULTS))
        about, _ = read_results(path)
        seen = []
        bench = importlib.import_module(f"benchmarks.{about['benchmark']}")
        monkeypatch.setattr(bench, "run", lambda settings, device, output, seen=seen: seen.append(settings))
        command = re.search("`(lrnn [^`]*)`", tables.speed.source(name)).group(1)
        with pytest.raises(SystemExit):
            main(command.split()[1:])
        kind = type(seen[0])
        wanted = replace(settings_of(about, kind), budget_seconds=None)
        told = seen[0]
        if about["benchmark"] == "train" and told.residual_in_fp32 is None:  # the recipes' own
            told = kind(**{**vars(told), "residual_in_fp32": True})
        assert told == wanted, name


def test_every_ratio_says_what_it_is_read_with():
    """The deeper Transformer with its depth, long contexts with `emulated`, means with their tasks."""
    for page in (README, PERFORMANCE):
        for line in page.splitlines():
            if line.startswith("|") and "ransformer" in line and "times as fast" in line:
                assert "19 layers" in line or "of equal depth and width" in line, line
    emulated = 0
    for path in (path for path in BENCH if path.name.startswith("decode")):
        rows = [row for row in read_results(path)[1] if row.get("emulated")]
        if path.name == "decode-before-h100.jsonl":  # the rest was measured again
            rows = [row for row in rows if row["mode"] == "compiled"]
        emulated += len(rows)
    assert PERFORMANCE.count(" emulated | ") == emulated
    assert "after 1M tokens" not in README
    for line in (line for line in SYNTHETIC.splitlines() if "0.924" in line and "claim" not in line):
        assert "five of its six tasks" in line or line.startswith("| bd_lru-m4"), line
    assert "mean of these five" in SYNTHETIC


def test_language_models_of_the_pages_are_those_of_the_rows():
    """README's numbers and the page's tables are made of docs/results/lm.jsonl."""
    rows = [row for row in read_rows(RESULTS / "lm.jsonl") if row["size"] == "68m"]
    found = {name: f"{mean(by_seed(own)):.3f}" for name, own in best_rates(rows).items()}
    table = README[README.index("| | as shipped") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table]
    for i, names in enumerate((SHIPPED, HEADLINE), start=1):
        assert [row[i] for row in cells if row[i]] == [found[name] for name in names]
    page = (RESULTS / "lm.md").read_text()
    rows = read_rows(RESULTS / "lm.jsonl")
    speeds = read_speeds(RESULTS / "lm-speed.jsonl")
    for table in (results_table(rows), rates_table(rows), seconds_table(rows, speeds)):
        assert table in page


def test_numbers_of_the_choice_of_a_recipe_stand_among_the_results():
    """The table in docs/recipes.md of what to take for what has only numbers that stand in lm.md."""
    page = (DOCS / "recipes.md").read_text()
    section = page[page.index("### Which recipe\n") :].split("\n\nOn the login node")[0]
    numbers = re.findall(r"(?<![\w.,])\d[\d,.]*\d", re.sub(r"\]\([^)]*\)", "", section))
    assert len(numbers) >= 15
    results = (RESULTS / "lm.md").read_text()
    assert [n for n in numbers if not re.search(rf"(?<![\d.,]){re.escape(n)}(?![\d]|[.,]\d)", results)] == []


def test_sentences_on_copies_and_on_less_attention():
    """What recurrence alone loses by copying, and what hybrids lose with one attention layer in twelve."""
    text = one_line((RESULTS / "lm.md").read_text())
    probes = json.loads((RESULTS / "lm-tied-probes.json").read_text())["recall"]
    ours, peer, hybrid = (
        next(probe for probe in probes if probe["name"].startswith(f"{name}-68m"))
        for name in ("mixed-large-tied", "transformer-final-tied", "hybrid-final-tied")
    )
    ahead, behind = peer["loss"] - ours["loss"], ours["loss"] - hybrid["loss"]
    assert f"{ahead:.3f} nats ahead of the Transformer and {behind:.3f} behind the hybrid" in text
    pairs = zip(ours["distance"], peer["distance"], strict=False)
    near, few, *worse = (mine["loss"] - other["loss"] for mine, other in pairs)
    assert max(near, few) < 0  # "better .. up to 15 tokens back"
    assert "worse by {:.2f}, {:.2f} and {:.2f} nats from 16, 64 and 256".format(*worse) in text

    search = one_line((RESULTS / "lm-search.md").read_text())
    rows = [row for row in read_rows(RESULTS / "lm.jsonl") if row["size"] == "68m" and row["lr"] == 6e-3]
    names = ("hybrid-m1-qk", "hybrid-m2-qk", "hybrid-m4-qk", "gdn-hybrid-qk")
    costs = []
    for name in names:
        few, many = (
            mean(by_seed([row for row in rows if row["contender"] == kind]))
            for kind in (f"{name}-eleven", name)
        )
        assert all(f"{bits:.4f}" in search for bits in (few, many))
        costs.append(few - many)
    *own, gdn = sorted(costs[:3]) + costs[3:]
    assert f"costs BD-LRU {own[0]:.3f} to {own[-1]:.3f} and Gated DeltaNet {gdn:.3f}" in search


def test_seconds_to_a_loss_lie_between_two_validations():
    taken, bits = [10.0, 20.0, 40.0], [3.0, 2.0, 1.5]
    assert [seconds_to(mark, taken, bits) for mark in (3.0, 2.25, 2.0, 1.5)] == [10, 17.5, 20, 40]
    assert bits_at(seconds_to(1.75, taken, bits), taken, bits) == 1.75
    with pytest.raises(ValueError, match=r"no two validations have 1\.4"):
        seconds_to(1.4, taken, bits)


def test_sentences_of_the_pages(tables):
    """Numbers outside tables that follow from rows."""
    find, text = tables.speed.row_of, one_line(PERFORMANCE)
    fused, graph = (find("decode-h100.jsonl", B=1, mode=m, context=1024) for m in ("fused", "graph"))
    peer = find("decode-transformer-h100.jsonl", context=1024)
    times = [peer["token_seconds"] / row["token_seconds"] for row in (fused, graph)]
    assert f"{times[0]:.1f} times as long as `fused`, and {times[1]:.1f} times" in text
    fp32, bf16 = (
        find(f"train-{kind}h100.jsonl", contender="bd-m4", T=2048) for kind in ("", "bf16-residual-")
    )
    assert f"is {bf16['tokens_per_second'] / fp32['tokens_per_second'] - 1:.1%} faster" in text
    eight = [find("train-fp8-h100.jsonl", contender=name) for name in ("bd-m4", "transformer")]
    assert (
        f"{eight[0]['tokens_per_second']:,.0f} tokens/s in {eight[0]['peak_memory_bytes'] / 1e9:.1f} GB with"
        in text
    )
    assert f"the Transformer had {eight[1]['tokens_per_second']:,.0f}" in text
    ours, deep, shape, mamba = (
        find("train-same-shape-h200.jsonl", contender=name)["tokens_per_second"]
        for name in ("bd-m4", "transformer", "transformer-same-shape", "mamba2")
    )
    assert f"trains {shape:,.0f} tokens/s, bd-m4 {ours:,.0f}, so bd-m4 is at {ours / shape:.2f} of it" in text
    assert f"{deep:,.0f} (bd-m4 {ours / deep:.2f} times as fast)" in text
    assert f"{mamba:,.0f} ({ours / mamba:.2f} times)" in text
    assert f"bd-m4 is {ours / mamba:.2f} times as fast" in text
    wide = find("decode-h100.jsonl", B=64, mode="fused", context=1024)
    assert f"Batch 64 misses its goal: {wide['share_of_limit']:.2f} of the limit" in text
    lines = [json.loads(line) for line in (RESULTS / "residual.jsonl").read_text().splitlines()]
    means = [sum(x["validation"] for x in lines if x["kind"] == kind) / 4 for kind in ("bf16", "fp32")]
    assert f"four seeds {means[0]:.4f} against {means[1]:.4f}" in text
    scaling = json.loads((RESULTS / "scaling.json").read_text())
    assert f"has {scaling['speed']['one']['mfu']:.3f} ([scaling.md]" in text


def test_losses_far_beyond_the_training_length():
    """The table of docs/long.md, from its rows."""
    page = (DOCS / "long.md").read_text(encoding="utf-8")
    for line in (RESULTS / "long-passing.jsonl").read_text().splitlines():
        run, cells = json.loads(line), []
        for low, high in ((0, 64), (64, 128), (1024, 2048), (2048, 4096)):
            bins = [b for b in run["by_position"] if low <= b["from"] and b["to"] <= high]
            assert sum(b["targets"] for b in bins) == run["rows"] * (high - low)
            cells.append(sum(b["loss"] * b["targets"] for b in bins) / (run["rows"] * (high - low)))
        told = " | ".join(f"{cell:.3f}" for cell in cells)
        assert f"| {run['name']} | {told} | {run['effective_memory']} |" in page


def test_memory_by_segments():
    page = (DOCS / "long.md").read_text(encoding="utf-8")
    rows = json.loads((RESULTS / "long-cpu.json").read_text())["rows"]
    for T in {row["T"] for row in rows}:
        own = sorted((row for row in rows if row["T"] == T), key=lambda row: row["segment"] is None)
        told = [row["peak_memory_bytes"] / 1e6 for row in own] + [row["tokens_per_second"] for row in own]
        line = next(line for line in page.splitlines() if line.startswith(f"| {T:,} |"))
        assert [cell.strip() for cell in line.split("|")[2:-1] if cell.strip()] == [f"{x:,.0f}" for x in told]


def test_what_the_study_says_of_its_search():
    runs = [json.loads(line) for line in (RESULTS / "synthetic-search-h100.jsonl").read_text().splitlines()]
    short, long = (sum(run["by_length"][n] < 0.99 for run in runs) for n in ("32", "512"))
    text = one_line(SYNTHETIC)
    assert {run["model"] for run in runs} == {"bd_lru-m5"}
    assert f"Of the search's {len(runs)} runs {short} stay below 0.99 on rows of 32" in text
    assert f"and {long} below 0.99 at 512" in text
    reported = [json.loads(line) for line in (RESULTS / "synthetic-h100.jsonl").read_text().splitlines()]
    best = [r for r in reported if (r["task"], r["model"], r["lr"]) == ("s5", "bd_lru-m5", 0.01)]
    again = [r["seed"] for r in best if any(r["losses"] == s["losses"] for s in runs)]
    assert again == [0, 1]  # "Seeds 0 and 1 .. are the search's own"
    assert "only seed 2 is fresh" in text


@pytest.mark.parametrize(
    ("name", "contender"), [("small", "hybrid-final-tied"), ("recurrent", "mixed-large-tied")]
)
def test_recipes_are_the_runs_that_their_numbers_are_of(name, contender):
    """Also what `extends` brings: the page's number is not that of another optimizer."""
    rows = [row for row in read_rows(RESULTS / "lm.jsonl") if row["size"] == "68m"]
    row = best_rates(rows)[contender][0]
    run = load_recipe("recipes/study/base.yaml", [*row["overrides"], f"optim.lr={row['lr']}"])
    recipe = load_recipe(f"recipes/{name}.yaml")
    assert recipe.optim == run.optim
    assert recipe.train.tokens_per_step == run.train.tokens_per_step
    assert recipe.model.parameters == row["parameters"]
