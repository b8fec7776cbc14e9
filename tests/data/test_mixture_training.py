"""A mixture through the trainer: what it reads, says and saves; resuming; mistakes from the command line."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from corpora import make_texts, write_jsonl
from rank_runs import Ranks, recorded
from rich.console import Console
from safetensors.torch import load_file
from test_token_files import flat, megatron
from tiny_run import ROOT, fingerprint, metrics, write_recipe

from lrnn_lm.cli import main
from lrnn_lm.data import TrainLoader, validation_batches
from lrnn_lm.data.encode import Encoder
from lrnn_lm.data.mixture import Mixture, MixtureStage
from lrnn_lm.data.tokenize import read_facts
from lrnn_lm.recipe import load_recipe
from lrnn_lm.train.build import build_trainer, prepare_data
from lrnn_lm.train.sources import describe_data, notes, rows_read

WEB, CODE, NEWS = make_texts(70, seed=1), [t.upper() for t in make_texts(40, seed=2)], make_texts(30, seed=3)
EVAL = "eval.every=100 steps"
STAGES = [
    {"tokens": 3072, "weights": {"web": 0.6, "code": 0.4}},
    {"tokens": 3072, "weights": {"news": 0.5, "web": 0.5}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources and a staged recipe of 12 steps of 8 rows."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, texts in (("web", WEB), ("code", CODE), ("news", NEWS), ("valid", make_texts(9, seed=4))):
        write_jsonl(folder / f"{name}.jsonl", texts)
    saves = {"keep_last": 3, "every": "4 steps"}
    path = write_recipe(folder, eval={"every": "6 steps", "tokens": 1536}, checkpoint=saves)
    recipe = yaml.safe_load(path.read_text())
    del recipe["data"]["source"]
    recipe["data"] |= {
        "sources": [
            {"type": "jsonl", "path": str(folder / "web.jsonl"), "weight": 0.6},
            {"type": "jsonl", "path": str(folder / "code.jsonl"), "weight": 0.4, "validation_fraction": 0.2},
            {"type": "jsonl", "path": str(folder / "news.jsonl"),
             "validation_source": {"type": "jsonl", "path": str(folder / "valid.jsonl")}},
        ],
        "stages": STAGES,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    return folder


def build(folder: Path, runs: Path, *overrides: str):
    recipe = load_recipe(folder / "tiny.yaml", [f"train.runs_dir={runs}", *overrides])
    return build_trainer(recipe, Console(quiet=True))


@pytest.fixture(scope="module")
def straight(folder: Path):
    """The trainer of an undisturbed run."""
    trainer = build(folder, folder / "runs")
    trainer.run()
    return trainer


def test_validation_of_each_source_and_of_all(straight) -> None:
    """By hand: nats and bytes of what each source gives; the whole is over their sum."""
    line = [line for line in metrics(straight.folder) if "validation_loss" in line][-1]
    nats = targets = size = 0
    for name, part in straight.prepared.parts.items():
        own = [0.0, 0]
        for batch in validation_batches(part.validation, 64, 8, 1536 // 3):
            own[0] += straight.forward(batch, 1.0, return_logits=False).loss.item()
            own[1] += int((batch["labels"] != -100).sum())
        read = straight.validator._bytes[name]
        assert 0 < read < part.validation.num_bytes or part.validation.num_tokens <= 513
        assert line[f"validation_loss/{name}"] == pytest.approx(own[0] / own[1], rel=1e-6)
        assert line[f"bits_per_byte/{name}"] == pytest.approx(own[0] / math.log(2) / read, rel=1e-6)
        nats, targets, size = nats + own[0], targets + own[1], size + read
    assert line["validation_loss"] == pytest.approx(nats / targets, rel=1e-6)
    assert line["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_what_the_run_keeps_and_reports(straight, folder: Path, capsys: pytest.CaptureFixture) -> None:
    held = [json.loads(line) for line in (straight.folder / "heldout.jsonl").read_text().splitlines()]
    assert {line["source"] for line in held[:3]} == {"code", "news", "web"}, "in turns"
    assert {line["text"] for line in held if line["source"] == "news"} == set(make_texts(9, seed=4))
    assert not {line["text"] for line in held} & set(NEWS)
    facts = json.loads((straight.folder / "data.json").read_text())
    assert set(facts["sources"]) == {"code", "news", "web"}
    for command in (["report", str(straight.folder)], ["info", str(folder / "tiny.yaml")],
                    ["prepare", str(folder / "tiny.yaml")]):  # fmt: skip
        assert exit_code(*command) == 0
    said = capsys.readouterr().out
    line = [line for line in metrics(straight.folder) if "validation_loss" in line][-1]
    assert f"{line['bits_per_byte/news']:.4f}" in said, "the report"
    assert "25.0%" in said, "info: news has half of half the budget"
    assert "news, read by the run: 24 rows" in said
    from lrnn_lm.evaluate.reporting.card import write_run_card

    card = write_run_card(straight.folder).read_text()
    assert f"| {straight.recipe.name} | web | {line['validation_loss/web']:.4f} |" in card


def test_resumed_within_a_stage_is_the_same(straight, folder: Path, tmp_path: Path) -> None:
    """From the checkpoint at step 4, two steps before the second stage."""
    run = shutil.copytree(straight.folder, tmp_path / "tiny", symlinks=True)
    for step in (8, 12):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
    trainer = build(folder, tmp_path, "data.num_workers=1")
    assert trainer.position.step == 4
    assert fingerprint(trainer.run()) == fingerprint(straight.checkpoints / "step-00000012")


def test_two_ranks_read_the_same_ids(straight, folder: Path, tmp_path: Path) -> None:
    stages = "[{tokens: 3072, weights: {web: 0.6, code: 0.4}}, {weights: {news: 1, web: 1}}]"
    Ranks(
        folder / "tiny.yaml", 2, f"train.runs_dir={tmp_path}", "train.tokens=4096", f"data.stages={stages}",
        record=tmp_path / "ids",
    ).expect()  # fmt: skip
    shards = [part.train for part in straight.prepared.parts.values()]
    mixed = Mixture([MixtureStage(48, (0.4, 0.0, 0.6)), MixtureStage(None, (0.0, 1.0, 1.0))])
    loader = iter(TrainLoader(shards, 64, 0, 8, 8, mixture=mixed))
    for rows in recorded(tmp_path / "ids").values():
        assert np.array_equal(rows, next(loader)[0]["input_ids"].numpy())


def test_rows_in_order_of_a_mixture(folder: Path, tmp_path: Path) -> None:
    """Each lane reads stretches of one source; the sources have their shares of them, stage by stage."""
    options = ("data.rows_in_order=2", "checkpoint.every=3 steps", "checkpoint.keep_last=9", EVAL)
    trainer = build(folder, tmp_path, *options)
    loader = trainer.rows.loader
    R, C = loader.rows_per_step, 2
    numbers = loader.row_numbers(0, 12 * R).reshape(6, C, R)
    ends = np.cumsum([rows.num_rows for rows in loader.rows])
    sources = np.searchsorted(ends, numbers, side="right")
    assert (numbers[:, 1] == numbers[:, 0] + 1).all()
    assert (sources[:, 0] == sources[:, 1]).all()
    assert ((numbers[:, 0] - np.array([0, *ends])[sources[:, 0]]) % C == 0).all()
    for steps in (1, 2, 5, 12):
        read = np.bincount(sources.reshape(-1, R)[:steps].flatten(), minlength=3)
        assert rows_read(trainer.recipe, steps) == read.tolist()
    assert len({*sources.flatten()}) > 1
    part = loader.row_numbers(3 * R + 2, 4)
    assert part.tolist() == numbers.reshape(-1, R)[3, 2:6].tolist()
    trainer.run()
    whole = fingerprint(trainer.checkpoints / "step-00000012")
    for step in (6, 9, 12):
        shutil.rmtree(trainer.checkpoints / f"step-{step:08d}")
    resumed = build(folder, tmp_path, *options)
    assert resumed.position.step == 3, "within a stretch"
    assert fingerprint(resumed.run()) == whole


def test_the_order_in_the_recipe_does_not_matter(folder: Path) -> None:
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    recipe["data"]["sources"].reverse()
    (folder / "other.yaml").write_text(yaml.safe_dump(recipe))
    one, other = (load_recipe(folder / f"{name}.yaml", ["name=x"]) for name in ("tiny", "other"))
    assert one == other
    mine, yours = (prepare_data(r, progress=False).manifest for r in (one, other))
    assert mine == yours


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return done.value.code or 0


MISTAKES = [
    (["train.tokens=2M", "data.stages=[]"],
     r"news has \d+ rows of 64 tokens, .* reads 15,6.*where max_epochs is 2, and 2 more"),
    (["data.stages=[{tokens: 1K}, {tokens: 1K}]"], "data.stages take 2K tokens and train.tokens is 6144"),
    (["data.stages=[{weights: {wob: 1}}]"], "no source is named 'wob'; did you mean 'web'?"),
    (["data.stages=[{weights: {web: 0}}]"], "the weights of all sources are 0"),
    (["data.stages=[{weights: {web: -1}}]"], "greater than or equal to 0"),
    (["data.sources=[{path: FOLDER/web.jsonl, type: jsonl}, {path: FOLDER/web.jsonl, type: jsonl, name: b}]",
      "data.stages=[]"], "'b' and 'web' both read"),
    (["data.sources=[{path: FOLDER/web.jsonl, type: jsonl}, {path: FOLDER/*.jsonl, type: jsonl, name: b}]",
      "data.stages=[]"], "web.jsonl is in two sources"),
    (["data.sources=[{path: FOLDER/web.jsonl, type: jsonl, name: a}, "
      "{path: FOLDER/news.jsonl, type: jsonl, name: a}]", "data.stages=[]"], "'a' is listed twice"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), MISTAKES)
def test_mistakes(folder: Path, tmp_path: Path, capsys, overrides: list[str], said: str) -> None:
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    for source in recipe["data"]["sources"]:
        source["max_epochs"] = 2
    (folder / "limited.yaml").write_text(yaml.safe_dump(recipe))
    overrides = [text.replace("FOLDER", str(folder)) for text in overrides]
    prepare_data(load_recipe(folder / "tiny.yaml"), progress=False)  # or this may be the first test that does
    assert exit_code("train", str(folder / "limited.yaml"), f"train.runs_dir={tmp_path}", *overrides) == 2
    errors = capsys.readouterr().err.strip()
    assert re.search(said, errors), errors
    assert len(errors.splitlines()) <= 2
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_what_fits_is_told(folder: Path, tmp_path: Path, capsys) -> None:
    """The largest budget that the message names trains, and one step more does not."""
    limits = ["data.stages=[]", "data.sources=" + json.dumps(
        [{"type": "jsonl", "path": str(folder / "web.jsonl"), "weight": 3},
         {"type": "jsonl", "path": str(folder / "code.jsonl"), "max_epochs": 0.5}])]  # fmt: skip
    command = ["prepare", str(folder / "tiny.yaml"), *limits]
    assert exit_code(*command, "train.tokens=10M") == 2
    tokens = int(capsys.readouterr().err.split("train.tokens=")[1].split()[0].rstrip("."))
    assert exit_code(*command, f"train.tokens={tokens}") == 0
    assert exit_code(*command, f"train.tokens={tokens + 512}") == 2
    capsys.readouterr()
    assert exit_code(*(word.replace("0.5", "0.0001") for word in command)) == 2
    assert capsys.readouterr().err.endswith(
        ": raise max_epochs, or lower the weight\n"
    )  # no budget is enough


@pytest.mark.parametrize("in_order", [None, 5, 12])
def test_no_row_is_read_more_often_than_max_epochs(
    folder: Path, tmp_path: Path, capsys, in_order: int | None
) -> None:
    """With the largest budget that is allowed, whatever rows are left out as their stretch is not whole."""
    sources = [{"type": "jsonl", "path": str(folder / "web.jsonl"), "max_epochs": 2}]
    options = [
        f"data.rows_in_order={json.dumps(in_order)}",
        "data.stages=[]",
        f"data.sources={json.dumps(sources)}",
    ]
    assert exit_code("prepare", str(folder / "tiny.yaml"), *options, "train.tokens=10M") == 2
    tokens = int(capsys.readouterr().err.split("train.tokens=")[1].split()[0].rstrip("."))
    trainer = build(folder, tmp_path, *options, f"train.tokens={tokens}")
    read = trainer.rows.loader.row_numbers(0, trainer.recipe.total_steps * 8)
    assert np.bincount(read).max() <= 2


def test_what_was_read_is_fixed_and_later_stages_are_not(straight, folder: Path, tmp_path: Path) -> None:
    """A run of 12 steps goes on with another mixture; rows and each source's place stay."""
    shutil.copytree(straight.folder, tmp_path / "tiny", symlinks=True)
    later = [*STAGES, {"weights": {"news": 1.0}}]

    def again(stages: list, *overrides: str):
        return build(folder, tmp_path, f"data.stages={json.dumps(stages)}", *overrides)

    with pytest.raises(ValueError, match=r"data\.stages: was .*0\.6.*, is .*0\.7"):
        again([{"tokens": 3072, "weights": {"web": 0.7, "code": 0.4}}, STAGES[1]])
    trainer = again(later, "train.tokens=7168")
    assert trainer.position.step == 12
    step = next(iter(trainer.rows.loader))[0]["input_ids"]
    news = trainer.prepared.parts["news"].train
    alone = TrainLoader(news, 64, 0, 8, 8, position=24)  # half of the second stage's 48 rows
    assert np.array_equal(step.numpy(), next(iter(alone))[0]["input_ids"].numpy())


