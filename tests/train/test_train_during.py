"""`eval.during`: tasks scored while a run trains; the run stays what it is without them, bit for bit."""

import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_runs import EVERY, Prank, Ranks
from rich.console import Console
from tiny_run import LAST, STEPS, TEXT, fingerprint, losses, metrics, sha256, validations, write_recipe
from trainers import main_exits

from lrnn_lm.api import task_scorer
from lrnn_lm.evaluate import evaluate
from lrnn_lm.recipe import load_recipe
from lrnn_lm.runs.layout import latest_checkpoint
from lrnn_lm.train.build import build_trainer
from lrnn_lm.train.loop import Trainer
from lrnn_lm.train.stop import Stopped

TASKS = ("heldout_cloze", "heldout_bits_per_byte")
ON = f"eval.during={{tasks: [{', '.join(TASKS)}], every: 4 steps, limit: 9}}"


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over texts of sentences, as the cloze needs."""
    folder, rng = tmp_path_factory.mktemp("sentences"), random.Random(0)

    def sentence() -> str:
        return " ".join(rng.choices(TEXT.split(), k=rng.randint(11, 15))).capitalize() + " tokens."

    with (folder / "text.jsonl").open("w") as lines:
        for _ in range(150):
            lines.write(json.dumps({"text": " ".join(sentence() for _ in range(6))}) + "\n")
    (folder / "tokenizer.yaml").write_text("{model_type: bpe, vocab_size: 320}\n")
    # A constant rate: a run of fewer steps is the beginning of a longer one.
    constant = {"schedule": "constant", "warmup": "2 steps"}
    return write_recipe(folder, model={"num_hidden_layers": 1}, optim=constant)


def build(recipe: Path, runs: Path, *overrides: str) -> Trainer:
    loaded = load_recipe(recipe, [f"train.runs_dir={runs}", *overrides])
    return build_trainer(loaded, Console(quiet=True), scorer=task_scorer(loaded))


@pytest.fixture(scope="module")
def plain(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without tasks."""
    trainer = build(sentences, tmp_path_factory.mktemp("plain"))
    trainer.run()
    return trainer.folder


