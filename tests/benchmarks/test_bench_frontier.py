"""`lrnn bench frontier` on a CPU: rows of each kind, going on where it was stopped, the front, mistakes."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from forks import server
from tiny_run import write_recipe

from benchmarks.frontier import KINDS, SMALL, SMALL_BUDGET, Fitter, FrontierSettings, _waves, missing, run
from benchmarks.frontier_results import front, summarise
from benchmarks.pages.frontier import contents, write
from benchmarks.pages.speed import RESULTS
from benchmarks.results import read_results
from lrnn_lm.cli import main
from studies.contenders import count

TINY = {
    "contenders": "bd_lru-m2,min_gru", "tasks": "parity,mqar", "lrs": "0.02",
    "hidden": 8, "rows": 8, "steps": 6, "length": 8, "longest": 32, "vocab": 32, "width": 16,
    "depth": 1, "tokens": 64, "context": 32, "decoded": 4, "speed_vocab": 32,
}  # fmt: skip


def test_rows_table_and_picture(tmp_path, capsys):
    output = tmp_path / "frontier.jsonl"
    corpus = tmp_path / "hybrid.yaml"
    corpus.write_text(f"extends: {write_recipe(tmp_path / 'corpus')}\nmodel: {{layer_pattern: [bd_lru]}}\n")
    settings = FrontierSettings(**TINY, corpus=str(corpus), corpus_tokens=1024)
    rows = run(settings, "cpu", output)
    assert read_results(output)[1] == json.loads(json.dumps(rows))
    assert len(rows) == 2 * (1 + 2 + 1)
    assert not any("reason" in row for row in rows), rows
    for row in rows:
        if row["kind"] == "speed":
            assert row["tokens_per_second"] > 0
            assert row["state_bytes"] > 0
        elif row["kind"] == "task":
            assert set(row["last_half"]) == ({"8", "16", "32"} if row["task"] == "parity" else {"64"})
            assert row["held"] in (0, 8, 16, 32)
        else:
            assert (row["tokens"], row["validation_loss"] > 1) == (1024, True)
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    assert "| bd_lru-m2 |" in (tmp_path / "frontier.md").read_text()
    lines = output.read_text().splitlines()
    output.write_text("\n".join([*lines[:-1], lines[-1][:20]]))  # killed within the last
    capsys.readouterr()
    again = run(settings, "cpu", output)
    assert again[:7] == json.loads(json.dumps(rows[:7]))  # all but one
    assert [row["contender"] for row in again] == [row["contender"] for row in rows]
    with pytest.raises(ValueError, match="begun with other settings"):
        run(FrontierSettings(**{**TINY, "steps": 7}), "cpu", output)


@pytest.mark.slow
def test_a_process_for_each_contender(tmp_path, capsys):
    """What is done stays; one that takes too long gets rows that say so; time that is spent gives no rows."""
    output = tmp_path / "frontier.jsonl"
    server()  # else its server, which has imported less, would be that of all tests of this process
    given = {**TINY, "tasks": "parity", "processes": 2}
    rows = run(FrontierSettings(**given), "cpu", output)
    assert sorted((row["contender"], row["kind"]) for row in rows) == [
        (name, kind) for name in ("bd_lru-m2", "min_gru") for kind in ("speed", "task")
    ]
    assert not any("reason" in row for row in rows), rows
    assert run(FrontierSettings(**given, seconds_each=0.01), "cpu", output) == rows
    lines = output.read_text().splitlines()
    output.write_text("\n".join(line for line in lines if "min_gru" not in line) + "\n")
    assert len(run(FrontierSettings(**given, budget_seconds=0.01), "cpu", output)) == 2
    late = run(FrontierSettings(**given, seconds_each=0.01), "cpu", output)[2:]
    assert [(row["kind"], row["reason"]) for row in late] == [
        ("task", "not done within 0.01 s"),
        ("speed", "not done within 0.01 s"),
    ]
    with pytest.raises(ValueError, match="--processes need --output"):
        run(FrontierSettings(**given), "cpu")


def test_contenders_have_equal_parameters():
    fit = Fitter(FrontierSettings())
    made = [
        fit.small({"contender": name, "task": "s5", "lr": 0.01})
        for name in (
            "bd_lru-m5",
            "bd_lru-m1",
            "rg_lru",
            "complex_lru",
            "slice-m5",
            "mlstm",
            "bd_slstm-m5",
            "m2rnn",
        )
    ]
    counts = [count(job) for job in made]
    assert max(counts) / min(counts) < 1.01
    assert sum(steps for _, steps in made[0].stages) == 3600


def test_small_models_train_side_by_side_on_a_gpu():
    """Those of rows of equal length; a CPU takes one after the other."""
    rows = missing(FrontierSettings(tasks="s5,mqar,parity", corpus="x"), "lstm", KINDS, [])
    waves = {device: _waves(rows, torch.device(device)) for device in ("cuda", "cpu")}
    assert [[row.get("task", row["kind"]) for row in wave] for wave in waves["cuda"]] == [
        ["speed"], ["s5", "s5", "parity", "parity"], ["mqar", "mqar"], ["loss"],
    ]  # fmt: skip
    assert [len(wave) for wave in waves["cpu"]] == 8 * [1]


def test_the_best_rate_in_training_is_the_one_that_counts():
    def row(lr, selection, loss, held):
        kind = {"contender": "a", "kind": "task", "task": "s5"}
        return {**kind, "lr": lr, "selection": selection, "loss": loss, "held": held}

    rows = [row(1, 0.5, 1.0, 64), row(2, 1.0, 0.2, 0), row(3, 1.0, 0.1, 32)]
    rows += [{"contender": "a", "kind": "speed", "reason": "no room"}]
    assert summarise(rows, ["a"], ["s5"]) == [{"contender": "a", "s5": 32}]


def test_the_page_of_rows(tmp_path):
    """Numbers and reasons stand between marks; what is written by hand stays."""
    output, page = tmp_path / "frontier.jsonl", tmp_path / "frontier.md"
    about = {"device": "cpu", "torch": "2", "settings": asdict(FrontierSettings(corpus="a.yaml"))}
    speed = {"kind": "speed", "parameters": 9, "decode_ms": 1, "state_bytes": 4}
    task = {"kind": "task", "task": "s5", "lr": 0.01, "selection": 1.0, "loss": 0.1}
    lines = [
        {"about": about},
        {"contender": "bd_lru-m5", **speed, "B": 16, "tokens_per_second": 2000},
        {"contender": "bd_lru-m5", **task, "held": 64},
        {"contender": "lstm", **speed, "B": 8, "tokens_per_second": 1000},
        {"contender": "lstm", **task, "held": 32},
        {"contender": "kda", **{k: task[k] for k in ("kind", "task", "lr")}, "reason": "no fla"},
    ]
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(output, page)
    text = page.read_text()
    assert "| bd_lru-m5 | 9 | 2,000 | 1.00 | 0.0 | 64 | s5 |" in text
    assert "| lstm | 9 | 1,000 | 1.00 | 0.0 | 32 |  |" in text
    assert "- `kda`, s5: no fla" in text
    assert "- `kda`, speed: not measured" in text  # a cell that is empty without a row
    assert "than 16, as memory ran out: `lstm` 8" in text
    assert "--corpus a.yaml --corpus-tokens 20000000" in text
    assert page.with_suffix(".png").stat().st_size > 10_000
    page.write_text(text.replace("# The frontier", "# By hand").replace("2,000", "2,001"))
    write(output, page)
    assert page.read_text() == text.replace("# The frontier", "# By hand")
    for rows in (output, *RESULTS.glob("frontier.jsonl")):  # the page in docs, once there are rows
        text = (page if rows == output else rows.with_suffix(".md")).read_text(encoding="utf-8")
        assert all(f"<!-- {name} -->\n\n{part}\n\n" in text for name, part in contents(rows).items())


def test_the_front():
    assert front([(1, 5), (2, 3), (3, 3), (2, 4), (1, 5)]) == [0, 2, 3, 4]


def test_what_is_not_given(monkeypatch):
    """`--small` alone ends in a minute; it kept 3,600 steps of every contender."""
    chosen = []
    monkeypatch.setattr("benchmarks.frontier.run", lambda settings, *_: chosen.append(settings))
    small = FrontierSettings(**SMALL, **SMALL_BUDGET)
    for arguments, settings in (
        ([], FrontierSettings()),
        (["--small"], small),
        (["--small", "--steps", "3600", "--lrs", "0.1"], replace(small, steps=3600, lrs="0.1")),
        (["--contenders", "lstm", "--tasks", "a5"], FrontierSettings(contenders="lstm", tasks="a5")),
    ):
        with pytest.raises(SystemExit) as left:
            main(["bench", "frontier", *arguments])
        assert (left.value.code or 0, chosen.pop()) == (0, settings)
    assert small.steps * len(small.contenders.split(",")) <= 150


def test_mistakes_leave_with_2(capsys, tmp_path):
    for arguments, message in (
        (["--contenders", "bd_lru-m9"], "unknown 'bd_lru-m9'"),
        (["--tasks", "s9"], "unknown 's9'"),
        (["--output", str(tmp_path / "x.png")], "name the rows' file .jsonl"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["bench", "frontier", "--small", *arguments])
        assert left.value.code == 2
        assert message in capsys.readouterr().err
