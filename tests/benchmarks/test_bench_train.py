"""`lrnn bench train` on a CPU: equal models, honest rows, failures and budgets that are told."""

import dataclasses
import json

import pytest
import torch
from forks import server

from benchmarks import peers, results, train
from benchmarks.contenders import CONTENDERS, SIZES, build_config, count, pick_contenders, pick_size
from benchmarks.processes import median_rows
from benchmarks.profile import kind_of
from benchmarks.train import TrainingStep, TrainSettings
from lrnn_lm.kernels import block_diagonal_scan, higher_order_scan
from lrnn_lm.kernels.dispatch import BACKENDS
from lrnn_lm.model.accounting import account
from lrnn_lm.recipe import load_recipe

TINY = {"width": 32, "layers": 2, "vocab": 61, "tokens": "64", "lengths": "16,32", "steps": 2, "warmup": 0}
# fla may not be installed; the Transformer of the reference's depth and width has fewer parameters
LOCAL = [name for name in CONTENDERS if name not in ("gated-deltanet", "transformer-same-shape")]


@pytest.mark.parametrize("size", ["50M", "212M", "1.3B"])
def test_contenders_have_equal_parameters(size):
    counts = {name: count(build_config(CONTENDERS[name], SIZES[size], None, 2048)) for name in LOCAL}
    for name, parameters in counts.items():
        assert parameters == pytest.approx(counts["bd-m4"], rel=0.02), name


def test_the_papers_sizes_are_the_recipes():
    for name in ("bd-m1", "bd-m4", "h-m16", "lstm"):
        config = build_config(CONTENDERS[name], SIZES["212M"], None, 2048)
        assert count(config) == load_recipe(CONTENDERS[name].recipe).model.parameters
    assert build_config(CONTENDERS["transformer"], SIZES["212M"], None, 2048).num_hidden_layers == 19


@pytest.mark.parametrize("size", ["50M", "212M", "1.3B"])
def test_a_transformer_of_equal_depth_and_width(size):
    """Beside the one of equal parameters, which is deeper; at the paper's size it is the recipe's."""
    same, reference = (
        build_config(CONTENDERS[name], SIZES[size], None, 2048)
        for name in ("transformer-same-shape", "bd-m4")
    )
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
        assert getattr(same, key) == getattr(reference, key), key
    assert count(same) < count(reference)
    if size == "212M":
        assert count(same) == load_recipe("recipes/paper/transformer.yaml").model.parameters


def test_the_residual_streams_dtype_is_a_setting(tmp_path):
    """It is in the rows and in the file's settings, so that `--compare` repeats it."""
    for wanted, told in ((None, True), (True, True), (False, False)):
        settings = TrainSettings("bd-m4", compile=False, residual_in_fp32=wanted, **TINY | {"lengths": "16"})
        (row,) = train.run(settings, "cpu", tmp_path / "rows.jsonl")
        assert row["residual_in_fp32"] is told
        about, _ = results.read_results(tmp_path / "rows.jsonl")
        assert TrainSettings(**about["settings"]) == settings


def test_several_processes(tmp_path, monkeypatch):
    """A row is the median process's, with the times of all; the file says so and runs again."""
    monkeypatch.setattr("benchmarks.processes.get_context", lambda kind: server())  # imports cost seconds
    settings = TrainSettings("bd-m4,lstm", compile=False, processes=2, **TINY | {"lengths": "16"})
    rows = train.run(settings, "cpu", tmp_path / "rows.jsonl")
    assert [row["contender"] for row in rows] == ["bd-m4", "lstm"]
    for row in rows:
        assert row["processes"] == len(row["step_seconds_each"]) == 2
        assert row["step_seconds"] == min(row["step_seconds_each"])
    about, stored = results.read_results(tmp_path / "rows.jsonl")
    assert stored == rows
    assert TrainSettings(**about["settings"]) == settings
    with pytest.raises(ValueError, match="--processes must be at least 1, not 0"):
        train.run(dataclasses.replace(settings, processes=0), "cpu")


def test_medians_of_processes():
    skipped = {"reason": "skipped"}
    runs = [
        [{"contender": "a", "step_seconds": t, "loss": t}, {"contender": "b", "reason": "no"}, third]
        for t, third in ((3.0, {"step_seconds": 9.0}), (1.0, skipped), (2.0, skipped))
    ]
    a, b, c = median_rows(runs, "step_seconds")
    assert (a["step_seconds"], a["loss"], a["step_seconds_each"]) == (2.0, 2.0, [3.0, 1.0, 2.0])
    assert b == {"contender": "b", "reason": "no"}
    assert (c["step_seconds"], c["processes"]) == (9.0, 1)


def test_a_recipe_is_taken_as_it_stands():
    (contender,) = pick_contenders("recipes/demo.yaml")
    config = build_config(contender, SIZES["1.3B"], 4096, 64)
    assert (contender.name, config.hidden_size, config.num_hidden_layers) == ("demo", 128, 4)
    with pytest.raises(ValueError, match="--vocab"):
        build_config(contender, SIZES["1.3B"], None, 64)


