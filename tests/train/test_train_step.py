"""One step: the loss it reports, accumulation, ranks, the guard against non-finite steps, golden losses."""

import importlib.util
import json
import math
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from rank_runs import Ranks
from tiny_run import losses, metrics, validations
from torch import Tensor
from torch.nn import functional
from trainers import Build, main_exits, send_at

import lrnn_lm
from lrnn_lm.data import validation_batches
from lrnn_lm.data.pack import PackedRows, collate
from lrnn_lm.kernels import block_diagonal_scan
from lrnn_lm.runs.checkpoint import list_checkpoints, read_position
from lrnn_lm.train.loop import StepResult, Trainer
from lrnn_lm.train.stop import Stopped

GOLDEN = Path(__file__).with_name("golden.json")


def plain_nats(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[float, int]:
    """Nats and number of targets of a batch, from whole logits."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], reset=batch["reset"]).logits
    labels = batch["labels"].flatten()
    nats = functional.cross_entropy(logits.flatten(0, 1).double(), labels, ignore_index=-100, reduction="sum")
    return float(nats), int((labels != -100).sum())


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_the_loss_is_the_mean_over_the_targets_of_the_global_step(build: Build, micro_batch: int) -> None:
    """Micro-batches with unequal numbers of targets, 3 + 3 + 2 rows: not the mean of their means."""
    trainer = build(f"train.micro_batch={micro_batch}")
    batches = next(iter(trainer.rows.loader))
    parts = [plain_nats(trainer.bare_model, batch) for batch in batches]
    expected = sum(nats for nats, _ in parts) / sum(count for _, count in parts)
    assert len(parts) == 1 or len({nats / count for nats, count in parts}) > 1 < len({c for _, c in parts})
    assert trainer.step(batches).loss == pytest.approx(expected, rel=1e-6)


def test_the_loss_that_is_told_is_without_the_z_loss(build: Build) -> None:
    trainers = build("name=plain"), build("name=own", "train.z_loss=0.01")
    plain, own = (trainer.step(next(iter(trainer.rows.loader))) for trainer in trainers)
    assert own.loss == pytest.approx(plain.loss, rel=1e-6)
    assert own.z_loss > 0.01 > plain.z_loss == 0


def test_accumulation_changes_nothing(build: Build) -> None:
    """4 rows a step as 1 x 4, 2 x 2 and 4 x 1: the same losses and, after 6 steps, the same parameters.

    In fp64: AdamW divides small gradients by their own size, which shows fp32's rounding in parameters.
    """
    trained = {}
    for rows in (4, 2, 1):
        name = f"name=rows{rows}"
        trainer = build(name, "train.tokens_per_step=256", "train.tokens=1536", f"train.micro_batch={rows}")
        trainer.bare_model.double()
        trainer.run()
        trained[rows] = trainer
    whole = torch.cat([p.detach().flatten() for p in trained[4].bare_model.parameters()])
    for rows in (2, 1):
        parts = torch.cat([p.detach().flatten() for p in trained[rows].bare_model.parameters()])
        assert float((parts - whole).norm() / whole.norm()) < 1e-9
        assert_close_losses(losses(trained[rows].folder), losses(trained[4].folder), 1e-6)


def test_two_ranks_are_one(build: Build, recipe: Path, tmp_path: Path) -> None:
    """One rank stops after step 2; two go on to the end: the losses, validations and weights of one rank.

    Saving by minutes takes the main rank's clock. Processes that a launcher starts: test_train_launcher.py.
    """
    short = "train.tokens=3072"
    stopped = build("name=two", short)
    send_at(stopped, 2, signal.SIGTERM)
    with pytest.raises(Stopped):
        stopped.run()
    options = ("name=two", short, f"train.runs_dir={tmp_path}", "train.micro_batch=2")
    said = Ranks(recipe, 2, *options, "checkpoint.every=0.0005 min").expect()
    assert said.count("resuming from step 2 of 6") == 1
    assert "(2 ranks)" in said
    one = build("name=one", short)
    one.run()
    assert_close_losses(losses(tmp_path / "two"), losses(one.folder), 1e-5)
    assert_close_losses(validations(tmp_path / "two"), validations(one.folder), 1e-5)
    two = build("name=two", short)
    assert two.finished
    ours = torch.cat([p.detach().flatten() for p in one.bare_model.parameters()])
    theirs = torch.cat([p.detach().flatten() for p in two.bare_model.parameters()])
    assert float((ours - theirs).norm() / ours.norm()) < 1e-5


def poison(trainer: Trainer, steps: Sequence[int]) -> list[list[Tensor]]:
    """Make the gradient of these steps not finite; collects the parameters before and after each."""
    original, seen = trainer.step, []

    def step(batches: list, *rest: object) -> StepResult:
        if trainer.position.step + 1 not in steps:
            return original(batches, *rest)
        hook = trainer.bare_model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
        seen.append([p.detach().clone() for p in trainer.bare_model.parameters()])
        result = original(batches, *rest)
        hook.remove()
        seen.append([p.detach().clone() for p in trainer.bare_model.parameters()])
        return result

    trainer.step = step
    return seen


def test_a_poisoned_step_is_skipped_and_counted(build: Build) -> None:
    trainer = build("train.tokens=2048")
    seen = poison(trainer, [3])
    trainer.run()
    moments = [v for state in trainer.optimizer.state.values() for v in state.values()]
    assert moments
    assert all(torch.isfinite(v).all() for v in moments)
    before, after = seen
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    lines = [line for line in metrics(trainer.folder) if "loss" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1]
    assert lines[2]["grad_norm"] is None
    assert all(torch.isfinite(p).all() for p in trainer.bare_model.parameters())


def saved(trainer: Trainer) -> list[int]:
    return [read_position(folder).step for folder in list_checkpoints(trainer.checkpoints)]


def test_what_was_due_at_a_poisoned_step_is_made_up(build: Build) -> None:
    """Saved every 4 steps: after 6, the first good one, in place of 4; validated at 5 all the same."""
    trainer = build("checkpoint.keep_last=9")
    poison(trainer, [4, 5])
    trainer.run()
    assert saved(trainer) == [6, 8, 12]
    assert [step for step, _ in validations(trainer.folder)] == [5, 10, 12]


def test_a_stop_amid_poisoned_steps_is_saved_and_gone_on_from(build: Build) -> None:
    trainer = build("checkpoint.keep_last=9")
    poison(trainer, [4, 5])
    send_at(trainer, 4, signal.SIGTERM)
    with pytest.raises(Stopped):
        trainer.run()
    resumed = build("checkpoint.keep_last=9")
    poison(resumed, [5])
    resumed.run()
    assert saved(resumed) == [4, 8, 12]
    assert metrics(resumed.folder)[-1]["step"] == 12


def test_a_save_due_among_poisoned_steps_is_put_off(build: Build) -> None:
    trainer = build("checkpoint.every=60 min", "checkpoint.keep_last=9")
    poison(trainer, [4, 5])
    trainer.save_cadence.timer_expired = lambda: trainer.position.step + 1 == 4
    trainer.run()
    assert saved(trainer) == [6, 12]


def test_too_many_poisoned_steps_end_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Trainer.run

    def poisoned(trainer: Trainer, *arguments: object) -> Path:
        poison(trainer, range(6, 100))
        return run(trainer, *arguments)

    monkeypatch.setattr(Trainer, "run", poisoned)
    main_exits(2, "train", recipe, f"train.runs_dir={tmp_path}", "train.max_bad_steps=3")
    errors = capsys.readouterr().err
    assert "not finite for 3 steps in a row, up to step 8" in errors
    assert f"resume from {tmp_path}/tiny/checkpoints/step-00000004" in errors
    assert "Traceback" not in errors


def test_bits_per_byte_by_hand(build: Build) -> None:
    """Over the whole held-out text: nats of every token but each document's first, over its bytes.

    Each document's part of each row goes through the model on its own.
    """
    trainer = build("eval.tokens=1M", "train.tokens=512")
    trainer.run()
    own = trainer.tokenizer
    texts = [json.loads(line)["text"] for line in (trainer.folder / "heldout.jsonl").read_text().splitlines()]
    stream, document = [], []
    for number, text in enumerate(texts):
        ids = [own.bos_token_id, *own(text, add_special_tokens=False).input_ids, own.eos_token_id]
        stream += ids
        document += [number] * len(ids)
    nats = 0.0
    for start in range(0, len(stream) - 1, 64):
        row = range(start, min(start + 65, len(stream)))
        for number in {document[i] for i in row}:
            ids = torch.tensor([[stream[i] for i in row if document[i] == number]])
            with torch.no_grad():
                logits = trainer.bare_model(ids).logits[0, :-1].double()
            nats += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    line = next(line for line in metrics(trainer.folder) if "bits_per_byte" in line)
    assert line["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_a_step_clips_the_gradient(build: Build) -> None:
    """AdamW's first momentum after one step is a tenth of the gradient that it was given: of norm grad_clip,
    along the whole one. A norm below the bound is left alone."""
    moments = {}
    for clip in ("null", "1e-3", "1e6"):
        trainer = build(
            f"optim.grad_clip={clip}", "train.tokens=512", f"name=clip{clip}", "train.precision=fp32"
        )
        found = trainer.step(next(iter(trainer.rows.loader)))
        state = [trainer.optimizer.state[p]["exp_avg"].flatten() for p in trainer.bare_model.parameters()]
        moments[clip] = torch.cat(state) / (1 - trainer.recipe.optim.betas[0])
        norm = found.grad_norm  # before clipping
        assert norm > 0.01
        assert moments[clip].norm() == pytest.approx(min(norm, 1e-3) if clip == "1e-3" else norm, rel=1e-4)
    torch.testing.assert_close(moments["1e6"], moments["null"], rtol=0, atol=0)
    torch.testing.assert_close(moments["1e-3"] * norm / 1e-3, moments["null"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("share", [100.0, math.nan])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stay_and_do_not_count_in_the_norm(build: Build, name: str, share: float) -> None:
    """Whatever their gradients are: neither large ones nor NaN reach the step."""
    frozen = "optim.groups=[{match: '*embed*', lr_scale: 0}, {match: '*down_proj*', lr_scale: 0}]"
    trainer = build(frozen, "optim.grad_clip=1e-3", "train.tokens=512", f"optim.name={name}")
    parameters = dict(trainer.bare_model.named_parameters())
    kept = {key: p for key, p in parameters.items() if "embed" in key or "down_proj" in key}
    before = {key: p.detach().clone() for key, p in parameters.items()}
    for p in kept.values():
        p.register_hook(lambda gradient: gradient * share)
    clipped, update = [], trainer.optimizer.step

    def step() -> None:
        clipped.extend(p.grad.flatten() for key, p in parameters.items() if key not in kept)
        update()

    trainer.optimizer.step = step
    assert trainer.step(next(iter(trainer.rows.loader))).applied
    assert torch.cat(clipped).norm() == pytest.approx(1e-3, rel=1e-4)
    moved = {key for key, p in parameters.items() if not torch.equal(p, before[key])}
    assert moved == parameters.keys() - kept.keys()


def test_a_step_of_which_all_is_frozen(build: Build) -> None:
    trainer = build("optim.groups=[{match: '*', lr_scale: 0}]", "train.tokens=512")
    result = trainer.step(next(iter(trainer.rows.loader)))
    assert (result.applied, result.grad_norm) == (True, 0)


def test_validation_reads_at_most_eval_tokens(build: Build) -> None:
    trainer = build("eval.tokens=512", "train.tokens=512")
    trainer.run()
    rows = PackedRows(trainer.prepared.validation, 64)
    nats, count = plain_nats(trainer.bare_model, collate([rows[r] for r in range(8)]))
    assert validations(trainer.folder) == [(1, pytest.approx(nats / count, rel=1e-6))]
    assert sum(len(b["labels"]) for b in validation_batches(trainer.prepared.validation, 64, 3, 512)) == 8


def test_golden_losses(build: Build) -> None:
    """20 losses in fp32 on a CPU, so that numbers cannot drift unseen.

    After a change that is meant to change them: delete golden.json, run this test, and say why in the commit.
    """
    trainer = build("train.tokens=10240", "optim.lr=0.003", "eval.tokens=512", "train.precision=fp32")
    trainer.run()
    found = [loss for _, loss in losses(trainer.folder)]
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps({"losses": found}, indent=1) + "\n")
        pytest.fail(f"wrote {GOLDEN.name}; run again")
    assert found == pytest.approx(json.loads(GOLDEN.read_text())["losses"], rel=1e-4)


def assert_close_losses(found: list, expected: list, tolerance: float) -> None:
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=tolerance)


@contextmanager
def files_down_to(last: str) -> Iterator[list[str]]:
    """The package's files on the stack, outermost first, when a function of `last` is first called."""
    package, found = Path(lrnn_lm.__file__).parent, []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename == str(package / last) and not found:
            stack = [Path(f.filename) for f in traceback.extract_stack(frame)]
            inside = [str(file.relative_to(package)) for file in stack if file.is_relative_to(package)]
            if "kernels/dispatch.py" in inside:
                found.extend(dict.fromkeys(inside))
                sys.setprofile(None)

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)


def test_the_files_from_the_command_to_the_scan(recipe: Path, tmp_path: Path) -> None:
    """What a reader has to open: seven files for a CPU, eight for a GPU (here in the interpreter)."""
    short = ("train.tokens=64", "train.tokens_per_step=64", "train.micro_batch=1", "data.sequence_length=8")
    with files_down_to("kernels/torch_scan.py") as files:
        main_exits(0, "train", recipe, f"train.runs_dir={tmp_path}", *short)
    step = ["cli.py", "train/loop.py", "model/modeling.py", "model/layers.py", "mixers/bd_lru.py"]
    assert files == [*step, "kernels/dispatch.py", "kernels/torch_scan.py"]
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    with files_down_to("kernels/scan/block_diagonal_kernels.py") as files:
        block_diagonal_scan(torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1), backend="triton")
    assert files == [
        "kernels/dispatch.py", "kernels/scan/triton_scans.py", "kernels/scan/block_diagonal_kernels.py"
    ]  # fmt: skip
