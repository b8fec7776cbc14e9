"""Several checkpoints on the same tasks."""

import json
import re
from itertools import product
from pathlib import Path

import numpy
import pytest
import torch
from small_models import fill_memory
from typer.main import get_command

from lrnn_lm.cli import app, main
from lrnn_lm.evaluate.compare import beside, evaluate_each, folders
from lrnn_lm.evaluate.generate import generate
from lrnn_lm.evaluate.reporting.score_plot import arrange, draw_scores
from lrnn_lm.recipe.train import TrainSection
from lrnn_lm.train.info import print_info


def evaluate(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["eval", *map(str, arguments), "--device", "cpu", "--limit", "3", "--tasks", "heldout_cloze"])
    return left.value.code or 0


def test_beside_each_other(checkpoint, tmp_path, capsys):
    copy = tmp_path / "copy" / "checkpoints" / "step-00000020"
    copy.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    text = (checkpoint.parent.parent / "heldout.jsonl").read_bytes()
    (tmp_path / "copy" / "heldout.jsonl").write_bytes(text)
    assert evaluate(checkpoint, copy, "--output", tmp_path / "out") == 0
    assert "beside each other" in capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    files = [next((tmp_path / "out" / name).glob("*.json")) for name in ("tiny", "copy")]
    results = [json.loads(file.read_text()) for file in files]
    for row in beside(results):
        assert row[0] == "heldout_cloze"
        assert row[2] == row[3]


def scores(**tasks) -> dict:
    """Results as lm-eval gives them, each metric with a standard error."""
    return {"results": {
        task: {key: value for metric, score in metrics.items()
               for key, value in ((f"{metric},none", score), (f"{metric}_stderr,none", 0.01))}
        for task, metrics in tasks.items()
    }}  # fmt: skip


def test_the_picture_has_curves_by_length_and_a_panel_a_unit(tmp_path):
    """Of a task's parts few are shown, many left out; a checkpoint without a score leaves its place empty."""
    pairs = {f"acc_p{i}": 0.5 for i in range(13)}
    one = scores(state_s3={"acc": 0.7, "acc_64": 0.5, "acc_32": 1.0}, blimp={"acc": 0.6, **pairs},
                 few={"acc_a": 0.1, "acc_b": 0.2}, wiki={"word_perplexity": 30.0},
                 arc={"acc": 0.3, "acc_norm": 0.4})  # fmt: skip
    two = scores(blimp={"acc": 0.65, **pairs})
    curves, panels = arrange([one, two])
    assert curves == {"state_s3": {32: [(1.0, 0.01), None], 64: [(0.5, 0.01), None]}}
    assert list(panels) == ["accuracy", "word_perplexity"]
    assert list(panels["accuracy"]) == ["state_s3", "blimp", "few a", "few b", "arc", "arc (acc_norm)"]
    assert panels["accuracy"]["blimp"] == [(0.6, 0.01), (0.65, 0.01)]
    for results in ([one, two], [two, two], [scores(wiki={"word_perplexity": 3.0})] * 2):
        draw_scores(["one", "two"], results, tmp_path / "new" / "scores.png")
        assert (tmp_path / "new" / "scores.png").stat().st_size > 5000


