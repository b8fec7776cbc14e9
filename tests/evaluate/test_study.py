"""The study's script at toy size: rows as the generator makes them, equal parameters, resuming."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import frontier
from lrnn_lm.data import MAD_TASKS, SyntheticTask
from lrnn_lm.data import order as row_order
from studies import certificate, contenders, replicas, synthetic, tables, width
from studies.replicas import Job, Replica, rates, train_wave, tune_nothing
from studies.rows import TrainingRows, mix, task_rows

CPU = torch.device("cpu")


def test_mixing_wraps_as_unsigned_numbers_do():
    numbers = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    got = mix(torch.from_numpy(numbers.view(np.int64))).numpy().view(np.uint64)
    np.testing.assert_array_equal(got, row_order.mix(numbers))


@pytest.mark.parametrize("name", ["s3", "s5", "a5", "z60"])
@pytest.mark.parametrize("start", [0, 1])
def test_rows_of_groups_are_the_generators(name, start):
    task = SyntheticTask(name, 19, {"start": start})
    for split in ("train", "validation"):
        inputs, labels = task_rows(task, 7, split, 100, 50, CPU)
        want = task.rows(7, split, np.arange(100, 150))
        np.testing.assert_array_equal(inputs.numpy(), want[0])
        np.testing.assert_array_equal(labels.numpy(), want[1])


def test_a_finite_set_is_read_in_the_trainers_order():
    task = SyntheticTask("memorisation", 8, {})
    rows = TrainingRows(task, 3, rows=16, steps=20, device=CPU)
    rows.fill(10, 20)  # 256 rows: into the second epoch
    order = row_order.rows_of_samples(160, 320, 256, 3)
    np.testing.assert_array_equal(rows.inputs.view(320, 8).numpy(), task.rows(3, "train", order)[0])
    address = rows.inputs.data_ptr()
    rows.fill(0, 5)
    assert rows.inputs.data_ptr() == address


def job(**changes):
    settings = {
        "name": "x", "task": "s3", "model": "bd_lru-m3", "seed": 0, "lr": 1e-2, "rows": 32, "hidden": 32,
        "mixer": {"type": "bd_lru", "block_size": 3, "num_blocks": 8, "gate_std": 1.0},
        "stages": ((6, 200), (12, 100)), "tested": (12, 48), "layers": 1, "intermediate": 64,
        "options": {"start": 1},
    }  # fmt: skip
    return Job(**{**settings, **changes})


class Values(TorchDispatchMode):
    """Notes where a value is read back, which a CUDA graph cannot capture."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.read.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixer", [
    {"type": "attention", "num_heads": 2}, {"type": "bd_lru", "block_size": 2}, {"type": "lstm"},
    {"type": "mamba2", "head_dim": 8},
], ids=lambda mixer: mixer["type"])  # fmt: skip
def test_a_step_reads_no_value_back(mixer):
    """Attention was given a mask of its own, whose values the model looks at."""
    replica = Replica(job(model="x", mixer=mixer), CPU)
    inputs, labels = task_rows(SyntheticTask("s3", 6, {"start": 1}), 0, "train", 0, 4, CPU)
    with Values() as values:
        replica._forward(inputs, shift_labels=labels)
    assert not values.read


def test_replicas_learn_and_do_not_touch_each_other():
    """s3 is learnt and kept to four times the training length; a run is the same in company and alone."""
    learnt = train_wave([job()], CPU, float("inf"))[0]
    assert learnt["by_length"]["12"] > 0.99
    assert learnt["by_length"]["48"] > 0.9
    stages = ((6, 20), (12, 10))
    alone = train_wave([job(stages=stages)], CPU, float("inf"))[0]
    both = train_wave([job(name="y", lr=1e-4, seed=1, stages=stages), job(stages=stages)], CPU, float("inf"))
    assert alone["losses"] == both[1]["losses"]
    assert alone["losses"] != both[0]["losses"]
    assert both[0]["by_length"]["12"] < 0.6


def test_what_a_model_cannot_do_is_told_and_the_others_run():
    wrong = job(name="wrong", mixer={"type": "attention", "num_heads": 5}, stages=((6, 4),), tested=(6,))
    results = train_wave([wrong, job(stages=((6, 4),), tested=(6,))], CPU, float("inf"))
    assert "heads" in results[0]["error"]
    assert "error" not in results[1]


