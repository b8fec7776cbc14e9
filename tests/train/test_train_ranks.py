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

STEPS, ROWS = 8, 12
SHORT = 4  # steps of most runs
LAST = f"checkpoints/step-{SHORT:08d}"
RECOMPUTED = "train.activation_checkpointing=true"
# How the model is shared (hsdp: two ranks hold a copy): ranks, rows of a micro-batch, options. A rank takes
# 3 + 1, 4 + 2 and 3 of the 12 rows of a step.
LAYOUTS = {
    "ddp": (3, 3, (RECOMPUTED,)),
    "fsdp2": (2, 4, ("eval.tasks=[heldout_bits_per_byte]", "eval.limit=4")),
    "hsdp": (4, 3, ("optim.name=muon", RECOMPUTED)),
}
MORE_LAYOUTS = [
    ("ddp", 1, 3), ("ddp", 1, 6), ("ddp", 2, 3), ("ddp", 2, 4), ("ddp", 4, 1), ("ddp", 4, 2), ("fsdp2", 2, 3),
    ("fsdp2", 2, 6), ("fsdp2", 4, 1), ("hsdp", 4, 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows a step: they split over 1, 2, 3 and 4 ranks. Little text, so that runs reach a second epoch.

    A constant rate, so that a run of fewer steps is the beginning of a longer one.
    """
    return write_recipe(
        tmp_path_factory.mktemp("ranks"),
        documents=25,
        train={"tokens": STEPS * ROWS * 64, "tokens_per_step": ROWS * 64, "micro_batch": 12,
               "inspect_every": 2},
        checkpoint={"every": "2 steps", "keep_last": 9},
        eval={"every": "2 steps"},
        optim={"lr": 0.003, "schedule": "constant", "warmup": "2 steps"},
    )  # fmt: skip


def short(steps: int = SHORT) -> str:
    return f"train.tokens={steps * ROWS * 64}"


@pytest.fixture(scope="module")
def one(recipe: Path) -> Callable[..., Path]:
    """A function to the run of one process, whole steps at once, with these options; each is run once."""

    @cache
    def run(*options: str) -> Path:
        name = "-".join(["one", *options]).replace("=", "-")
        trainer = build_trainer(load_recipe(recipe, [f"name={name}", *options]), Console(quiet=True))
        trainer.run()
        return trainer.folder

    return run


@pytest.fixture(scope="module")
def shared(recipe: Path) -> Callable[[str], Path]:
    """A function from a layout to its run of 4 steps; each is run once."""

    @cache
    def run(parallel: str) -> Path:
        ranks, rows, options = LAYOUTS[parallel]
        sizes = (f"train.micro_batch={rows}", short())
        Ranks(recipe, ranks, f"name={parallel}", *sizes, *options, parallel=parallel).expect()
        return recipe.parent / "runs" / parallel

    return run


@pytest.fixture(scope="module")
def halfway(recipe: Path, shared: Callable[[str], Path]) -> Callable[[str, str], Path]:
    """A function to a copy of a layout's run, by a new name, as it was at step 2."""

    def copy(parallel: str, name: str) -> Path:
        run = Path(shutil.copytree(shared(parallel), recipe.parent / "runs" / name, symlinks=True))
        shutil.rmtree(run / LAST)
        return run

    return copy


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_layouts_agree(one: Callable[..., Path], shared: Callable[[str], Path], parallel: str) -> None:
    """Each with micro-batches, DDP and HSDP with layers that are recomputed."""
    options = [option for option in LAYOUTS[parallel][2] if option.startswith("optim.")]
    assert_agree(shared(parallel), one(*options, *([short()] if options else [])))


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE_LAYOUTS, ids=lambda layout: "{}-{}x{}".format(*layout))
def test_more_layouts_agree(recipe: Path, one: Callable[..., Path], layout: tuple[str, int, int]) -> None:
    parallel, ranks, rows = layout
    name = f"{parallel}-{ranks}x{rows}"
    Ranks(recipe, ranks, f"name={name}", f"train.micro_batch={rows}", parallel=parallel).expect()
    assert_agree(recipe.parent / "runs" / name, one())


def assert_agree(run: Path, one: Path) -> None:
    """The same losses, to 1e-5 relative, gradient norms and weights, of as many steps as `run` has."""
    steps = losses(run)[-1][0]
    for read in (losses, validations):
        expected = [(step, pytest.approx(loss, rel=1e-5)) for step, loss in read(one) if step <= steps]
        assert read(run) == expected != []
    norms = [[line["grad_norm"] for line in metrics(r) if "grad_norm" in line][:steps] for r in (run, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    last = f"checkpoints/step-{steps:08d}"
    ours, theirs = weights(one / last), weights(run / last)
    assert float((ours - theirs).norm() / ours.norm()) < 1e-4


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_resumed_is_straight_through_bit_for_bit(
    recipe: Path, shared: Callable[[str], Path], halfway: Callable[[str, str], Path], parallel: str
) -> None:
    """From step 2 on. Three ranks of DDP round by the layout of its buckets."""
    straight, parts = shared(parallel), halfway(parallel, f"parts-{parallel}")
    ranks, rows, options = LAYOUTS[parallel]
    sizes = (f"train.micro_batch={rows}", short(), *options, "eval.tasks=[]")
    said = Ranks(recipe, ranks, *sizes, f"name={parts.name}", parallel=parallel).expect()
    assert "resuming from step 2" in said
    assert losses(parts) == losses(straight)
    assert validations(parts) == validations(straight)
    ends = [tensors_of(run / LAST) for run in (straight, parts)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    if parallel != "ddp":  # each shard is stored once, also where several ranks hold it
        shards = straight / LAST / "trainer/shards"
        stored = HuggingFaceStorageReader(str(shards)).read_metadata().state_dict_metadata
        assert len(stored["model/lm_head.weight"].chunks) == 2


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, whole: the files of shards differ in the order of their headers."""
    found = {}
    for path in (checkpoint / "trainer").glob("rng-*.safetensors"):
        found |= {f"{path.name}/{key}": value for key, value in load_file(path).items()}
    return found | trained(checkpoint)


def trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer of a checkpoint, by `model/NAME` and `optimizer/NAME/KEY`."""
    if is_sharded_folder(checkpoint):
        parts = {kind: read_shards(checkpoint, kind) for kind in ("model", "optimizer")}
    else:
        parts = {"model": load_file(checkpoint / "model.safetensors"),
                 "optimizer": load_file(checkpoint / "trainer/optimizer.safetensors")}  # fmt: skip
    return {f"{kind}/{key}": value for kind, held in parts.items() for key, value in held.items()}


def test_other_ranks_go_on(recipe: Path, one: Callable[..., Path], tmp_path: Path) -> None:
    """2 ranks, then 3, 4 and 1, shared in each way: weights and optimizer come back bit for bit; every row
    is read once, in the order of one process; its losses."""
    seen, begin = tmp_path / "seen", 0
    stages = [("ddp", 2, 2), ("fsdp2", 3, 4), ("hsdp", 4, 6), ("ddp", 1, None)]
    for parallel, ranks, end in stages:
        prank = Prank(rank=ranks - 1, step=end, signal=signal.SIGUSR1) if end else None
        Ranks(
            recipe, ranks, "name=elastic", "train.micro_batch=3", parallel=parallel, record=seen, prank=prank
        ).expect(85 if end else 0)
        if begin:
            folder = recipe.parent / f"runs/elastic/checkpoints/step-{begin:08d}"
            assert (folder / "model.safetensors").exists() == (begin == 2)  # else shards alone
            saved, held = trained(folder), load_file(seen / f"held-{begin:08d}.safetensors")
            assert (
                sum(key.endswith("/exp_avg_sq") for key in saved) == len(saved) / 4
            )  # weights, step, moments
            assert held.keys() == saved.keys()
            assert all(torch.equal(held[key], saved[key]) for key in saved)
        begin = end
    steps = recorded(seen)
    assert list(steps) == [ROWS * step for step in range(STEPS)]
    trainer = build_trainer(load_recipe(recipe, ["name=fresh"]), Console(quiet=True))
    rows = PackedRows(trainer.prepared.train, 64)
    assert len(rows) < STEPS * ROWS
    for samples, ids in steps.items():
        order = rows_of_samples(samples, ROWS, len(rows), seed=0)
        assert np.array_equal(ids, np.stack([rows[row]["input_ids"].numpy() for row in order]))
    assert_agree(recipe.parent / "runs/elastic", one())


def test_shards_are_on_disk_with_their_folder(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names, too, before the checkpoint appears: a file on disk is lost if its folder is not."""
    aside = checkpoint.aside_of(recipe.parent / "named", 1)
    (aside / "trainer/shards").mkdir(parents=True)
    (aside / "config.json").touch()
    synced, fsync = [], checkpoint.fsync
    monkeypatch.setattr(checkpoint, "fsync", lambda path: (synced.append(path), fsync(path)))
    checkpoint.publish(recipe.parent / "named", 1, keep_last=1, keep_best=False)
    assert {aside, aside / "trainer", aside / "trainer/shards"} <= set(synced)


def test_copies_that_ranks_cannot_hold(recipe: Path) -> None:
    made = load_recipe(recipe, ["train.shard_size=3"])
    made.check_ranks(1, "ddp")
    made.check_ranks(6, "fsdp2")
    with pytest.raises(ValueError, match=r"set train\.parallel=fsdp2"):
        made.check_ranks(3, "ddp")
    said = Ranks(recipe, 2, "train.shard_size=3", "name=refused", parallel="fsdp2").expect(2)
    assert said.count("lrnn: ") == said.count("train.shard_size 3 does not divide 2 ranks") == 1
    assert not (recipe.parent / "runs/refused").exists()


def test_the_first_rank_scores_the_model(shared: Callable[[str], Path]) -> None:
    run = shared("fsdp2")
    assert list((run / "eval").glob("*.json"))
    assert (run / "README.md").exists()


def test_a_sharded_checkpoint_is_exported(
    recipe: Path, halfway: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are those that one process loads from it; before that, scoring says what to do."""
    from transformers import AutoModelForCausalLM

    folder = halfway("fsdp2", "exported") / "checkpoints/step-00000002"
    main_exits(2, "generate", folder, "--prompt", "the")
    assert f"first: lrnn export {folder} DIR" in capsys.readouterr().err
    main_exits(0, "export", folder, tmp_path / "plain")
    trainer = build_trainer(load_recipe(recipe, ["name=exported"]), Console(quiet=True))
    assert trainer.position.step == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    held = dict(trainer.bare_model.named_parameters())
    assert all(torch.equal(p, held[name]) for name, p in model.named_parameters())
    shard = next((folder / "trainer/shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    main_exits(2, "export", folder, tmp_path / "again")
    assert f"{shard.name} is not as its checksum says" in capsys.readouterr().err


def test_a_budget_lowered_to_where_a_sharded_run_was_stopped(
    recipe: Path, halfway: Callable[[str, str], Path]
) -> None:
    """Its end has the weights as one file; whatever a kill on the way leaves, the checkpoint is whole."""
    from transformers import AutoModelForCausalLM

    folder = halfway("fsdp2", "lowered") / "checkpoints/step-00000002"
    assert not (folder / "model.safetensors").exists()
    lowered = (short(2), "name=lowered")
    for name in (".model.safetensors.tmp", "model.safetensors", ".manifest.json.tmp"):
        (folder / name).write_bytes(b"torn")  # by kills: only what the manifest names counts
    assert checkpoint.newest_valid(folder.parent, pytest.fail) == folder
    said = Ranks(recipe, 2, *lowered, parallel="fsdp2").expect()
    assert "was trained already: 2 steps" in said
    assert checkpoint.verify(folder) is None
    assert not list(folder.rglob(".*"))
    model, shards = AutoModelForCausalLM.from_pretrained(folder), read_shards(folder)
    assert all(torch.equal(p, shards[name]) for name, p in model.named_parameters())
    before = (folder / "model.safetensors").stat()
    Ranks(recipe, 2, *lowered, parallel="fsdp2").expect()
    assert (folder / "model.safetensors").stat() == before


def test_metrics_of_layers(shared: Callable[[str], Path]) -> None:
    """The same under DDP and FSDP2."""
    looks = {}
    for parallel in ("ddp", "fsdp2"):
        looks[parallel] = [line for line in metrics(shared(parallel)) if "state_norm" in line]
        assert [line["step"] for line in looks[parallel]] == [2, 4]
        assert all(len(line["state_norm"]) == len(line["gate_saturation"]) == 2 for line in looks[parallel])
        assert all(value > 0 for line in looks[parallel] for value in line["state_norm"])
    for ddp, fsdp2 in zip(*looks.values(), strict=True):
        assert ddp["state_norm"] == pytest.approx(fsdp2["state_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_compiled_layers_train_alike(recipe: Path, one: Callable[..., Path], parallel: str) -> None:
    name = f"name=compiled-{parallel}"
    Ranks(recipe, 2, name, "train.compile=true", "train.micro_batch=3", short(), parallel=parallel).expect()
    found = losses(recipe.parent / "runs" / name.removeprefix("name="))
    assert found == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses(one())[:SHORT]]


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
MORE_MODELS = ("h_lru", "attention", "lstm", "mamba2", "muon")


@pytest.mark.parametrize(
    "model",
    [pytest.param(model, marks=[pytest.mark.slow] if model in MORE_MODELS else []) for model in MODELS],
)
def test_every_kind_of_model_is_sharded(recipe: Path, model: str) -> None:
    """A step on two ranks, saved, and one more, against one process. HSDP with Muon: `test_layouts_agree`."""
    options = (*MODELS[model], "train.micro_batch=3", short(2), "eval.tokens=64", "train.inspect_every=null")
    stop = Prank(rank=1, step=1, signal=signal.SIGTERM)
    Ranks(recipe, 2, f"name=shards-{model}", *options, parallel="fsdp2", prank=stop).expect(85)
    Ranks(recipe, 2, f"name=shards-{model}", *options, parallel="fsdp2").expect()
    trainer = build_trainer(load_recipe(recipe, [f"name=whole-{model}", *options]), Console(quiet=True))
    trainer.run()
    found = [loss for _, loss in losses(recipe.parent / f"runs/shards-{model}")]
    assert found == pytest.approx([loss for _, loss in losses(trainer.folder)], rel=1e-5)
    last = "checkpoints/step-00000002/model.safetensors"
    ours, theirs = (load_file(recipe.parent / f"runs/{kind}-{model}" / last) for kind in ("shards", "whole"))
    assert ours.keys() == theirs.keys()
