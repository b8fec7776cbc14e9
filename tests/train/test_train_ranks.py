"""Ranks, accumulation, DDP, FSDP2 and HSDP are one training; a run goes on on other ranks as on the same.

Processes of gloo's on the CPU.
"""

import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_runs import Prank, Ranks, recorded, weights
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import losses, metrics, validations, write_recipe
from torch.distributed.checkpoint import HuggingFaceStorageReader
from trainers import main_exits

from lrnn_lm.data.order import rows_of_samples
from lrnn_lm.data.pack import PackedRows
from lrnn_lm.recipe import load_recipe
from lrnn_lm.runs import checkpoint
from lrnn_lm.train.build import build_trainer
from lrnn_lm.train.tensors import is_sharded_folder, read_shards

STEPS, ROWS = 12, 12
LAST = f"checkpoints/step-{STEPS:08d}"
# How the model is shared (hsdp: two ranks hold a copy), ranks, rows of a micro-batch: of 12 rows a step, 1, 2
# or 4 micro-batches a rank, the last of 2 x 4 shorter. DDP of 4 ranks: `test_other_ranks_go_on_..`.
LAYOUTS = [("ddp", 1, 3), ("ddp", 2, 4), ("fsdp2", 2, 3), ("hsdp", 4, 3)]
MORE_LAYOUTS = [("ddp", 1, 6), ("ddp", 2, 3), ("ddp", 4, 1), ("ddp", 4, 2), ("fsdp2", 2, 6), ("fsdp2", 4, 1)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows a step: they split over 1, 2, 3 and 4 ranks. Little text, so that runs reach a second epoch."""
    return write_recipe(
        tmp_path_factory.mktemp("ranks"),
        documents=40,
        train={"tokens": STEPS * ROWS * 64, "tokens_per_step": ROWS * 64, "micro_batch": 12},
        checkpoint={"every": "5 steps"},
        eval={"every": "6 steps"},
        optim={"lr": 0.003},
    )


@pytest.fixture(scope="module")
def one(recipe: Path) -> Path:
    """The run of one process, whole steps at once."""
    trainer = build_trainer(load_recipe(recipe, ["name=one"]), Console(quiet=True))
    trainer.run()
    return trainer.folder


def name(parallel: str, ranks: int, rows: int) -> str:
    return f"{parallel}-{ranks}x{rows}"


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in MORE_LAYOUTS)],
    ids=lambda layout: name(*layout),
)
def test_layouts_agree(recipe: Path, one: Path, layout: tuple[str, int, int]) -> None:
    parallel, ranks, rows = layout
    Ranks(recipe, ranks, f"name={name(*layout)}", f"train.micro_batch={rows}", parallel=parallel).expect()
    run = one.parent / name(*layout)
    assert_agree(run, one)


def assert_agree(run: Path, one: Path) -> None:
    """The same losses to 1e-5 relative, and what comes of them."""
    for found, expected in ((losses(run), losses(one)), (validations(run), validations(one))):
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [x for _, x in found] == pytest.approx([x for _, x in expected], rel=1e-5)
    ours, theirs = weights(one / LAST), weights(run / LAST)
    assert float((ours - theirs).norm() / ours.norm()) < 1e-4


@pytest.mark.parametrize(
    "layout", [("ddp", 2, 3), ("fsdp2", 3, 2), ("hsdp", 4, 3)], ids=lambda layout: name(*layout)
)
def test_resumed_is_straight_through_bit_for_bit(recipe: Path, layout: tuple[str, int, int]) -> None:
    parallel, ranks, rows = layout
    optim = "muon" if parallel == "hsdp" else "adamw"
    short = (f"train.micro_batch={rows}", f"optim.name={optim}", f"train.tokens={4 * ROWS * 64}")
    short = (*short, "checkpoint.every=3 steps", "eval.every=2 steps")
    Ranks(recipe, ranks, *short, f"name=straight-{parallel}", parallel=parallel).expect()
    stop = Prank(rank=ranks - 1, step=2, signal=signal.SIGTERM)
    said = Ranks(recipe, ranks, *short, f"name=parts-{parallel}", parallel=parallel, prank=stop).expect(85)
    assert said.count("stopped by a signal on another rank after step 2 of 4") == 1
    said = Ranks(recipe, ranks, *short, f"name=parts-{parallel}", parallel=parallel).expect()
    assert "going on from step 2" in said
    straight, parts = (recipe.parent / "runs" / f"{kind}-{parallel}" for kind in ("straight", "parts"))
    assert losses(parts) == losses(straight)
    assert validations(parts) == validations(straight)
    ends = [tensors_of(run / "checkpoints/step-00000004") for run in (straight, parts)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    if parallel != "ddp":  # each shard is stored once, also where several ranks hold it
        shards = straight / "checkpoints/step-00000004/trainer/shards"
        stored = HuggingFaceStorageReader(str(shards)).read_metadata().state_dict_metadata
        assert len(stored["model/lm_head.weight"].chunks) == {"fsdp2": 3, "hsdp": 2}[parallel]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, whole: the files of shards differ in the order of their headers."""
    plain = {p.name: load_file(p) for p in checkpoint.rglob("*.safetensors") if "shard" not in p.name}
    found = {f"{file}/{key}": value for file, tensors in plain.items() for key, value in tensors.items()}
    if is_sharded_folder(checkpoint):
        for kind in ("model", "optimizer"):
            found |= {f"{kind}/{key}": value for key, value in read_shards(checkpoint, kind).items()}
    return found


def test_other_ranks_go_on_with_the_next_sample(recipe: Path, one: Path, tmp_path: Path) -> None:
    """4 ranks, then 3, shared in each way: every row once, in the order of one process; its losses."""
    seen = tmp_path / "seen"
    stages = [("ddp", 4, 3), ("hsdp", 4, 6), ("fsdp2", 3, 9), ("ddp", 3, None)]
    for parallel, ranks, end in stages:
        prank = Prank(rank=ranks - 1, step=end, signal=signal.SIGUSR1) if end else None
        Ranks(
            recipe, ranks, "name=elastic", "train.micro_batch=3", parallel=parallel, record=seen, prank=prank
        ).expect(85 if end else 0)
    steps = recorded(seen)
    assert list(steps) == [ROWS * step for step in range(STEPS)]
    trainer = build_trainer(load_recipe(recipe, ["name=fresh"]), Console(quiet=True))
    rows = PackedRows(trainer.prepared.train, 64)
    assert len(rows) < STEPS * ROWS
    for samples, ids in steps.items():
        order = rows_of_samples(samples, ROWS, len(rows), seed=0)
        assert np.array_equal(ids, np.stack([rows[row]["input_ids"].numpy() for row in order]))
    assert_agree(one.parent / "elastic", one)


def test_shards_are_on_disk_with_their_folder(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names, too, before the checkpoint appears: a file on disk is lost if its folder is not."""
    aside = checkpoint.aside_of(recipe.parent / "named", 1)
    (aside / "trainer/shards").mkdir(parents=True)
    (aside / "config.json").touch()
    synced, fsync = [], checkpoint.fsync
    monkeypatch.setattr(checkpoint, "fsync", lambda path: (synced.append(path), fsync(path)))
    checkpoint.publish(recipe.parent / "named", 1, keep_last=1, keep_best=False)
    assert {aside, aside / "trainer", aside / "trainer/shards"} <= set(synced)


def test_the_optimiser_comes_back_on_other_ranks(recipe: Path, tmp_path: Path) -> None:
    """What DDP saved, bit for bit, on shards of 3 ranks; what those save, on other shards, and whole."""
    stop = Prank(rank=1, step=4, signal=signal.SIGTERM)
    Ranks(recipe, 2, "name=moving", prank=stop).expect(85)
    folder = recipe.parent / "runs/moving/checkpoints/step-00000004"
    saved = {f"model/{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    saved |= {f"optimizer/{k}": v for k, v in load_file(folder / "trainer/optimizer.safetensors").items()}
    assert sum(key.endswith("/exp_avg_sq") for key in saved) == sum(key.startswith("model/") for key in saved)
    assert_holds(recipe, "fsdp2", 3, saved, tmp_path / "three")
    Ranks(
        recipe, 3, "name=moving", parallel="fsdp2", prank=Prank(rank=0, step=6, signal=signal.SIGTERM)
    ).expect(85)
    assert not (recipe.parent / "runs/moving/checkpoints/step-00000006/model.safetensors").exists()
    Ranks(recipe, 3, "name=moving", parallel="fsdp2", action=str(tmp_path / "sharded")).expect()
    for parallel, ranks in (("fsdp2", 2), ("hsdp", 4), ("ddp", 1)):
        held = load_file(tmp_path / "sharded")
        assert_holds(recipe, parallel, ranks, held, tmp_path / f"{parallel}{ranks}")


def assert_holds(recipe: Path, parallel: str, ranks: int, tensors: dict, path: Path) -> None:
    Ranks(recipe, ranks, "name=moving", parallel=parallel, action=str(path)).expect()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("parallel", "ranks", "words"),
    [("fsdp2", 4, "train.shard_size 3 does not divide 4 ranks"), ("ddp", 3, "set train.parallel=fsdp2")],
)
def test_copies_that_ranks_cannot_hold(recipe: Path, parallel: str, ranks: int, words: str) -> None:
    made = load_recipe(recipe, ["train.shard_size=3", "train.tokens_per_step=768"])
    made.check_ranks(1, "ddp")
    made.check_ranks(6, "fsdp2")
    with pytest.raises(ValueError, match=words):
        made.check_ranks(ranks, parallel)
    said = Ranks(recipe, ranks, "train.shard_size=3", "name=refused", parallel=parallel).expect(2)
    assert said.count("lrnn: ") == said.count(words) == 1
    assert not (recipe.parent / "runs/refused").exists()


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_the_first_rank_scores_the_model(recipe: Path, parallel: str) -> None:
    short = (
        f"name=scored-{parallel}",
        "train.tokens=1536",
        "eval.tasks=[heldout_bits_per_byte]",
        "eval.limit=4",
    )
    Ranks(recipe, 2, *short, parallel=parallel).expect()
    run = recipe.parent / f"runs/scored-{parallel}"
    assert list((run / "eval").glob("*.json"))
    assert (run / "README.md").exists()


@pytest.fixture(scope="module")
def stopped(recipe: Path) -> Callable[[str], Path]:
    """A function from a name to the last checkpoint of a run of that name: two ranks' shards, at step 3."""
    stop = Prank(rank=0, step=3, signal=signal.SIGTERM)
    Ranks(recipe, 2, "name=stopped", parallel="fsdp2", prank=stop).expect(85)
    runs = recipe.parent / "runs"
    copy = lambda name: shutil.copytree(runs / "stopped", runs / name, symlinks=True)  # noqa: E731
    return lambda name: copy(name) / "checkpoints/latest"


def test_a_sharded_checkpoint_is_exported(
    recipe: Path, stopped: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are those that one process would load from it; before that, scoring says what to do."""
    from transformers import AutoModelForCausalLM

    folder = stopped("exported")
    main_exits(2, "generate", folder, "--prompt", "the")
    assert f"first: lrnn export {folder} DIR" in capsys.readouterr().err
    main_exits(0, "export", folder, tmp_path / "plain")
    Ranks(recipe, 1, "name=exported", action=str(tmp_path / "held")).expect()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    held = load_file(tmp_path / "held")
    assert all(torch.equal(p, held[f"model/{name}"]) for name, p in model.named_parameters())
    shard = next((folder / "trainer/shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    main_exits(2, "export", folder, tmp_path / "again")
    assert f"{shard.name} is not as its checksum says" in capsys.readouterr().err


def test_a_budget_lowered_to_where_a_sharded_run_was_stopped(
    recipe: Path, stopped: Callable[[str], Path]
) -> None:
    """Its end has the weights as one file; whatever a kill on the way leaves, the checkpoint is whole."""
    from transformers import AutoModelForCausalLM

    folder = stopped("lowered").resolve()
    assert not (folder / "model.safetensors").exists()
    lowered = (f"train.tokens={3 * ROWS * 64}", "name=lowered")
    for name in (".model.safetensors.tmp", "model.safetensors", ".manifest.json.tmp"):
        (folder / name).write_bytes(b"torn")  # by kills: only what the manifest names counts
    assert checkpoint.newest_valid(folder.parent, pytest.fail) == folder
    said = Ranks(recipe, 2, *lowered, parallel="fsdp2").expect()
    assert "was trained already: 3 steps" in said
    assert checkpoint.verify(folder) is None
    assert not list(folder.rglob(".*"))
    model, shards = AutoModelForCausalLM.from_pretrained(folder), read_shards(folder)
    assert all(torch.equal(p, shards[name]) for name, p in model.named_parameters())
    before = (folder / "model.safetensors").stat()
    Ranks(recipe, 2, *lowered, parallel="fsdp2").expect()
    assert (folder / "model.safetensors").stat() == before


@pytest.fixture(scope="module")
def plain(recipe: Path) -> Callable[..., Path]:
    """A function to a run of two ranks, 4 steps, whose layers are looked at every 2; each is run once."""

    @cache
    def run(parallel: str, *overrides: str) -> Path:
        name = "-".join(["looks", parallel, *overrides]).replace("=", "-")
        short = ("train.tokens=3072", "train.micro_batch=3", "eval.tokens=64", "train.inspect_every=2")
        Ranks(recipe, 2, f"name={name}", *overrides, *short, parallel=parallel).expect()
        return recipe.parent / "runs" / name

    return run


def test_metrics_of_layers(plain: Callable[..., Path]) -> None:
    """The same under DDP and FSDP2."""
    looks = {}
    for parallel in ("ddp", "fsdp2"):
        looks[parallel] = [line for line in metrics(plain(parallel)) if "state_norm" in line]
        assert [line["step"] for line in looks[parallel]] == [2, 4]
        assert all(len(line["state_norm"]) == len(line["gate_saturation"]) == 2 for line in looks[parallel])
        assert all(value > 0 for line in looks[parallel] for value in line["state_norm"])
    for ddp, fsdp2 in zip(*looks.values(), strict=True):
        assert ddp["state_norm"] == pytest.approx(fsdp2["state_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("parallel", "switch"),
    [
        ("ddp", "activation_checkpointing"),
        ("fsdp2", "activation_checkpointing"),
        pytest.param("ddp", "compile", marks=pytest.mark.slow),
        pytest.param("fsdp2", "compile", marks=pytest.mark.slow),
    ],
)
def test_recomputed_and_compiled_layers_train_alike(
    plain: Callable[..., Path], parallel: str, switch: str
) -> None:
    runs = plain(parallel), plain(parallel, f"train.{switch}=true")
    found = [[loss for _, loss in losses(run)] for run in runs]
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-5)


MODELS = {
    "h_lru": ("model.mixer={type: h_lru, num_blocks: 9, order: 3}",),
    "attention": ("model.mixer={type: attention, num_heads: 2}",),
    "lstm": ("model.mixer={type: lstm, width: 20}",),
    # Muon beside it: shards of one weight whose planes differ in height
    "mamba2": ("model.mixer={type: mamba2, head_dim: 8, state_size: 4}", "optim.name=muon"),
    "tied-hybrid": (
        "model.layer_pattern=[{type: h_lru, num_blocks: 9, order: 3}, {type: attention, num_heads: 2}]",
        "model.tie_word_embeddings=true",
    ),
    "muon": ("optim.name=muon",),
    "reconstruction": ("data.source={type: synthetic, task: compression}",),
}
ALONE = ("h_lru", "attention", "lstm", "mamba2")


@pytest.mark.parametrize(
    "model",
    [pytest.param(model, marks=[pytest.mark.slow] if model in ALONE else []) for model in MODELS],
)
def test_every_kind_of_model_is_sharded(recipe: Path, model: str) -> None:
    """Two steps on two ranks, saved, and two more, against one process."""
    short = (*MODELS[model], "train.micro_batch=3", "train.tokens=3072", "eval.tokens=64")
    stop = Prank(rank=1, step=2, signal=signal.SIGTERM)
    Ranks(recipe, 2, f"name=shards-{model}", *short, parallel="fsdp2", prank=stop).expect(85)
    Ranks(recipe, 2, f"name=shards-{model}", *short, parallel="fsdp2").expect()
    trainer = build_trainer(load_recipe(recipe, [f"name=whole-{model}", *short]), Console(quiet=True))
    trainer.run()
    found = [loss for _, loss in losses(recipe.parent / f"runs/shards-{model}")]
    assert found == pytest.approx([loss for _, loss in losses(trainer.folder)], rel=1e-5)
    last = "checkpoints/step-00000004/model.safetensors"
    ours, theirs = (load_file(recipe.parent / f"runs/{kind}-{model}" / last) for kind in ("shards", "whole"))
    assert ours.keys() == theirs.keys()