@pytest.mark.parametrize("after", [0, 3])
def test_a_rehearsal_leaves_no_trace(after):
    """Before the first step and amid a run; what follows is the same, bit for bit."""
    found = []
    for rehearsed in (True, False):
        one = job(stages=((6, 8),), weight_decay=0.1)
        replica, rows = Replica(one, CPU), TrainingRows(one.task_at(6), 0, 32, 8, CPU)
        rows.fill(0, 8)
        for step in range(8):
            if rehearsed and step == after:
                replica.rehearse(rows)
            replica.run(rows)
        replica.note(8)
        found.append([replica.losses, *(p.detach().clone() for p in replica.model.parameters())])
    assert found[0][0] == found[1][0]
    for one, two in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(one, two)


FLA = ("deltanet", "kda", "gated_deltanet2", "gla", "hgrn2", "rwkv7")


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["bd_lru-m5", "h_lru-m4", "lstm", "attention", "mamba2", "mlstm", *FLA])
def test_a_graph_does_what_the_step_does(model):
    """Losses of a captured run against those of the same steps as written, over two lengths."""
    if model in FLA:
        pytest.importorskip("fla.layers", reason="flash-linear-attention is not installed")
    device = torch.device("cuda")
    one = contenders.contender(job(stages=((6, 20), (12, 20)), hidden=64), model, num_blocks=6)
    captured = train_wave([one, contenders.replace(one, name="y", seed=1)], device, float("inf"))
    replica = Replica(one, device)
    for length, first in ((6, 0), (12, 20)):
        rows = TrainingRows(one.task_at(length), 0, 32, 20, device)
        rows.fill(first, 20)
        for _ in range(20):
            replica.step(rows)
        replica.note(20)
    assert captured[0]["losses"] == pytest.approx(replica.losses, rel=1e-3)
    assert captured[0]["losses"] != captured[1]["losses"]


def test_kernels_of_fla_are_left_one_launch_shape(monkeypatch):
    """However heuristics are wrapped around them; nothing else is touched."""
    tuner, other = types.SimpleNamespace(configs=[1, 2, 3]), types.SimpleNamespace(configs=[1, 2])
    module = types.SimpleNamespace(kernel=types.SimpleNamespace(fn=tuner), number=3)
    monkeypatch.setitem(sys.modules, "fla.made_up", module)
    monkeypatch.setitem(sys.modules, "other.made_up", types.SimpleNamespace(kernel=other))
    assert tune_nothing() >= 1
    assert tuner.configs == [1]
    assert other.configs == [1, 2]


def test_rates_rise_and_fall_to_nothing():
    given = rates(job(warmup=0.1))
    assert len(given) == 300
    assert given.argmax() in (29, 30)
    assert given[-1] < 1e-5
    assert (given > 0).all()


def test_equal_parameters():
    reference = contenders.contender(job(hidden=64, intermediate=128), "bd_lru-m5", num_blocks=16)
    fit = contenders.Fitting(reference)
    for model in ("bd_lru-m1", "bd_lru-m8", "h_lru-m4", "lstm", "attention", "mamba2"):
        made = fit(contenders.contender(job(task="s5", hidden=64, intermediate=128), model, gate_std=1.0))
        built = sum(p.numel() for p in Replica(made, CPU).model.parameters())
        want = sum(
            p.numel() for p in Replica(contenders.replace(reference, task="s5"), CPU).model.parameters()
        )
        assert abs(built / want - 1) < 0.004, model
    with pytest.raises(ValueError, match="unknown model 'bd_lru-m3'"):
        contenders.contender(job(), "bd_lru-m3")


def test_sizes_of_models_whose_speed_is_measured_are_whole():
    """Matrix products are slow where a width is no multiple of 8, so every contender has widths that are."""
    settings = frontier.FrontierSettings(hidden=64, width=128, depth=2, speed_vocab=256)
    fit = frontier.Fitter(settings)
    for model in ("bd_lru-m1", "h_lru-m2", "lstm", "attention", "min_gru", "bd_gru-m5", "mlstm"):
        made = fit.large(model, frontier.ALIGNED)
        key = contenders.FITTED.get(made.mixer["type"])
        assert made.intermediate % 16 == 0, model
        assert key in (None, "num_heads") or made.mixer[key] % 16 == 0, model
        wanted = contenders.count(fit.large("bd_lru-m5", frontier.ALIGNED))
        assert abs(contenders.count(made) / wanted - 1) < 0.03, model


@pytest.fixture
def few_rows(monkeypatch):
    """Models are judged by a few rows."""
    monkeypatch.setattr(replicas, "HELDOUT_ROWS", dict.fromkeys(replicas.HELDOUT_ROWS, 16))


