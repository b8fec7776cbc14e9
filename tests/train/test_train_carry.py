"""States carried from row to row: the order of rows, what a row begins with, resuming, ranks."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_runs import Ranks
from tiny_run import fingerprint, losses, validations
from torch import Tensor, nn
from trainers import Build, main_exits, send_at

from lrnn_lm.train import loop
from lrnn_lm.train.loop import Trainer
from lrnn_lm.train.stop import Stopped

ORDER = "data.rows_in_order=4"
LEARNT = "model.learn_initial_state=true"
WINDOW = "model.layer_pattern=[bd_lru, {type: attention, num_heads: 2, window: 24}]"


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates change nothing, so that a pass over several rows at once can tell what they cost."""
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 0.0)


def test_a_lane_reads_stretches_of_the_text(build: Build) -> None:
    """A function of the sample's number; each stretch once an epoch, in another order in the next."""
    loader = build(ORDER).rows.loader
    R, C = loader.rows_per_step, 4
    stretches = loader.num_rows // C
    turns = 2 * stretches // R
    numbers = loader.row_numbers(0, turns * C * R).reshape(turns, C, R)
    assert (numbers[:, 0] % C == 0).all()
    assert (np.diff(numbers, axis=1) == 1).all()
    drawn = numbers[:, 0].flatten() // C
    assert sorted(drawn[:stretches]) == list(range(stretches))
    assert list(drawn[:R]) != list(drawn[stretches : stretches + R])
    part = loader.row_numbers(7 * R + 3, 5)
    assert list(part) == list(numbers.reshape(-1, R)[7, 3:8])


def nats_of_long_rows(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[float]:
    """Mean loss over the targets of each step's rows, read as the parts of one long row a lane."""
    joined = {key: torch.cat([batch[key] for batch in batches], dim=1) for key in batches[0]}
    with torch.no_grad():
        logits = model(input_ids=joined["input_ids"], reset=joined["reset"], use_cache=False).logits
    parts = zip(logits.chunk(len(batches), dim=1), batches, strict=True)
    return [
        float(nn.functional.cross_entropy(part.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100))
        for part, batch in parts
    ]


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("options", [(), ("train.segment=16", "train.micro_batch=3"), (WINDOW,), (LEARNT,)])
def test_rows_go_on_from_the_rows_before(build: Build, options: tuple[str, ...]) -> None:
    """The losses of C steps are those of one row C times as long; then a lane begins anew."""
    trainer = build(ORDER, "train.tokens=4096", "eval.every=100 steps", *options)
    batches = [whole_step(next(steps)) for steps in [iter(trainer.rows.loader)] for _ in range(8)]
    trainer.rows.loader.position = 0
    trainer.bare_model.double()
    want = [nats_of_long_rows(trainer.bare_model, part) for part in (batches[:4], batches[4:])]
    trainer.run()
    got = [loss for _, loss in losses(trainer.folder)]
    assert got == pytest.approx([*want[0], *want[1]], rel=1e-6)


def whole_step(micro_batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([batch[key] for batch in micro_batches]) for key in micro_batches[0]}


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize(("probability", "options"), [(0.4, ()), (0.4, (LEARNT,)), (1.0, ())])
def test_rows_start_from_other_rows(build: Build, probability: float, options: tuple[str, ...]) -> None:
    """A row that is drawn begins with the state of the row before, and its first token starts no document."""
    draw = f"train.start_from_other={probability}"
    trainer = build(draw, "train.tokens=1536", "eval.every=100 steps", *options)
    for layer in trainer.bare_model.model.layers if options else ():  # zeros, until they have been learnt
        torch.nn.init.normal_(layer.initial_state)
    batches = [whole_step(next(steps)) for steps in [iter(trainer.rows.loader)] for _ in range(3)]
    trainer.rows.loader.position = 0
    trainer.bare_model.double()
    chosen = torch.tensor([[trainer.carry._goes_on(step, lane) for lane in range(8)] for step in range(3)])
    again = build("name=again", draw).carry
    assert all(again._goes_on(s, i) == chosen[s, i] for s in range(3) for i in range(8))
    drawn = np.mean([trainer.carry._goes_on(step, 5) for step in range(400)])
    assert drawn == pytest.approx(probability, abs=0.08)
    for step in (1, 2):
        batches[step]["reset"][:, 0] = ~chosen[step]  # where nothing is before it in the long row either
    want = nats_of_long_rows(trainer.bare_model, batches)
    trainer.run()
    assert [loss for _, loss in losses(trainer.folder)] == pytest.approx(want, rel=1e-6)
    begins = {key: value[:4] for key, value in batches[2].items()} | {"reset": torch.ones(4, 64).bool()}
    _, given = trainer.carry.before(2, begins)
    assert torch.equal(given["reset"][:, 0], ~chosen[2, :4])
    assert given["reset"][:, 1:].all()
    assert begins["reset"].all()


def stopped_after(build: Build, step: int, *options: str) -> Trainer:
    stopped = build("name=stopped", *options)
    send_at(stopped, step, signal.SIGTERM)
    with pytest.raises(Stopped):
        stopped.run()
    return stopped


@pytest.mark.parametrize(
    "options",
    [
        (ORDER, "train.start_from_other=0.5"),
        (ORDER, WINDOW, "train.segment=16", LEARNT),
    ],
)
def test_a_stopped_run_goes_on_from_the_same_states(build: Build, options: tuple[str, ...]) -> None:
    """Bit for bit, from the middle of a stretch."""
    whole = build("name=whole", *options)
    whole.run()
    stopped_after(build, 6, *options)
    resumed = build("name=stopped", *options)
    assert fingerprint(resumed.run()) == fingerprint(whole.run())


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_lanes_go_on_with_another_number_of_ranks(build: Build, recipe: Path, parallel: str) -> None:
    """By segments, in two micro-batches a rank: ranks exchange gradients in a step's last backward pass."""
    options = (ORDER, WINDOW, LEARNT, "train.segment=16", "train.tokens=2048", "train.micro_batch=3")
    alone = build("name=alone", *options)
    alone.run()
    folder = stopped_after(build, 2, *options).folder
    Ranks(recipe, 2, "name=stopped", f"train.runs_dir={folder.parent}", *options, parallel=parallel).expect()
    for read in (losses, validations):
        assert read(folder) == [(s, pytest.approx(loss, rel=2e-5)) for s, loss in read(alone.folder)] != []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((ORDER, "model.layer_pattern=[bd_lru, attention]"), ("data.rows_in_order", "attention", "window")),
        (("train.start_from_other=0.5", WINDOW), ("start_from_other", "window")),
        (("train.start_from_other=1.5",), ("start_from_other",)),
        ((ORDER, "data.source={type: synthetic, task: s5}"), ("rows_in_order", "synthetic")),
        ((ORDER, "train.ramp={start: 128, tokens: 1024}"), ("data.rows_in_order", "train.ramp")),
        (("data.min_document=8", "data.source={type: synthetic, task: s5}"), ("min_document", "synthetic")),
        (("data.min_document=1",), ("data.min_document", "2")),
        (("data.min_document=900000",), ("data.min_document 900,000", "the longest has")),
        (("data.rows_in_order=100000",), ("rows_in_order 100000", "too short")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_said(
    recipe: Path, overrides: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    main_exits(2, "train", recipe, "name=wrong", *overrides)
    said = capsys.readouterr().err
    assert [word for word in words if word not in said] == []
    assert "Traceback" not in said