def test_rows_and_files(tmp_path, capsys):
    settings = TrainSettings(contenders="bd-m4,paper-m4", compile=False, profile=3, **TINY)
    rows = train.run(settings, "cpu", tmp_path / "rows.jsonl")
    about, stored = results.read_results(tmp_path / "rows.jsonl")
    assert stored == rows
    assert len(rows) == 4
    assert TrainSettings(**about["settings"]) == settings
    assert [(row["contender"], row["B"], row["T"]) for row in rows[::2]] == [
        ("bd-m4", 4, 16),
        ("bd-m4", 2, 32),
    ]
    for row in rows:
        config = build_config(CONTENDERS[row["contender"]], pick_size("212M", 32, 2), 61, row["T"])
        assert row["flops_per_token"] == account(config, row["T"]).flops_per_token_training
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_seconds"])
        assert 0 < row["loss"] < 6
        assert row["profile"]["kinds"]
        assert len(row["profile"]["kernels"]) == 3
    # The same weights, the same data, another formulation: the same loss.
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)
    assert (tmp_path / "rows.png").stat().st_size > 1000
    assert len((tmp_path / "rows.md").read_text().splitlines()) == 2 + len(rows)
    assert "tokens/s" in capsys.readouterr().out


def test_a_contender_that_cannot_run_is_a_row(monkeypatch, tmp_path):
    def fails(self):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(TrainingStep, "__call__", fails)
    rows = train.run(TrainSettings(contenders="bd-m4,lstm", compile=False, **TINY), "cpu")
    assert len(rows) == 4
    assert {row["reason"] for row in rows} == {"RuntimeError: CUDA out of memory. Tried to allocate"}


@pytest.mark.parametrize("mixers", [False, True])
def test_other_packages_mixers_are_not_compiled(mixers, monkeypatch):
    """The rest of their blocks is."""
    graphs = []
    monkeypatch.setitem(CONTENDERS, "bd-m4", dataclasses.replace(CONTENDERS["bd-m4"], foreign=not mixers))

    def look(module, examples, **_):
        graphs.append(module)
        return module.forward

    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: compile_with(module, backend=look, **options)
    )
    rows = train.run(TrainSettings(contenders="bd-m4", **TINY | {"lengths": "16"}), "cpu")
    assert "reason" not in rows[0]
    assert graphs
    assert (len(graphs) == 1) == mixers, "a block is one graph, or what is before and behind its mixer"


def test_what_does_not_compile_is_run_as_it_is(monkeypatch):
    def fails(self):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(TrainingStep, "compile_blocks", fails)
    rows = train.run(TrainSettings(contenders="bd-m4", **{**TINY, "lengths": "16"}), "cpu")
    assert rows[0]["compiled"] is False
    assert rows[0]["step_seconds"] > 0
    assert not train.may_run_uncompiled({"reason": "OutOfMemoryError: CUDA out of memory. Tried"})
    assert not train.may_run_uncompiled({"step_seconds": 1.0})


def test_a_budget_leaves_out_what_no_longer_fits():
    settings = TrainSettings(contenders="bd-m4,bd-m1", compile=False, budget_seconds=1e-9, **TINY)
    assert all(row["reason"].startswith("skipped: ") for row in train.run(settings, "cpu"))


def test_the_step_is_an_optimizer_step():
    """Losses fall on one batch, and no step leaves gradients behind."""
    config = build_config(CONTENDERS["bd-m4"], pick_size("212M", 32, 1), 61, 32)
    step = TrainingStep(config, torch.device("cpu"), TrainSettings(), 4, 32)
    losses = [float(step()) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.3
    assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize("scan", [block_diagonal_scan, higher_order_scan])
def test_the_associative_backend_is_the_same_recurrence(scan):
    torch.manual_seed(0)
    values = torch.randn(2, 9, 3, 4) if scan is block_diagonal_scan else torch.randn(2, 9, 3)
    gates = torch.randn(*values.shape, 5)
    with peers.associative_backend("associative"):
        got = scan(gates, values, backend="associative")
        with pytest.raises(ValueError, match="from zero"):
            scan(gates, values, h0=torch.zeros(2, 3, 4), backend="associative")
    for x, want in zip(got, scan(gates, values, backend="reference"), strict=True):
        torch.testing.assert_close(x, want)
    assert "associative" not in BACKENDS


def test_kinds_of_kernels():
    names = {
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "products",
        "forward_kernel": "scan", "backward_kernel": "scan", "wide_block_transfer_kernel": "scan",
        "triton_per_fused__fused_rms_norm_backward_forward_kernel_4": "compiled elementwise",
        "pytorch_flash::flash_fwd_kernel<...>": "attention",
        "triton_red_fused__fused_rms_norm_3": "compiled elementwise",
        "void at::native::multi_tensor_apply_kernel<...FusedAdam...>": "optimizer",
        "Memcpy DtoD (Device -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<...>": "other elementwise",
    }  # fmt: skip
    assert {name: kind_of(name) for name in names} == names


def test_files_of_other_kinds(tmp_path):
    old = tmp_path / "kernels.json"
    old.write_text(json.dumps({"about": {"device": "x"}, "rows": [{"what": "a", "B": 1, "T": 2}]}, indent=1))
    assert results.read_results(old) == ({"device": "x"}, [{"what": "a", "B": 1, "T": 2}])
    old.write_text("no")
    with pytest.raises(ValueError, match="not a file that"):
        results.read_results(old)