def options(folder, *more):
    given = ["--output", str(folder), "--hidden", "16", "--rows", "4", "--short", "6:2", "--steps", "3",
             "--device", "cpu", *more]  # fmt: skip
    return given


@pytest.mark.usefixtures("few_rows")
def test_study_goes_on_where_it_stopped(tmp_path, capsys):
    given = options(
        tmp_path,
        "--tasks",
        "s3",
        "--models",
        "bd_lru-m4,attention",
        "--lrs",
        "1e-3,1e-2",
        "--seeds",
        "0,1,2",
        "--search-seeds",
        "7,8",
        "--weight-decays",
        "0.1",
    )
    synthetic.main([*given, "--minutes", "0"])
    assert not (tmp_path / "results.jsonl").exists()
    assert "the same command continues" in capsys.readouterr().out
    synthetic.main(given)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (
        2 * 2 + 3
    )  # both rates with both seeds of the search, three seeds at the better
    assert len({line["name"] for line in lines}) == 14
    for model in ("bd_lru-m4", "attention"):
        tried = [line for line in lines if line["model"] == model and line["search"]]
        reported = [line for line in lines if line["model"] == model and not line["search"]]
        assert {line["seed"] for line in tried} == {7, 8}
        assert [line["seed"] for line in reported] == [0, 1, 2]
        assert {(line["lr"], line["weight_decay"]) for line in reported} == {tables.choose(tried)}
    kept = (tmp_path / "results.jsonl").read_bytes()
    synthetic.main(given)
    assert (tmp_path / "results.jsonl").read_bytes() == kept
    facts = json.loads((tmp_path / "states.json").read_text())
    assert facts["complete"]
    assert (tmp_path / "states.png").stat().st_size > 10_000
    (row,) = [line for line in (tmp_path / "states.md").read_text().splitlines() if "attention" in line]
    assert row.startswith("| s3 x 32 (start 1) | attention |")
    accuracies = [line["accuracy"] for line in lines if line["model"] == "attention" and not line["search"]]
    assert tables.spread(accuracies) in row
    assert row.count("±") == 1 + len(synthetic.TESTED)  # the accuracy's and every length's deviation
    assert "0.001, 0.1: " in row
    assert "0.01, 0.1: " in row


def run(lr, selection, seed=100, **more):
    """A run of a search as its line has it."""
    return {"lr": lr, "weight_decay": 0.0, "seed": seed, "selection": selection, "loss": 1.0, **more}


def test_settings_are_chosen_by_the_searchs_rows_alone():
    """Not by the reported rows, nor by longer ones; over all seeds; then by the loss."""
    better_reported = {"accuracy": 1.0, "by_length": {"32": 1.0, "512": 1.0}}
    worse = {"accuracy": 0.1, "by_length": {"32": 0.1, "512": 0.0}}
    assert tables.choose([run(1, 0.9, **worse), run(2, 0.8, **better_reported)]) == (1, 0.0)
    lucky = [run(1, 1.0), run(1, 0.2, 101), run(2, 0.7), run(2, 0.7, 101)]
    assert tables.choose(lucky) == (2, 0.0)
    assert tables.choose([run(1, 0.50004), run(2, 0.5, loss=0.5)]) == (2, 0.0)
    assert tables.choose([run(1, 0.9), {**run(1, 0.0, 101), "error": "no"}, run(2, 0.1)]) == (2, 0.0)
    assert tables.choose([{**run(1, 0.9), "error": "no"}]) is None


def test_models_have_the_same_search(tmp_path):
    given = options(tmp_path, "--models", "bd_lru-m2,attention,lstm", "--tasks", "s3",
                    "--lrs", "1e-3,1e-2", "--weight-decays", "0.1,0")  # fmt: skip
    jobs = synthetic.study_jobs("states", synthetic.arguments(given), {})
    assert len({one.name for one in jobs}) == len(jobs)
    assert all(one.search for one in jobs)
    each = {}
    for one in jobs:
        setting = (one.lr, one.weight_decay, one.seed, one.stages, one.rows)
        each.setdefault((one.task, one.model), []).append(setting)
    assert len(each) == 3
    searches = list(each.values())
    assert all(settings == searches[0] for settings in searches)
    assert len(searches[0]) == 2 * 2 * 2


def test_a_seed_that_chose_is_not_reported(tmp_path):
    given = options(tmp_path, "--seeds", "0,1,2", "--search-seeds", "5,1")
    with pytest.raises(ValueError, match="seed 1 is in --seeds and in --search-seeds"):
        synthetic.study_jobs("states", synthetic.arguments(given), {})


