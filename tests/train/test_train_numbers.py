"""What a run tells while it goes on: its pace, its layers, its pulse; and which checkpoints it keeps."""

import json
import multiprocessing
import os
import signal
import threading
import time
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import fingerprint, losses, metrics
from trainers import Build, send_at

from lrnn_lm import LRNNConfig
from lrnn_lm.api import score_run
from lrnn_lm.data.pack import PackedRows
from lrnn_lm.model.accounting import account
from lrnn_lm.recipe import load_recipe
from lrnn_lm.recipe.load import shipped
from lrnn_lm.runs.checkpoint import list_checkpoints, read_position
from lrnn_lm.train import metrics as metrics_module
from lrnn_lm.train import runtime, throughput
from lrnn_lm.train.build import model_config
from lrnn_lm.train.inspect_layers import shortened, summary, watched
from lrnn_lm.train.stop import Stopped, StopSignal
from lrnn_lm.train.tensors import fill_state
from lrnn_lm.train.throughput import Spent, Throughput
from lrnn_lm.train.validate import Validation
from lrnn_lm.train.watch import straggler


def test_pace_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's BD M=4 on four devices of known ceilings, half a second a step, a tenth of it waiting."""
    recipe = load_recipe(shipped("recipes/paper/bd-lru-m4.yaml"))
    config = model_config(recipe, 50_280)
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e15)
    monkeypatch.setattr(throughput, "peak_bandwidth", lambda device: 4e12)
    ranks = SimpleNamespace(num_processes=4, device=torch.device("cpu"), mixed_precision="bf16")
    pace = Throughput(recipe, config, sharded=True, accelerator=ranks)
    line = pace.line(Spent(0.5, 0.05, 0.2))
    assert line["tokens_per_second"] == 524_288 / 0.5
    a_token = account(config, 2048).flops_per_token_training
    assert 1.0e9 < a_token < 1.5e9  # 6 operations a parameter outside the embedding (173M), and the scan
    assert line["mfu"] == pytest.approx(524_288 * 2 * a_token / 4e15)
    assert line["data_wait"] == pytest.approx(0.1)
    assert line["host_idle"] == pytest.approx(0.4)
    # 64 rows a rank in 4 passes; each reads bf16 weights twice and writes fp32 gradients; AdamW in the end
    weights = 211_875_360
    least = 4 * weights * 8 + 28 * weights / 4
    assert least < pace.bytes_per_step < least + 4 * 2 * 60e9
    assert line["memory_bandwidth"] == pytest.approx(pace.bytes_per_step / 0.5 / 4e12)
    # What only an auto-encoder has counts, and may be a group.
    own = load_recipe(shipped("recipes/paper/bd-lru-m4.yaml"), ["optim.groups=[{match: '*decoder*'}]"])
    config.architectures = ["LRNNForReconstruction"]
    again = Throughput(own, config, sharded=True, accelerator=ranks)
    decoder = account(config, 2048).parameters["decoder"]
    assert again.bytes_per_step == pytest.approx(pace.bytes_per_step + decoder * (4 * 8 + 28 / 4))