def test_mistakes(checkpoint, tmp_path, capsys):
    assert evaluate(checkpoint, checkpoint) == 2
    assert "given once" in capsys.readouterr().err
    assert evaluate(checkpoint, tmp_path / "none") == 2
    assert "no such checkpoint folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rows 3", "--rows is for --length and --recall"),
        ("--rows 3 --certify s5", "--rows is for --length and --recall"),
        ("--harden x", "--harden reads the gates for a task"),
        ("--length 2x --limit 3", "--limit is for tasks"),
        ("--recall --num-fewshot 0", "--num-fewshot is for tasks"),
        ("--recall --max-length 9", "--max-length is for tasks"),
        ("--certify s5 --lengths 9", "--lengths is for tasks"),
        ("--length 2x --prompt-twice", "--prompt-twice is for tasks"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(checkpoint, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        main(["eval", str(checkpoint), *words.split()])
    assert message in capsys.readouterr().err


def test_a_home_folder_is_found_in_every_path(checkpoint, tmp_path, monkeypatch, capsys):
    """`--output=~/x` reaches us as it is written: shells expand it only at the start of a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("c").symlink_to(checkpoint)
    Path("p.txt").write_text("a")
    options = {"limit": 1, "device": "cpu", "data": "~/c/../../heldout.jsonl"}
    evaluate_each(["~/c"], ["heldout_bits_per_byte"], Path("~/scores"), **options)
    generate("~/c", prompt_file="~/p.txt", max_new_tokens=1, device="cpu")
    assert not Path("~").exists()
    (file,) = Path("scores").iterdir()
    assert (
        file.name == "tiny-step-00000020-heldout_bits_per_byte-limit1.json"
    )  # the run's text, by another name
    assert TrainSection(runs_dir="~/runs").runs_dir == str(tmp_path / "runs")
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        print_info("~/c")


def test_the_costs_of_a_run_are_those_of_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints/latest").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"did you mean .*checkpoints.latest\?"):
        print_info(str(tmp_path))


@pytest.mark.parametrize(("arguments"), [
    ("eval", "~nobody-here/c", "--tasks", "a"),
    ("eval", "c", "--tasks", "a", "--data", "~nobody-here/d"),
    ("generate", "c", "--prompt-file", "~nobody-here/p.txt"),
    ("report", "~nobody-here/run"),
    ("info", "~nobody-here/c"),
    ("export", "c", "~nobody-here/out"),
    ("train", "~nobody-here/recipe.yaml"),
    ("prepare", "RECIPE", "data.source.path=~nobody-here/x", "data.source.type=text"),
    ("prepare", "RECIPE", "data.cache_dir=~nobody-here/x"),
    ("train", "RECIPE", "train.runs_dir=~nobody-here/x"),
])  # fmt: skip
def test_a_home_folder_of_nobody(checkpoint, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    Path("c").symlink_to(checkpoint)
    Path("p.txt").write_text("a")
    recipe = str(Path(__file__).parents[2] / "recipes" / "demo.yaml")
    with pytest.raises(SystemExit) as end:
        main([recipe if word == "RECIPE" else word for word in arguments])
    assert end.value.code == 2
    assert "~nobody-here" in (said := capsys.readouterr().err)
    assert "there is no such user here" in said


@pytest.mark.parametrize(("command", "options", "words"), [
    ("eval", ("--tasks", "heldout_cloze", "--limit", "1"), "lower --batch-size or --max-length"),
    ("generate", ("--prompt", "a"), "lower --segment"),
])  # fmt: skip
def test_a_full_gpu(checkpoint, monkeypatch, capsys, command, options, words):
    fill_memory(monkeypatch)
    with pytest.raises(SystemExit) as end:
        main([command, str(checkpoint), *options, "--device", "cpu"])
    assert end.value.code == 2
    asked, remedy = capsys.readouterr().err.strip().splitlines()[-2:]
    assert asked == "lrnn: no room on the GPU for 2.50 GiB more"
    assert words in remedy


@pytest.mark.parametrize("allocate", [torch.empty, numpy.empty], ids=["torch", "numpy"])
def test_numbers_that_no_memory_holds(checkpoint, monkeypatch, capsys, allocate):
    """`--max-new-tokens` and `--length` with zeros too many ended in tracebacks."""
    monkeypatch.setattr("lrnn_lm.evaluate.generate", lambda *given, **options: allocate(10**14))
    with pytest.raises(SystemExit) as end:
        main(["generate", str(checkpoint), "--prompt", "a"])
    assert end.value.code == 2
    asked, remedy = capsys.readouterr().err.strip().splitlines()[-2:]
    assert re.fullmatch(r"lrnn: no room in memory for [\d.]+ (bytes|TiB) more", asked)
    assert "lower --segment or --max-new-tokens" in remedy


def test_only_one_function_looks_for_home_folders():
    """Except in a file that is copied to where this package may not be."""
    package = Path(__file__).parents[2] / "lrnn_lm"
    callers = [path.name for path in package.rglob("*.py") if ".expanduser()" in path.read_text()]
    assert sorted(callers) == ["files.py", "heldout.py"]


def test_each_of_several_has_a_folder(tmp_path):
    """Two runs' checkpoints may be of one step, and then files of one name."""
    for run in "ab":
        place = tmp_path / run / "checkpoints" / "step-00000001"
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
    both = [tmp_path / run / "checkpoints" / "step-00000001" for run in "ab"]
    assert folders(both, tmp_path / "out") == [tmp_path / "out" / "a", tmp_path / "out" / "b"]
    assert folders(both[:1], tmp_path / "out") == [tmp_path / "out"]
    assert folders(both, None) == [None, None]


def test_equal_names_are_told_apart_by_the_folders_above(tmp_path):
    alike = [tmp_path / place / "model" for place in ("a/x", "b/x")]
    for folder in alike:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert [folder.name for folder in folders(alike, tmp_path)] == ["a-x-model", "b-x-model"]


def test_an_output_that_is_a_file_is_told_before_scoring(checkpoint, tmp_path, capsys):
    file = tmp_path / "notes"
    file.write_text("mine")
    for more in ((), ("--length", "2x"), ("--recall",), ("--certify", "s5")):
        assert evaluate(checkpoint, *more, "--output", file) == 2
        told = capsys.readouterr()
        assert "takes a folder" in told.err
        assert "documents" not in told.out
    assert file.read_text() == "mine"
    assert evaluate(checkpoint, "--output", tmp_path / "scores.json") == 2  # earlier versions took a file
    assert "takes a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", get_command(app).commands)
def test_a_forgotten_value_is_not_the_option_behind_it(name, capsys):
    """`--prompt --greedy` wrote on from the prompt "--greedy", not greedily."""
    options = [option for option in get_command(app).commands[name].params if option.opts[0][:2] == "--"]
    for option, behind in product(options, ["--help", *(option.opts[0] for option in options)]):
        if not option.is_flag:
            with pytest.raises(SystemExit, match="2"):
                main([name, "x", option.opts[0], behind])
            assert capsys.readouterr().err.startswith(f"lrnn: {option.opts[0]} has no value; if that is")


def test_a_prompt_may_be_an_option_if_it_is_meant(checkpoint, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["generate", str(checkpoint), "--prompt=--greedy", "--max-new-tokens", "1", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("--greedy")
