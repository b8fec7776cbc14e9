"""State, MAD and long-context tasks through lm-eval; a checkpoint trained on a task meets its own symbols."""

import json
import re
import shutil
from runpy import run_path

import numpy as np
import pytest
import torch
from rich.console import Console

from lrnn_lm.cli import main
from lrnn_lm.data import STATE_TASKS, SyntheticTask
from lrnn_lm.evaluate import evaluate
from lrnn_lm.evaluate.harness import flatten
from lrnn_lm.evaluate.tasks.names import own_tasks_path, read_suite
from lrnn_lm.evaluate.tasks.synthetic import check_answerable, run_source
from lrnn_lm.model import LRNNForReconstruction
from lrnn_lm.recipe import load_recipe
from lrnn_lm.runs.load import load_checkpoint
from lrnn_lm.train.build import build_trainer

LONG, SYNTHETIC = (run_path(str(own_tasks_path() / name / "functions.py")) for name in ("long", "synthetic"))
synthetic_dataset = SYNTHETIC["synthetic_dataset"]
needle_dataset, passkey_dataset = LONG["needle_dataset"], LONG["passkey_dataset"]


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    """A checkpoint that knows parity at length 8."""
    folder = tmp_path_factory.mktemp("parity")
    recipe = load_recipe("recipes/synthetic/parity.yaml", [
        "model.hidden_size=16", "model.intermediate_size=16", "train.tokens=20480",
        "train.tokens_per_step=1024",
        "train.micro_batch=128", "data.source.length=8", "optim.lr=2e-2", "model.mixer.gate=tanh",
        "data.source.validation_examples=64", "eval.every=20 steps", "train.device=cpu",
        f"train.runs_dir={folder}", f"data.cache_dir={folder / 'cache'}",
    ])  # fmt: skip
    return build_trainer(recipe, Console(quiet=True)).run()


def scores(results):
    return {(task, metric): value for task, metric, value, _ in flatten(results)}


def test_a_trained_checkpoint_is_asked_what_it_was_trained_for(parity, tmp_path):
    """The score is the share of rows whose last label the model, given the ids, has as its likeliest."""
    got = scores(evaluate(parity, ["state_parity"], limit=100, output=tmp_path, max_length=512, device="cpu"))
    lengths = (32, 64, 128, 256, 512)
    model, _ = load_checkpoint(parity, "cpu")
    for length in lengths:
        inputs, labels = SyntheticTask("parity", length).rows(0, "eval", np.arange(20))
        with torch.no_grad():
            logits = model(torch.from_numpy(inputs)).logits[:, -1]
        want = (logits.argmax(dim=-1) == torch.from_numpy(labels[:, -1])).float().mean()
        assert got["state_parity", f"acc_{length}"] == pytest.approx(float(want), abs=0.051)  # a tie at most
    assert got["state_parity", "acc"] == pytest.approx(
        np.mean([got["state_parity", f"acc_{length}"] for length in lengths])
    )


def test_rows_beyond_the_training_length_are_read_whole(parity, tmp_path):
    """Cut to the 8 steps that the run trained on, no question about 32 to 512 of them has an answer."""
    found = evaluate(parity, ["state_parity"], limit=10, output=tmp_path, device="cpu")
    assert found["settings"]["truncated_requests"] == 0
    assert found["settings"]["max_length"] == read_suite("state").max_length
    found = evaluate(parity, ["state_parity"], limit=2, lengths=[5000], output=tmp_path, device="cpu")
    assert found["settings"]["truncated_requests"] == 0


def test_any_language_model_can_be_asked(checkpoint, tmp_path):
    for names, options in (
        (["state_s5", "mad_memorisation"], {"lengths": [4]}),
        (["long_passkey"], {"lengths": [100], "max_length": 1024}),
    ):
        got = scores(evaluate(checkpoint, names, limit=4, output=tmp_path, device="cpu", **options))
        assert {task for task, _ in got} == set(names)