def test_a_branch_cools_down_on_another_mixture(straight, folder: Path, tmp_path: Path) -> None:
    """From step 8 of 12, within the second stage: that one ends there, another follows."""
    stages = [STAGES[0], STAGES[1] | {"tokens": 1024}, {"weights": {"news": 1.0}}]
    recipe = load_recipe(
        folder / "tiny.yaml",
        ["name=branch", f"train.runs_dir={tmp_path}", f"data.stages={json.dumps(stages)}", "optim.lr=1e-3"],
    )
    parent = straight.checkpoints / "step-00000008"
    trainer = build_trainer(recipe, Console(quiet=True), from_checkpoint=parent)
    assert trainer.position.step == 8
    step = next(iter(trainer.rows.loader))[0]["input_ids"]
    alone = TrainLoader(trainer.prepared.parts["news"].train, 64, 0, 8, 8, position=8)
    assert np.array_equal(step.numpy(), next(iter(alone))[0]["input_ids"].numpy())


def test_max_epochs_may_change(straight, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(straight.folder, tmp_path / "tiny", symlinks=True)
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    recipe["data"]["sources"][0]["max_epochs"] = 3
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(tmp_path / "r.yaml", [f"train.runs_dir={tmp_path}"])
    assert build_trainer(loaded, Console(quiet=True)).finished


def test_text_and_token_files_together(straight, folder: Path, tmp_path: Path) -> None:
    """A ready tokenizer; jsonl, Megatron and flat arrays in one run."""
    tokenizer = straight.prepared.tokenizer_dir
    encoder = Encoder(tokenizer, read_facts(tokenizer))
    code, news = ([encoder(text)[1:-1].tolist() for text in texts] for texts in (CODE, NEWS))
    sources = [
        {"type": "jsonl", "path": str(folder / "web.jsonl"), "weight": 2},
        {"type": "megatron", "path": str(megatron(tmp_path / "code", code)), "validation_fraction": 0.2},
        {"type": "tokens", "path": str(flat(tmp_path / "news.npy", news)), "validation_fraction": 0.2},
    ]
    trainer = build(
        folder, tmp_path / "runs", f"data.sources={json.dumps(sources)}", "data.stages=[]",
        f"data.tokenizer={tokenizer}", "train.tokens=1024",
    )  # fmt: skip
    trainer.run()
    (line,) = [line for line in metrics(trainer.folder) if "validation_loss" in line]
    assert {"bits_per_byte/web", "bits_per_byte/code", "bits_per_byte/news", "bits_per_byte"} <= line.keys()
    held = [json.loads(text) for text in (trainer.folder / "heldout.jsonl").read_text().splitlines()]
    assert {entry["text"] for entry in held if entry["source"] == "code"} < set(CODE)


def test_short_documents_of_each_source_are_left_out_and_told(straight, folder: Path) -> None:
    """In `lrnn prepare` and where a run starts; rows are then a function of what is left."""
    recipe = load_recipe(folder / "tiny.yaml", ["data.min_document=200"])
    prepared = prepare_data(recipe, progress=False)
    told = [line for line in describe_data(recipe, prepared) if "fewer than 200 tokens" in line]
    assert told == notes(prepared)
    assert [line.split(":")[0] for line in told] == ["code", "news", "web"]
    for name, part in prepared.parts.items():
        whole, short = straight.prepared.parts[name].train, part.manifest["splits"]["train"]["short"]
        assert part.train.num_documents == whole.num_documents - short["num_documents"]
        ends = [*part.train.document_starts(0, part.train.num_tokens)[1:], part.train.num_tokens]
        assert np.diff([0, *ends]).min() >= 202
        assert part.validation.num_tokens == straight.prepared.parts[name].validation.num_tokens
    assert sum(part.manifest["splits"]["train"]["short"]["num_documents"] for part in prepared.parts.values())


def test_the_staged_run_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in docs/recipes.md, but shorter: two sources, then a third; a cool-down branch with averaging."""
    monkeypatch.chdir(ROOT)
    sources = load_recipe("recipes/staged.yaml").data.model_dump(mode="json")["sources"]
    small = [
        f"data.sources={json.dumps([source | {'limit': 15, 'max_epochs': None} for source in sources])}",
        "data.stages=[{tokens: 4K, weights: {manual: 0.6, code: 0.4}}, "
        "{weights: {manual: 0.4, code: 0.2, pages: 0.4}}]",
        "model.vocab_size=400", "model.hidden_size=32", "model.num_hidden_layers=1",
        "model.mixer.num_blocks=8", "model.intermediate_size=32", "data.sequence_length=50",
        "train.tokens=6K", "train.tokens_per_step=500", "checkpoint.every=5 steps", "eval.every=2 steps",
        "eval.tokens=600", "eval.tasks=[]", f"data.cache_dir={tmp_path}", f"train.runs_dir={tmp_path}",
    ]  # fmt: skip
    assert exit_code("train", "recipes/staged.yaml", *small) == 0
    lines = metrics(tmp_path / "staged")
    validated = [line["step"] for line in lines if "validation_loss/pages" in line]
    assert validated == [2, 4, 6, 8, 10, 12], "its third source too, from the start"
    rates = [line["lr"] for line in lines if "lr" in line]
    assert len(rates) == 12
    assert set(rates[2:]) == {max(rates)}
    parent = str(tmp_path / "staged/checkpoints/step-00000010")
    assert exit_code("train", "recipes/cooldown.yaml", "--from", parent, *small, "optim.decay=2 steps") == 0
    branch = tmp_path / "cooldown"
    lines = [line for line in metrics(branch) if "lr" in line]
    assert [line["step"] for line in lines] == [11, 12]
    assert max(rates) > lines[0]["lr"] > lines[1]["lr"]
    assert "average_bits_per_byte/pages" in metrics(branch)[-1]
    assert json.loads((branch / "parent.json").read_text())["checkpoint"] == parent
    assert "| branch of | step 10 of staged (recipe `" in (branch / "README.md").read_text()
    weights, average = (
        load_file(branch / folder / "model.safetensors") for folder in ("checkpoints/latest", "average")
    )
    assert weights.keys() == average.keys()
    assert not torch.equal(weights["model.norm.weight"], average["model.norm.weight"])