@pytest.fixture(scope="module")
def scored(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with tasks."""
    runs = tmp_path_factory.mktemp("scored")
    main_exits(0, "train", sentences, f"train.runs_dir={runs}", ON)
    return runs / "tiny"


def scores(run: Path) -> dict[int, dict[str, float]]:
    """By step, without the seconds."""
    lines = [line for line in metrics(run) if "tasks_seconds" in line]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: {k: v for k, v in line.items() if "/" in k} for line in lines}


def test_the_run_is_the_same_without(scored: Path, plain: Path) -> None:
    got, want = fingerprint(scored / LAST), fingerprint(plain / LAST)
    assert json.loads((scored / LAST / "trainer/state.json").read_text())["scored"] == STEPS
    got.pop("trainer/state.json"), want.pop("trainer/state.json")
    assert got == want  # weights, optimizer and random states
    assert (losses(scored), validations(scored)) == (losses(plain), validations(plain))
    assert (list(scores(scored)), list(scores(plain))) == ([4, 8, 12], [])


def test_they_are_what_the_checkpoint_scores(scored: Path, tmp_path: Path) -> None:
    found = evaluate(scored / LAST, list(TASKS), limit=9, output=tmp_path)["results"]
    want = {
        f"{task}/{metric}": found[task][f"{metric},none"]
        for task, metric in (("heldout_cloze", "acc"), ("heldout_bits_per_byte", "bits_per_byte"))
    }
    assert scores(scored)[STEPS].items() >= want.items()
    assert len({row["heldout_bits_per_byte/bits_per_byte"] for row in scores(scored).values()}) == 3


def assert_alike(run: Path, scored: Path, steps: list[int]) -> None:
    """Other sums give other last bits."""
    got, want = scores(run), scores(scored)
    assert list(got) == steps
    for step in steps:
        assert got[step] == pytest.approx(want[step], rel=1e-3), step


@pytest.mark.slow
def test_two_ranks_share_the_requests(sentences: Path, tmp_path: Path, scored: Path) -> None:
    Ranks(sentences, 2, f"train.runs_dir={tmp_path}", "train.tokens=2048", ON).expect()
    assert_alike(tmp_path / "tiny", scored, [4])


def test_two_sharded_ranks(sentences: Path, tmp_path: Path, scored: Path) -> None:
    """Stopped within a batch of one of them and resumed, the run is the one without tasks."""
    options, last = (f"train.runs_dir={tmp_path}", "checkpoint.every=12 steps"), f"{LAST}/model.safetensors"
    Ranks(sentences, 2, *options, "name=off", parallel="fsdp2").expect()
    prank = Prank(rank=1, step=8, signal=signal.SIGTERM, scoring=True)
    said = Ranks(sentences, 2, *options, "name=on", ON, parallel="fsdp2", prank=prank).expect(85)
    assert "after step 8" in said
    assert list(scores(tmp_path / "on")) == [4]
    Ranks(sentences, 2, *options, "name=on", ON, parallel="fsdp2").expect()
    assert_alike(tmp_path / "on", scored, [4, 8, 12])
    assert sha256(tmp_path / "on" / last) == sha256(tmp_path / "off" / last)
    assert losses(tmp_path / "on") == losses(tmp_path / "off")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "told", "parallel"),
    [
        ("full", "no room on the GPU for 2.50 GiB more", "ddp"),
        ("lost", "data set cannot be loaded", "ddp"),
        ("full", "no room on the GPU for 2.50 GiB more", "fsdp2"),
        pytest.param("lost", "data set cannot be loaded", "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_at_a_request_costs_no_step(
    rank: int, fault: str, told: str, parallel: str, sentences: Path, tmp_path: Path
) -> None:
    """The others waited for its share until they were cut off, and nothing was saved; alone it saves. The
    one that has the fault says it, also where it is a mistake that all could have."""
    options = (f"train.runs_dir={tmp_path}", "checkpoint.every=100 steps", ON)
    prank = Prank(rank=rank, step=4, scoring=True, **{fault: True})
    said = Ranks(sentences, 2, *options, parallel=parallel, prank=prank).expect(2)
    assert said.count(told) == 1
    assert "Traceback" not in said
    assert latest_checkpoint(tmp_path / "tiny/checkpoints").name == "step-00000004"


def test_a_mistake_of_all_ranks_in_a_scoring_is_told_once(sentences: Path, tmp_path: Path) -> None:
    prank = Prank(rank=EVERY, step=4, scoring=True, lost=True)
    said = Ranks(sentences, 2, f"train.runs_dir={tmp_path}", ON, prank=prank).expect(2)
    assert said.count("data set cannot be loaded") == 1
    assert latest_checkpoint(tmp_path / "tiny/checkpoints").name == "step-00000004"


def test_state_around_the_scoring(sentences: Path, tmp_path: Path) -> None:
    """Random states, modes, hooks and parameters; and a signal in it stops within one batch and saves."""
    trainer = build(sentences, tmp_path, ON, "train.average={decay: 0.5}")
    scorer, passes = trainer.scorer, []

    def state() -> tuple:
        generators = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
        model = trainer.bare_model
        modes = (
            [m.training for m in model.modules()],
            torch.is_grad_enabled(),
            len(model._forward_pre_hooks),
        )
        return generators, modes, [id(p) for p in model.parameters()], [p.sum() for p in model.parameters()]

    def one_pass(*_: object) -> None:
        passes.append(1)
        signal.raise_signal(signal.SIGTERM)

    def wrapped(model: torch.nn.Module, *rest: object) -> dict[str, float]:
        if trainer.position.step == 8:
            model.register_forward_hook(one_pass)
        random.random(), np.random.rand(), torch.rand(1)
        return scorer(model, *rest)

    check, trainer.scorer = trainer._score_if_due, wrapped

    def checked(rang: bool = False) -> None:
        before = state()
        check(rang)
        assert state() == before

    trainer._score_if_due = checked
    with pytest.raises(Stopped, match="after step 8"):
        trainer.run()
    assert len(passes) == 1
    assert list(scores(trainer.folder)) == [4]


def test_a_mistake_that_only_scoring_shows(sentences: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Told at the first scoring; nothing is lost. This one is known before, but for the patch."""
    monkeypatch.setattr("lrnn_lm.evaluate.tasks.synthetic.check_answerable", lambda *_: None)
    tasks = "eval.during={tasks: [mad_compression], every: 4 steps, limit: 1}"
    main_exits(2, "train", sentences, f"train.runs_dir={tmp_path}", tasks)
    said = capsys.readouterr().err
    assert "task mad_compression asks an auto-encoder" in said
    assert "Traceback" not in said
    assert (tmp_path / "tiny/checkpoints/step-00000004").is_dir()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("acc")])
def test_a_scoring_that_fails_costs_no_step(error: Exception, sentences: Path, tmp_path: Path) -> None:
    """No room on the GPU for a long request, say."""

    def scorer(*_: object) -> dict[str, float]:
        raise error

    overrides = [f"train.runs_dir={tmp_path}", ON, "checkpoint.every=100 steps"]
    trainer = build_trainer(load_recipe(sentences, overrides), Console(quiet=True), scorer=scorer)
    with pytest.raises(type(error)):
        trainer.run()
    assert latest_checkpoint(tmp_path / "tiny/checkpoints").name == f"step-{trainer.position.step:08d}"
