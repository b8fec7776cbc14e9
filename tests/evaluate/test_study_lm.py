"""The language-model study: its plan's mistakes, its rows, and how it is stopped and goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrnn_lm.recipe import load_recipe
from studies import jsonl, lm, lm_report

PLAN = Path(lm.__file__).with_name("lm.yaml")
TINY = """\
recipe: RECIPE
sizes:
  t: {parameters: 300_000, model: {hidden_size: 32, num_hidden_layers: 2, vocab_size: 4096}}
contenders:
  m1: {mixer: {type: bd_lru, block_size: 1, expansion: 1.0}}
  m2: {mixer: {type: bd_lru, block_size: 2, expansion: 1.0}}
waves:
  - {name: a, contenders: [m1, m2], size: t, tokens: 65536, rates: [4e-3]}
  - {name: b, contenders: [m2], size: t, tokens: 65536, rates: [8e-3], set: [optim.name=muon]}
""".replace("RECIPE", str(PLAN.parents[1] / "recipes" / "study" / "base.yaml"))
# In place of `lrnn train`; the file `wait` makes it wait for a signal, and `bits` says how it ends
TRAINING = """\
import json, pathlib, signal, sys, time
name, runs = sys.argv[1], pathlib.Path(sys.argv[2])
folder = runs / name
folder.mkdir(exist_ok=True)
with (runs / "calls").open("a") as calls:
    calls.write(name + chr(10))
def stop(*_):
    sys.exit(85)
signal.signal(signal.SIGTERM, stop)
while (runs / "wait").exists():
    time.sleep(0.05)
bits = json.loads((runs / "bits").read_text()) if (runs / "bits").exists() else 1.5
if isinstance(bits, str):
    print("lrnn: " + bits)
    sys.exit(2)
(folder / "metrics.jsonl").write_text(json.dumps({"step": 10, "bits_per_byte": bits}) + chr(10))
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """`main` of the study with a stub for a training, in a folder with a plan and a corpus."""
    for name in ("train-000", "valid"):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{name}.jsonl.zst").write_bytes(b"")
    (tmp_path / "training.py").write_text(TRAINING)
    (tmp_path / "plan.yaml").write_text(TINY)
    (tmp_path / "runs").mkdir()
    real = lm.command

    def command(run, recipe, data, runs, more):
        checked = real(run, recipe, data, runs, more)
        return [sys.executable, str(tmp_path / "training.py"), run.name, str(runs), *checked[4:]]

    monkeypatch.setattr(lm, "command", command)
    monkeypatch.chdir(tmp_path)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def call(*given: str) -> int:
        told = ["lm", "plan.yaml", "--data", "corpus", "--output", "lm.jsonl", "--runs", "runs", *given]
        monkeypatch.setattr(sys, "argv", told)
        with pytest.raises(SystemExit) as ended:
            lm.main()
        return ended.value.code

    yield call
    for name, handler in handlers.items():
        signal.signal(name, handler)