def test_what_was_learnt_goes_with_the_checkpoint(parity, tmp_path):
    """Out of its run it is asked with the same options and length; a stranger's data.json is not read."""
    moved = tmp_path / "a" / "b"
    shutil.copytree(parity, moved)
    (tmp_path / "data.json").write_text("[1]")
    want = {"task": "parity", "length": 8, "options": {"start": 0}}
    assert run_source(moved) == run_source(parity) == want
    config = json.loads((moved / "config.json").read_text())
    del config["synthetic_task"]
    (moved / "config.json").write_text(json.dumps(config))
    assert run_source(moved) == {}
    (moved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a JSON object"):
        run_source(moved)


def test_tasks_that_a_run_cannot_answer():
    check_answerable(["state_s3", "state_parity", "heldout_cloze"], "s3", {})
    with pytest.raises(ValueError, match="state_s5 has 120 symbols"):
        check_answerable(["state_s5"], "s3", {})
    with pytest.raises(ValueError, match="ends as 'autoencoder'"):
        check_answerable(["mad_compression"], "in_context_recall", {})


def test_rows_that_do_not_fit_are_not_scored(checkpoint, tmp_path):
    with pytest.raises(
        ValueError, match="rows of mad_selective_copying, long_passkey are longer than the 48 tokens"
    ):
        evaluate(checkpoint, ["mad_selective_copying", "long_passkey"], limit=4, device="cpu")


def test_suites_name_tasks_that_are_there():
    there = {path.stem for path in own_tasks_path().rglob("*.yaml")}
    for suite in ("state", "mad", "long", "offline"):
        assert set(read_suite(suite).tasks) <= there
    assert {f"state_{name}" for name in STATE_TASKS} == set(read_suite("state").tasks)
    assert len(read_suite("standard").tasks) == 11


def test_the_question_is_the_last_label():
    rows = synthetic_dataset("s3", lengths=[4, 8], examples=3)["test"]
    assert rows["length"][:4] == [4, 8, 4, 8] or list(rows["length"])[:4] == [4, 8, 4, 8]
    inputs, labels = SyntheticTask("s3", 4).rows(0, "eval", [0])
    assert rows[0]["context"] == " ".join(map(str, inputs[0]))
    assert rows[0]["answer"] == f" {labels[0, -1]}"
    recall = synthetic_dataset("in_context_recall", examples=1)["test"][0]
    assert len(recall["context"].split()) == 127


@pytest.mark.parametrize("make", [passkey_dataset, needle_dataset])
def test_long_texts(make):
    rows = list(make([200, 1000], examples=6)["test"])
    assert rows == list(make([200, 1000], examples=6)["test"])
    assert rows != list(make([200, 1000], examples=6, seed=1)["test"])
    for row in rows:
        assert 0.9 * row["length"] < len(row["context"].split()) <= row["length"]
        assert row["answer"].strip() in row["context"]
        assert row["answer"].strip().isdigit()
    places = [row["context"].index(row["answer"].strip()) / len(row["context"]) for row in rows[1::2]]
    assert places == sorted(places)
    with pytest.raises(ValueError, match="at least 100"):
        make([10])


def test_lengths_are_chosen_at_will(parity, tmp_path, capsys):
    """On the command line too; the file is named after them. What is no length is a plain message."""

    def evaluate(lengths: str) -> int:
        with pytest.raises(SystemExit) as left:
            main(["eval", str(parity), "--tasks", "state_parity", "--device", "cpu", "--limit", "6",
                  "--output", str(tmp_path), "--max-length", "100", "--lengths", lengths])  # fmt: skip
        return left.value.code or 0

    assert evaluate("5,11,70") == 0
    file = next(tmp_path.glob("*lengths5-11-70*.json"))
    scores = json.loads(file.read_text())["results"]["state_parity"]
    assert {key.split(",")[0] for key in scores if key.endswith(",none")} >= {"acc_5", "acc_11", "acc_70"}
    assert "acc_32,none" not in scores
    for wrong in ("5,x", "0", "1"):
        assert evaluate(wrong) == 2
        assert "length" in capsys.readouterr().err


@pytest.mark.usefixtures("few_tasks")
def test_a_checkpoint_of_a_smaller_task(parity, capsys):
    with pytest.raises(SystemExit) as left:
        main(["eval", str(parity), "--tasks", "state_s5", "--device", "cpu"])
    assert left.value.code == 2
    assert "task s5 has 120 symbols" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", str(parity), "--tasks", "state_s55"])
    assert "did you mean state_s5" in capsys.readouterr().err


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An auto-encoder that has begun to learn compression at length 8."""
    folder = tmp_path_factory.mktemp("compression")
    recipe = load_recipe("recipes/synthetic/compression.yaml", [
        "model.hidden_size=32", "model.intermediate_size=32", "train.tokens=40960",
        "train.tokens_per_step=1024", "data.source.length=8", "optim.lr=1e-2", "train.device=cpu",
        "data.source.validation_examples=400", "eval.every=40 steps", "train.log_every=1",
        f"train.runs_dir={folder}", f"data.cache_dir={folder / 'cache'}",
    ])  # fmt: skip
    return build_trainer(recipe, Console(quiet=True)).run()


def test_an_autoencoder_is_scored_on_held_out_rows(encoder, tmp_path, capsys):
    """The share of tokens that it writes right, near that of the run's own validation; a standard error."""
    with pytest.raises(SystemExit) as left:
        main(
            ["eval", str(encoder), "--tasks", "mad_compression", "--device", "cpu", "--output", str(tmp_path)]
        )
    assert not left.value.code
    table = capsys.readouterr().out
    scored = json.loads(next(tmp_path.glob("*.json")).read_text())["results"]["mad_compression"]
    model = LRNNForReconstruction.from_pretrained(encoder).eval()
    inputs, labels = (
        torch.from_numpy(ids) for ids in SyntheticTask("compression", 8).rows(0, "eval", np.arange(500))
    )
    with torch.no_grad():
        shares = (model(inputs).logits.argmax(dim=-1) == labels).double().mean(dim=1)
    assert scored["acc,none"] == scored["acc_8,none"] == pytest.approx(float(shares.mean()), abs=1e-3)
    assert scored["acc_stderr,none"] == pytest.approx(float(shares.std()) / 500**0.5, rel=0.02)
    assert 0.2 < scored["acc,none"] < 1
    assert "mad_compression" in table
    assert f"{scored['acc,none']:.4f}"[:5] in table
    lines = (encoder.parents[1] / "metrics.jsonl").read_text().splitlines()
    validated = [line["accuracy"] for line in map(json.loads, lines) if "accuracy" in line][-1]
    assert scored["acc,none"] == pytest.approx(validated, abs=0.05)


def test_an_autoencoders_cost_is_its_own(encoder, capsys):
    """The decoder counts, for the recipe as for the checkpoint."""
    from lrnn_lm.train.info import print_info

    model = LRNNForReconstruction.from_pretrained(encoder)
    decoder = sum(p.numel() for p in model.decoder.parameters())
    for target in (encoder, encoder.parents[1] / "recipe.yaml"):
        print_info(str(target))
        shown = capsys.readouterr().out
        assert re.search(rf"decoder +{decoder:,} ", shown)
        assert re.search(rf"total +{model.num_parameters():,}", shown)


def test_each_kind_is_asked_its_own(encoder, parity, capsys):
    for checkpoint, task, words in (
        (encoder, "state_parity", "an auto-encoder (task compression), which is no language model"),
        (parity, "mad_compression", "asks an auto-encoder"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["eval", str(checkpoint), "--tasks", task, "--device", "cpu"])
        assert left.value.code == 2
        assert words in capsys.readouterr().err


def test_a_folder_outside_its_run_knows_its_symbols(parity, tmp_path, capsys):
    """Its tokenizer reads a symbol that it does not know as 0: S5 would be a row of zeros, and guessed."""
    folder = tmp_path / "alone"
    shutil.copytree(parity.resolve(), folder)

    def left(*arguments):
        with pytest.raises(SystemExit) as exit:
            main(["eval", str(folder), "--device", "cpu", "--output", str(tmp_path), *arguments])
        return exit.value.code

    assert left("--tasks", "state_s5") == 2
    assert "was trained on 2" in capsys.readouterr().err
    (tmp_path / "blimp").mkdir()
    (tmp_path / "blimp" / "x.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b"}\n')
    assert left("--tasks", "offline_blimp", "--data", str(tmp_path)) == 2
    assert "neither BOS nor EOS" in capsys.readouterr().err
