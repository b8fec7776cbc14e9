"""`train.ramp`: a batch that grows, whose rows are the sequence that a run without it reads."""

import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from rank_runs import Ranks, recorded
from tiny_run import fingerprint, losses, metrics
from trainers import Build, main_exits, send_at

from lrnn_lm.recipe import load_recipe
from lrnn_lm.runs.load import describe
from lrnn_lm.train.stop import Stopped

ON = "train.ramp={start: 128, tokens: 1152}"  # 3 steps of 128 tokens, 2 of 256 (rounded), 1 of 384
SIZES = [128] * 3 + [256] * 2 + [384] + [512] * 3
TOKENS = f"train.tokens={sum(SIZES)}"


def test_sizes(recipe: Path) -> None:
    loaded = load_recipe(recipe, [ON, TOKENS])
    assert loaded.total_steps == len(SIZES)
    assert [64 * loaded.rows_at(step) for step in range(len(SIZES))] == SIZES
    assert [loaded.tokens_at(step) for step in range(len(SIZES))] == [
        sum(SIZES[:step]) for step in range(len(SIZES))
    ]
    plain = load_recipe(recipe)
    assert (plain.tokens_at(5), plain.rows_at(5), plain.total_steps) == (5 * 512, 8, 12)


def test_stopped_and_resumed_on_any_ranks_reads_one_sequence(
    recipe: Path, tmp_path: Path, build: Build
) -> None:
    whole = build(ON, TOKENS, "name=whole")
    ids = []
    step = whole.step

    def wrapped(batches: list, *rest: object) -> object:
        ids.append(np.concatenate([batch["input_ids"].numpy() for batch in batches]))
        return step(batches, *rest)

    whole.step = wrapped
    whole.run()
    assert [64 * len(rows) for rows in ids] == SIZES
    loader = build("name=none").rows.loader  # without a ramp
    flat = [batch["input_ids"].numpy() for rows in islice(iter(loader), 12) for batch in rows]
    assert np.array_equal(np.concatenate(ids)[: 8 * 12], np.concatenate(flat)[: sum(SIZES) // 64])
    lines = [line for line in metrics(whole.folder) if "loss" in line]
    assert [line["tokens"] for line in lines] == np.cumsum(SIZES).tolist()
    first = build(ON, TOKENS)
    send_at(first, 4, signal.SIGTERM)
    with pytest.raises(Stopped):
        first.run()
    again = build(ON, TOKENS)
    assert again.position.samples == sum(SIZES[:4]) // 64
    again.run()
    last = f"checkpoints/step-{len(SIZES):08d}"
    assert fingerprint(again.folder / last) == fingerprint(whole.folder / last)
    assert describe(again.folder / last).tokens == sum(SIZES)
    options = (f"train.runs_dir={tmp_path}", ON, TOKENS, "name=two")
    Ranks(recipe, 2, *options, record=tmp_path / "two").expect()
    for samples, rows in recorded(tmp_path / "two").items():
        at = np.cumsum([0, *SIZES]).tolist().index(64 * samples)
        assert {row.tobytes() for row in rows} == {row.tobytes() for row in ids[at]}
    ours, theirs = ([loss for _, loss in losses(tmp_path / name)] for name in ("two", "whole"))
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_it_is_the_runs(
    build: Build, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(ON, "train.tokens=2048").run()
    main_exits(2, "train", recipe, f"train.runs_dir={tmp_path}")
    assert "train.ramp" in capsys.readouterr().err