def ended() -> list[str]:
    """Names of the runs whose rows have a result."""
    return [row["run"] for row in jsonl.read_rows(Path("lm.jsonl")) if "bits_per_byte" in row]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("", "", ""),
        (TINY, "", "plan.yaml: is empty"),
        (TINY, "[1, 2]", "plan.yaml: plan: takes keys and values"),
        (TINY, "a: [1", "not valid YAML"),
        ("recipe: /", "recipe: /nowhere/", "no such recipe file"),
        ("waves:", "wave:", "did you mean 'waves'?"),
        ("rates: [8e-3]", "rates: 8e-3", "waves.1.rates: takes a list"),
        ("rates: [8e-3]", "rates: [fast]", "waves.1.rates.0: input should be a valid number (got 'fast')"),
        ("rates: [8e-3]", "rate: [8e-3]", "did you mean 'rates'?"),
        ("rates: [8e-3]", "rates: [8e-3], seed: [1]", "did you mean 'seeds'?"),
        ("contenders: [m2]", "contenders: m2", "waves.1.contenders: takes a list"),
        ("contenders: [m2]", "contenders: [m3]", "names 'm3'; known contenders: m1, m2"),
        ("set: [optim.name=muon]", "set: optim.name=muon", "waves.1.set: takes a list"),
        ("optim.name=muon", "optim.nam=muon", "optim.nam: unknown key; did you mean 'name'?"),
        ("optim.name=muon", "optim.lr=1", "optim.lr: the study sets it itself"),
        ("optim.name=muon", "model.hidden_size=64", "model.hidden_size: the study sets it itself"),
        ("  m2:", "  m1:", "m1 is given twice, in lines 5 and 6"),
        ("  m2: {mixer", "  m2: {mixr", "contenders.m2.mixr: unknown key; did you mean 'mixer'?"),
        ("block_size: 2", "blok_size: 2", "contender 'm2', size 't': unknown mixer option 'blok_size'"),
        ("bd_lru, block_size: 2", "gla", "contender 'm2', size 't': "),
        ("hidden_size", "width", "'hidden_size' is missing in its model"),
        ("300_000", "900", "are not within 0.5% of 900"),
        (", set: [optim.name=muon]", ", tokens: 65536", "tokens is given twice"),
        (
            "65536, rates: [8e-3], set: [optim.name=muon]",
            "131072, rates: [4e-3]",
            "different runs of one name",
        ),
    ],
)
def test_a_plans_mistakes_are_told_before_anything_is_trained(study, capsys, old, new, told):
    Path("plan.yaml").write_text(TINY.replace(old, new))
    assert study() == (2 if told else 0)
    assert told in capsys.readouterr().err
    assert len(ended()) == (0 if told else 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--only", "a,z"], "there is no wave 'z'; known: a, b"),
        (["--only", ""], "there is no wave ''"),
        (["--workers", "0"], "--workers: takes 1 or more"),
        (["--data", "nowhere"], "nowhere: holds no train-*.jsonl.zst"),
        (["--data", "runs"], "runs: holds no train-*.jsonl.zst"),
        (["--output", "corpus"], "corpus: Is a directory"),
        (["--output", "plan.yaml"], "plan.yaml, line 1: is no row"),
        (["--runs", "plan.yaml"], "plan.yaml: is no folder"),
        (["--set", "seed=3"], "seed: the study sets it itself"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_before_anything_is_trained(study, capsys, given, told):
    assert study(*given) == 2
    assert told in capsys.readouterr().err
    assert not Path("runs/calls").exists()
    assert Path("plan.yaml").read_text() == TINY


def test_a_tokenizer_may_be_of_another_size_where_that_is_said(study):
    assert study("--only", "b", "--set", "model.parameters=null") == 0


def test_a_crash_is_named_by_its_error_not_by_the_frames_below_it(tmp_path):
    error = "torch.AcceleratorError: CUDA error: an illegal instruction was encountered"
    frames = [f"frame #{i}: <unknown function> + 0x2a1ca" for i in range(30)]
    (tmp_path / "log").write_text("\n".join(["step 10", error, *frames]))
    run = lm.runs_of(lm.read_plan(PLAN), "spare-rates")[0]
    assert lm.result(run, tmp_path, 1.0, 1, -6, tmp_path / "log")["failed"] == f"exit code -6: {error}"
    (tmp_path / "log").write_text("step 10\nKilled")
    assert (
        lm.result(run, tmp_path, 1.0, 1, -9, tmp_path / "log")["failed"] == "exit code -9: step 10 / Killed"
    )


def test_what_needs_a_package_that_is_not_here_is_listed_and_stops_its_own_waves_only(
    study, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "fla.layers", None)
    wave = "  - {name: c, contenders: [gla], size: t, tokens: 65536, rates: [4e-3]}\n"
    gla = "  gla: {mixer: {type: gla, num_heads: 2}}\nwaves:"
    Path("plan.yaml").write_text(TINY.replace("waves:", gla) + wave)
    assert study("--only", "c") == study() == 2
    assert "GatedLinearAttention needs flash-linear-attention" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--list"])
    lm.main()
    listed = capsys.readouterr().out.splitlines()
    assert ["needs flash-linear-attention" in line for line in listed] == [False, False, False, True]
    assert not Path("runs/calls").exists()
    assert study("--only", "a,b") == 0
    with Path("lm.jsonl").open("a") as rows:  # made elsewhere
        rows.write(json.dumps({"run": listed[-1].split()[0], "bits_per_byte": 1.5}) + "\n")
    assert study() == 0


def test_names_of_waves_may_have_blanks_between_them(study):
    assert study("--only", "b, a") == 0
    assert len(ended()) == 3


@pytest.mark.parametrize("bits", ["no GPU here", None, float("nan")])
def test_a_failed_run_has_no_result_is_told_by_the_exit_code_and_repeated(study, capsys, bits):
    Path("runs/bits").write_text(json.dumps(bits))
    assert study("--only", "b") == (2 if isinstance(bits, str) else 1)
    assert "1 of 1 runs are left, 1 of them failed" in capsys.readouterr().out
    assert ended() == []
    if isinstance(bits, str):  # a user's mistake stays one: it is not tried twice
        assert Path("runs/calls").read_text().count("\n") == 1
    Path("runs/bits").unlink()
    assert study("--only", "b") == 0
    assert len(ended()) == 1


@pytest.mark.parametrize("kept", ["{", "half", "whole", "whole with an end"])
def test_a_row_that_was_cut_is_made_again_and_no_other(study, kept):
    assert study() == 0
    whole = Path("lm.jsonl").read_text()
    *_, last = whole.splitlines()
    ends = {"{": "{", "half": last[: len(last) // 2], "whole": last, "whole with an end": f"{last}\n"}
    Path("lm.jsonl").write_text(whole[: -len(last) - 1] + ends[kept])
    calls = Path("runs/calls").read_text().splitlines()
    assert study() == 0
    assert sorted(ended()) == sorted(calls)
    assert len(jsonl.read_rows(Path("lm.jsonl"))) == 3
    again = Path("runs/calls").read_text().splitlines()[len(calls) :]
    assert again == ([calls[-1]] if kept in ("{", "half") else [])
    with Path("lm.jsonl").open("a") as file:
        file.write("spoilt\n")
    assert study() == 2


def test_a_row_of_other_settings_is_told(study, capsys):
    assert study("--only", "a") == 0
    Path("plan.yaml").write_text(TINY.replace("65536", "131072"))
    assert study("--only", "a") == 0
    assert capsys.readouterr().out.count("its row is of other tokens or another model") == 2
    assert len(ended()) == 2


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_trainings_and_the_study_goes_on(study, name):
    Path("runs/wait").touch()
    started = f"""
import os, time
for _ in range(1200):
    if os.path.exists("runs/calls"):
        break
    time.sleep(0.05)
os.kill({os.getpid()}, {int(name)})
"""
    with subprocess.Popen([sys.executable, "-c", started]):
        assert study() == 85
    assert Path("runs/calls").read_text().count("\n") == 1  # no other has begun
    assert ended() == []
    Path("runs/wait").unlink()
    assert study("--workers", "3") == 0
    assert len(set(ended())) == len(ended()) == 3


def test_the_budget_stops_the_trainings(study, monkeypatch):
    Path("runs/wait").touch()
    monkeypatch.setattr(lm, "MARGIN", 0)
    assert study("--budget-seconds", "1.5") == 0
    assert jsonl.read_rows(Path("lm.jsonl"))[0]["failed"] == "cut at step 0"


def test_two_studies_do_not_write_to_one_file(study, capsys):
    with lm.claim(Path("lm.jsonl")):
        assert study() == 2
        assert "another study writes to it" in capsys.readouterr().err
    assert study() == 0


def test_the_report_takes_rows_of_any_plan_and_leaves_other_pages_alone(study, monkeypatch, capsys):
    def report(*given: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lm_report", *given])
        with contextlib.suppress(SystemExit):
            lm_report.main()
        return capsys.readouterr().err

    assert "holds no row" in report("lm.jsonl", "page.md")
    assert study() == 0
    assert report("lm.jsonl", "page.md") == ""
    assert "| m1 | 1.5000 | 1 | 0.004 |" in Path("page.md").read_text()
    assert "### Rates" not in Path("page.md").read_text()  # each contender has one
    page = f"before\n{lm_report.MARKS[0]}\nafter\n"  # without the other mark, "after" would be lost
    Path("page.md").write_text(page)
    assert "has no lines" in report("lm.jsonl", "page.md")
    assert Path("page.md").read_text() == page
    assert "No such file" in report("lm.jsonl", "nowhere/page.md")
    Path("lm.jsonl").write_text('{"bits_per_byte": 1.5}\n')
    assert "lm.jsonl: there is no 'size' in it" in report("lm.jsonl", "new.md")


def test_the_best_rate_is_the_lowest_number():
    """Not the first of a dictionary: 10.1 is more than 9.8."""
    rows = [
        {
            "size": "t",
            "tokens": 1,
            "seed": 0,
            "overrides": [],
            "contender": "m",
            "lr": lr,
            "bits_per_byte": bits,
        }
        for lr, bits in ((1e-3, 10.1), (2e-3, 9.8))
    ]
    assert "| m | 10.1000 | **9.8000** |" in lm_report.rates_table(rows)


@pytest.mark.parametrize(
    ("given", "count", "told"),
    [(None, 3, ["0", "1", "2"]), ("2,3", 2, ["2", "3"]), ("1", 1, ["1"]), ("", 0, []), (None, 0, [])],
)
def test_trainings_take_the_devices_that_the_study_was_given(monkeypatch, given, count, told):
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert lm.visible_devices() == told


def test_the_plans_models_are_recipes(monkeypatch):
    """As the command of a run gives them: `mixer` whole, beside a pattern whose entries may say the same."""
    monkeypatch.setattr(lm, "count", lambda model: 50_000 * model["intermediate_size"])  # quick
    monkeypatch.setattr(lm, "TOLERANCE", float("inf"))
    plan = lm.read_plan(PLAN)
    runs = {run.contender: run for run in lm.runs_of(plan, None)}
    for run in runs.values():
        _, _, _, recipe, *overrides = lm.command(run, PLAN.parent / plan.recipe, Path("c"), Path("r"), [])
        mixers = load_recipe(recipe, overrides).model.layer_pattern or []
        assert len(mixers) == len(run.model.get("layer_pattern", []))
    assert len(runs) > 100


def test_curves_of_a_panel_begin_together(monkeypatch, tmp_path):
    """At the first share of their steps at which all were validated; a run of fewer steps too."""
    from matplotlib.axes import Axes

    def row(contender: str, *curve: list[float]) -> dict:
        same = {"size": "68m", "seed": 0, "lr": 1e-3, "overrides": ["optim.name=muon"], "tokens": 1000}
        return same | {"contender": contender, "bits_per_byte": curve[-1][1], "curve": list(curve)}

    early = row("hybrid-final-tied", [250, 9.0], [500, 3.0], [1000, 2.0])
    late = row("transformer-final-tied", [100, 4.0], [200, 2.5])
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda axes, taken, bits, *_, **__: drawn.append((taken, bits)))
    monkeypatch.setattr(Axes, "legend", lambda *_, **__: None)
    lm_report.draw([early, late], {}, tmp_path / "curves.png")
    assert drawn == [([0.0005, 0.001], [3.0, 2.0]), ([0.0005, 0.001], [4.0, 2.5])]