@pytest.mark.parametrize("task", ["s3", "in_context_recall"])
def test_what_is_reported_is_measured_on_rows_of_its_own(task, monkeypatch):
    """Neither the training rows nor those that choose; these are as long as rows in training are."""
    read = []

    def look(task, seed, split, first, count, device):
        read.append((split, task.length))
        return task_rows(task, seed, split, first, count, device)

    lengths = ((6, 12), (6, 12, 48)) if task == "s3" else ((128,), (128,))
    one = job(task=task, stages=tuple((length, 1) for length in lengths[0]), tested=lengths[1],
              options={"start": 1} if task == "s3" else {})  # fmt: skip
    replica = Replica(one, CPU)
    replica.losses = [0.0]
    monkeypatch.setattr(replicas, "task_rows", look)
    found = replica.measure()
    assert read == [("validation", lengths[0][-1]), ("test", lengths[1][-1])]
    assert found["selection"] != found["accuracy"]
    sets = [task_rows(one.task_at(12 if task == "s3" else 128), 0, split, 0, 64, CPU)[0]
            for split in ("train", "validation", "test")]  # fmt: skip
    rows = torch.cat(sets)
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("study", [certificate, width])
@pytest.mark.parametrize(
    ("output", "told"),
    [(".", "Is a directory"), ("file/x", "no folder"), ("file", "is no row"), ("rows", "of another study")],
)
def test_an_output_that_takes_no_rows_is_told_before_any_is_made(
    study, output, told, tmp_path, monkeypatch, capsys
):
    """An hour of training ended in a traceback, without a row."""
    (tmp_path / "file").write_text("words\n")
    (tmp_path / "rows").write_text('{"a": 1}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "build_trainer", None)
    task = ["--task", "s5"] if study is certificate else []
    monkeypatch.setattr(sys, "argv", ["study", *task, "--output", output])
    with pytest.raises(SystemExit) as ended:
        study.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_wave_of_no_runs_is_refused(tmp_path):
    """It waited for ever."""
    with pytest.raises(ValueError, match="--wave 0: takes 1 or more"):
        synthetic.main(["--output", str(tmp_path), "--wave", "0"])


def test_stages_are_read_from_the_command_line(tmp_path):
    several = synthetic.arguments(options(tmp_path, "--short", "4:7,8:5"))
    assert synthetic.base_job("states", "s3", several).stages == ((4, 7), (8, 5), (32, 3))
    none = synthetic.arguments(options(tmp_path, "--short", ""))
    assert synthetic.base_job("states", "s3", none).stages == ((32, 3),)
    for wrong in ("6", "6:x", "0:5"):
        with pytest.raises(ValueError, match="pairs of length and steps"):
            synthetic.base_job("states", "s3", synthetic.arguments(options(tmp_path, "--short", wrong)))


def test_the_published_difficulties(tmp_path):
    given = options(tmp_path, "--study", "mad", "--tasks", "memorisation,selective_copying", "--sweep",
                    "--models", "bd_lru-m2", "--lrs", "1e-3", "--search-seeds", "9")  # fmt: skip
    jobs = synthetic.study_jobs("mad", synthetic.arguments(given), {})
    labels = [tables.label(one) for one in jobs]
    assert len(set(labels)) == len(labels) == (1 + 5) + (1 + 3 + 2 + 4 + 3)
    assert "selective_copying x 1024" in labels
    assert "selective_copying x 256 (800 rows)" in labels
    few = next(one for one in jobs if one.examples == 800)
    rows = TrainingRows(few.task_at(256), 0, 8, 100, CPU, few.examples)
    rows.fill(0, 100)
    assert len(rows.inputs.view(800, 256).unique(dim=0)) == 800  # each once an epoch
    rows.fill(100, 100)
    assert len(rows.inputs.view(800, 256).unique(dim=0)) == 800


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows")
def test_every_task_of_the_study(tmp_path):
    """A step of each."""
    assert set(synthetic.TASKS["mad"]) == set(MAD_TASKS)
    given = synthetic.arguments(
        options(tmp_path, "--study", "mad", "--models", "bd_lru-m2", "--lrs", "1e-3", "--search-seeds", "9",
                "--weight-decays", "0.1")
    )  # fmt: skip
    for one in synthetic.study_jobs("mad", given, {}):
        result = train_wave([contenders.replace(one, stages=((one.stages[0][0], 1),))], CPU, float("inf"))[0]
        assert 0 <= result["accuracy"] <= 1
    with pytest.raises(ValueError, match="unknown task 's9'"):
        synthetic.study_jobs("states", synthetic.arguments(options(tmp_path, "--tasks", "s9")), {})