@pytest.mark.parametrize(
    ("name", "flops", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H100 PCIe", 756e12, 2.0e12),
        ("NVIDIA H100 NVL", 835e12, 3.9e12),
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA GH200 480GB", 989e12, 4.0e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.04e12),
        ("NVIDIA GeForce RTX 3060", None, None),
    ],
)
def test_ceilings_by_datasheet(
    name: str, flops: float | None, bandwidth: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda")
    assert (runtime.peak_flops(device), runtime.peak_bandwidth(device)) == (flops, bandwidth)


def test_data_wait_is_seen(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that takes its time, on a CPU, where nothing else happens meanwhile."""
    trainer = build("train.tokens=2048")
    read = PackedRows.__getitem__

    def slowly(rows: PackedRows, row: int) -> dict[str, torch.Tensor]:
        time.sleep(0.02)
        return read(rows, row)

    monkeypatch.setattr(PackedRows, "__getitem__", slowly)
    trainer.run()
    lines = [line for line in metrics(trainer.folder) if "loss" in line]
    seconds = [line["data_wait"] * 512 / line["tokens_per_second"] for line in lines]
    assert all(wait >= 0.95 * 8 * 0.02 for wait in seconds[:-1])  # of 8 rows; however slow the machine is
    assert seconds[-1] == 0  # nothing is fetched for a step that will not come


def test_layers_are_looked_at(build: Build) -> None:
    """State norms against the states themselves; gates at an end after their logits are driven there."""
    trainer = build()
    model = trainer.bare_model
    batch = next(iter(trainer.rows.loader))[0]
    ids = batch["input_ids"][:1]
    with watched(model) as seen:
        model(input_ids=ids)
    told = summary(seen)
    states = model(input_ids=ids, use_cache=True).past_key_values
    norms = [next(iter(layer.recurrent_states.values())).float().norm() for layer in states.layers]
    assert told["state_norm"] == pytest.approx([float(norm.detach()) for norm in norms], rel=1e-5)
    assert told["gate_saturation"] == [0.0, 0.0]
    first = model.model.layers[0].mixer
    with torch.no_grad():
        bias = first.gate_proj.bias.view(first.block_size + 1, first.num_blocks, first.block_size)
        bias[0, : first.num_blocks // 2] = 50.0
    with watched(model) as seen:
        model(input_ids=ids)
    assert summary(seen)["gate_saturation"] == pytest.approx([0.5, 0.0])
    assert not any(block.mixer._forward_hooks for block in model.model.layers)


@pytest.mark.parametrize("key", ["learn_initial_state=true", "repeat=3"])
def test_a_number_a_layer_where_mixers_are_called_again(build: Build, key: str) -> None:
    """Where rows are cut at documents, and where layers repeat: the last state, and the gates of all."""
    trainer = build(f"model.{key}")
    model, batch = trainer.bare_model.eval(), shortened(next(iter(trainer.rows.loader))[0])
    batch["reset"][0, [20, 41]] = True
    for block in model.model.layers:
        with torch.no_grad():
            block.mixer.gate_proj.weight.mul_(300)
    with watched(model) as seen:
        model(input_ids=batch["input_ids"], reset=batch["reset"])
    told = summary(seen)
    cache = model(**{name: batch[name] for name in ("input_ids", "reset")}, use_cache=True).past_key_values
    states = [next(iter(layer.recurrent_states.values())).float() for layer in cache.layers]
    norms = [float(state.detach().norm()) for state in states[-2:]]
    assert told["state_norm"] == pytest.approx(norms, rel=1e-5)
    inputs: list[list[torch.Tensor]] = [[], []]
    for i, block in enumerate(model.model.layers):
        block.mixer_norm.register_forward_hook(lambda *seen_by, i=i: inputs[i].append(seen_by[2]))
    model(input_ids=batch["input_ids"], reset=batch["reset"])
    for share, block, xs in zip(told["gate_saturation"], model.model.layers, inputs, strict=True):
        gates = block.mixer.transitions(torch.cat(xs, dim=1)).abs()
        largest = torch.maximum(gates.amax(-1), 1 - gates.sum(-1))
        assert 0.01 < share == pytest.approx(float((largest > 0.99).float().mean()), abs=1e-5)


def test_looking_changes_nothing(build: Build, straight: Path) -> None:
    looked = build("name=looked", "train.inspect_every=1")
    looked.run()
    assert losses(looked.folder) == losses(straight)
    lines = [line for line in metrics(looked.folder) if "loss" in line]
    assert all(len(line["state_norm"]) == len(line["gate_saturation"]) == 2 for line in lines)


@pytest.mark.parametrize(("log", "look", "lines"), [(4, 6, [4, 6, 8, 12]), (12, 5, [5, 10, 12])])
def test_each_interval_is_kept(build: Build, log: int, look: int, lines: list[int]) -> None:
    """A look between two lines of the log is a line more: it came at multiples of both only."""
    trainer = build(f"train.log_every={log}", f"train.inspect_every={look}")
    trainer.run()
    found = {line["step"]: "state_norm" in line for line in metrics(trainer.folder) if "loss" in line}
    assert list(found) == lines
    assert [step for step, looked in found.items() if looked] == [n for n in lines if n % look == 0]


def test_the_pulse(build: Build) -> None:
    """Told at once where a long wait begins, and at the end."""
    trainer, told = build("checkpoint.background=false"), {}
    save, forward = trainer.saver.begin, trainer.forward

    def look() -> None:
        pulse = json.loads((trainer.folder / "heartbeat.json").read_text())
        told.setdefault(pulse["doing"], set()).add(pulse["step"])

    def looking(*args: Any, **options: Any) -> Any:
        if not trainer.model.training:
            look()
        return forward(*args, **options)

    trainer.saver.begin = lambda *args, **options: (look(), save(*args, **options))
    trainer.forward = looking
    trainer.run()
    assert told == {"saving": {4, 8, 12}, "validating": {5, 10, 12}}
    pulse = json.loads((trainer.folder / "heartbeat.json").read_text())
    assert (pulse["step"], pulse["tokens"], pulse["doing"]) == (12, 12 * 512, "finished")
    assert abs(time.time() - pulse["time"]) < 30
    assert pulse["pid"] == os.getpid()


def test_what_stands_in_which_line(build: Build) -> None:
    """The layers every 6 steps; the seconds that a checkpoint took, once, in the line of the next step."""
    trainer = build("train.inspect_every=6", "checkpoint.background=false")
    copied = trainer.saver._copied
    trainer.saver._copied = lambda: time.sleep(0.05) or copied()
    trainer.run()
    lines = {line["step"]: line for line in metrics(trainer.folder) if "loss" in line}
    assert [step for step, line in lines.items() if "state_norm" in line] == [6, 12]
    assert [step for step, line in lines.items() if "checkpoint_seconds" in line] == [5, 9]
    seconds = [lines[step]["checkpoint_seconds"] for step in (5, 9)]
    assert all(0.05 < each < 60 for each in seconds)


@pytest.mark.parametrize(("step", "ends"), [(3, 4), (12, 12)])
def test_no_room_for_a_line_ends_the_run(
    build: Build, monkeypatch: pytest.MonkeyPatch, step: int, ends: int
) -> None:
    """In the next step, as ranks hear of it then; at the end of the run, where there is none."""
    trainer, finite = build(), metrics_module.finite

    def full(value: Any) -> Any:
        if trainer.position.step == step:
            raise OSError(28, "No space left on device")
        return finite(value)

    monkeypatch.setattr(metrics_module, "finite", full)
    with pytest.raises(ValueError, match=r"could not write .*metrics.jsonl: No space left on device"):
        trainer.run()
    assert trainer.position.step == ends


def test_nothing_of_a_run_is_left_at_work(build: Build) -> None:
    """Its threads, its loader's processes, its file and, once it is scored, its lock, however it ends."""
    before = set(threading.enumerate())
    for name, step in (("done", None), ("stopped", 2)):
        trainer = build(f"name={name}", "train.tokens=2048", "data.num_workers=1")
        if step is not None:
            send_at(trainer, step, signal.SIGTERM)
        with pytest.raises(Stopped) if step is not None else nullcontext():
            score_run(trainer, trainer.run(), StopSignal())
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
        assert set(threading.enumerate()) <= before
        assert not multiprocessing.active_children()
        assert trainer.lock.closed
        assert trainer.metrics._file.closed


def test_stacks_are_due_after_the_minutes_of_a_stall_until_the_run_ends(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, exit: calls.append(seconds))
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: calls.append("cancelled"))
    build("train.tokens=1024", "train.stall_minutes=3").run()
    assert calls[-1] == "cancelled"
    assert set(calls[:-1]) == {180}


def test_the_slowest_rank() -> None:
    assert straggler([1.0, 1.1, 0.9, 2.2]) == {"slowest_rank": 3, "slowdown": pytest.approx(2.2)}
    assert straggler([1.0, 1.1, 0.9, 1.2]) == {}
    assert straggler([0.5]) == straggler([]) == straggler([0.0, 1.0]) == {}


def test_the_best_checkpoint_is_kept(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validated and saved every 2 steps, best at 4: kept beyond its turn, if the recipe wants it."""
    losses = cycle([5.0, 3.0, 4.0, 4.5, 3.5, 3.6])  # of steps 2, 4, .., 12 of each run
    monkeypatch.setattr("lrnn_lm.train.validate.Validator._measure", lambda *_: Validation(next(losses)))
    often = ("eval.every=2 steps", "checkpoint.every=2 steps", "checkpoint.keep_last=2")
    for name, best in (("best", ["step-00000004"]), ("last", [])):
        trainer = build(*often, f"name={name}", f"checkpoint.keep_best={str(bool(best)).lower()}")
        trainer.run()
        names = sorted(p.name for p in trainer.checkpoints.iterdir() if not p.is_symlink())
        assert names == [*best, "step-00000010", "step-00000012"]
        link = trainer.checkpoints / "best"
        assert [os.readlink(link)] == best if best else not link.is_symlink()
    monkeypatch.undo()
    assert build("name=best", *often).position.step == 12  # the newest, not the best, is gone on from


def test_saving_by_the_clock(build: Build) -> None:
    trainer = build("checkpoint.every=0.0001 min", "checkpoint.keep_last=20")
    trainer.run()
    assert len([p for p in trainer.checkpoints.iterdir() if not p.is_symlink()]) > 6


def test_written_at_once_or_in_the_background(build: Build, straight: Path) -> None:
    """And with the state that AdamW would make in its first step made before it."""
    trainer = build("checkpoint.background=false")
    fill_state(trainer.bare_model, trainer.optimizer)
    assert fingerprint(trainer.run()) == fingerprint(straight / "checkpoints/step-00000012")


def test_what_is_written_late_is_the_step_that_was_saved(build: Build) -> None:
    """Here the files of step 4 are written once the run is beyond it."""
    trainer = build()
    write, late = trainer.saver._write, threading.Event()
    trainer.saver._write = lambda *given: (late.wait(60), write(*given))
    step = trainer.step

    def stepped(*given: Any) -> Any:
        if trainer.position.step == 6:
            late.set()
        return step(*given)

    trainer.step = stepped
    send_at(trainer, 7, signal.SIGTERM)
    with pytest.raises(Stopped):
        trainer.run()
    names = [folder.name for folder in list_checkpoints(trainer.checkpoints)]
    assert names == ["step-00000004", "step-00000007"]
    assert [read_position(trainer.checkpoints / name).step for name in names] == [4, 7]


def test_h_lru_counts_its_one_row_of_gates() -> None:
    from lrnn_lm import LRNNForCausalLM

    torch.manual_seed(0)
    config = LRNNConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, intermediate_size=8,
        mixer={"type": "h_lru", "num_blocks": 4, "order": 3},
    )  # fmt: skip
    model = LRNNForCausalLM(config)
    with watched(model) as seen:
        model(input_ids=torch.arange(8).view(1, 8))
    assert summary(seen)["gate_saturation"] == [0.0]  # not the rows of its companion matrix that only shift
