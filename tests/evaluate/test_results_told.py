"""What a result says beside its scores: tokens trained on; and that no terminal costs the work."""

import copy
import errno
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from short_models import RECURRENT, build
from tiny_run import ROOT, environment
from transformers import PreTrainedTokenizerFast

from lrnn_lm.cli import main
from lrnn_lm.evaluate import evaluate, harness
from lrnn_lm.evaluate.probe import certify as certificate
from lrnn_lm.evaluate.probe import length, recall
from lrnn_lm.evaluate.probe.certify import certify
from lrnn_lm.evaluate.probe.length import probe_length
from lrnn_lm.evaluate.probe.recall import probe_recall
from lrnn_lm.recipe import format_count
from lrnn_lm.runs.load import describe
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers


@pytest.fixture(scope="module")
def run(make_run, tokenizer):
    return make_run("told", 24, build(tokenizer, mixer=RECURRENT)).parents[1]


@pytest.mark.parametrize("kind", ["keeps", "lower", "unknown"])
def test_text_that_tokens_do_not_spell_is_told(run, tmp_path, tokenizer, kind, capsys):
    """A model need not predict what its tokenizer drops: no verdict against gzip, which has all of it."""
    ready = copy.deepcopy(tokenizer)
    if kind == "lower":
        ready.backend_tokenizer.normalizer = normalizers.Lowercase()
    elif kind == "unknown":
        core = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "the": 3}, "<unk>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        ready = PreTrainedTokenizerFast(
            tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
    texts = ["the river", "The river", "the Road"]
    data = tmp_path / "held.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = build(ready, mixer=RECURRENT)
    found = evaluate(
        run / "checkpoints" / "latest",
        ["heldout_bits_per_byte"],
        model=model,
        tokenizer=ready,
        data=data,
        output=tmp_path / "out",
    )
    told = capsys.readouterr().out
    changed = {"keeps": 0, "lower": 2, "unknown": 3}[kind]
    assert found["settings"]["changed_texts"] == changed
    assert ("gzip -9 on the same bytes" in told) == (not changed)
    assert (f"{changed} texts are not what their tokens decode to" in told) == bool(changed)


@pytest.mark.parametrize("tokens_per_step", [4096, "4096", "512K", format_count(524_288)])
def test_tokens_are_the_steps_times_their_tokens(run, tokens_per_step):
    recipe = run / "recipe.yaml"
    recipe.write_text(f"train: {{tokens_per_step: {tokens_per_step}}}\n")
    each = 512_000 if tokens_per_step == "512K" else int(tokens_per_step)
    for name in ("latest", "step-00000024"):
        info = describe(run / "checkpoints" / name)
        assert (info.step, info.tokens) == (24, 24 * each)


@pytest.mark.parametrize("recipe", [None, "", "train: null\n", "train: {lr: 1}\n", "- a\n"])
def test_tokens_are_unknown_where_nothing_tells_them(run, recipe):
    (run / "recipe.yaml").unlink(missing_ok=True)
    if recipe is not None:
        (run / "recipe.yaml").write_text(recipe)
    info = describe(run / "checkpoints" / "latest")
    assert (info.step, info.tokens) == (24, None)


def test_a_broken_recipe_is_named(run):
    (run / "recipe.yaml").write_text("train: [\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not valid YAML"):
        describe(run / "checkpoints" / "latest")
    (run / "recipe.yaml").unlink()


def test_a_folder_by_another_name_tells_its_step(run, tmp_path):
    copy = shutil.copytree(run / "checkpoints" / "step-00000024", tmp_path / "copy")
    (copy / "trainer").mkdir()
    (copy / "trainer" / "manifest.json").write_text(json.dumps({"step": 7}))
    info = describe(copy)
    assert (info.step, info.tokens, info.run) == (7, None, None)


@pytest.mark.parametrize("command", ["tasks", "length", "recall", "info"])
def test_brackets_in_paths_are_text(run, tmp_path, capsys, command):
    """As rich's markup `[red]` would vanish from a path, and `[/x]` end the command once its work is done."""
    named = shutil.copytree(run, tmp_path / "a [red] b[/x]", symlinks=True)
    checkpoint = named / "checkpoints" / "latest"
    words = {"tasks": "--tasks heldout_bits_per_byte --limit 1", "length": "--length 2x --rows 1",
             "recall": "--recall --rows 1", "info": ""}[command].split()  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main(["info" if command == "info" else "eval", str(checkpoint), *words])
    told = capsys.readouterr()
    assert not left.value.code, told.err
    assert "a [red] b[/x]" in told.out.replace("\n", "")


def test_a_terminal_of_ascii_costs_nothing(run, tmp_path, monkeypatch):
    """The table has a ±, the path an é; the scores are written."""
    named = shutil.copytree(run, tmp_path / "été", symlinks=True)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    evaluate(named / "checkpoints" / "latest", ["heldout_bits_per_byte"], limit=2)
    out.flush()
    assert_told(named, out.buffer.getvalue())


# Two command lines of `lrnn` in one process.
BOTH = """
import sys
from lrnn_lm.cli import main
between = sys.argv.index("then")
for words in (sys.argv[1:between], sys.argv[between + 1 :]):
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, end.code
"""


@pytest.mark.slow  # a process from its first import on
def test_the_c_locale_costs_nothing(run, tmp_path):
    """Without Python's UTF-8 mode: the table has a ±; the scores are written, and the exit code is 0. The
    bytes of a prompt among the arguments arrive as surrogates."""
    named = shutil.copytree(run, tmp_path / "plain", symlinks=True)
    checkpoint, prompt = str(named / "checkpoints" / "latest"), "Naïve façade, 数学"
    words = ["eval", checkpoint, "--tasks", "heldout_bits_per_byte",
             "then", "generate", checkpoint, "--max-new-tokens", "6", "--prompt", prompt]  # fmt: skip
    command, told = [sys.executable, "-c", BOTH, *words], ("LC_", "LANG", "PYTHONIO")
    clean = {key: value for key, value in environment().items() if not key.startswith(told)}
    clean |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=clean, cwd=ROOT, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    assert_told(named, done.stdout)
    assert b"\n" + prompt.encode("ascii", "backslashreplace") in done.stdout


def assert_told(run, said):
    (file,) = (run / "eval").glob("*.json")
    assert json.loads(file.read_text())["results"]
    assert file.name.encode() in said
    assert b"? standard error" in said


WAYS = {
    "tasks": lambda run, output: evaluate(run, ["heldout_bits_per_byte"], limit=1, output=output),
    "length": lambda run, output: probe_length(run, "2x", rows=1, output=output),
    "recall": lambda run, output: probe_recall([run], rows=1, output=output),
    "certify": lambda run, output: certify(run, "s5", output=output),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_that_cannot_be_written_is_told_before_the_work(run, tmp_path, monkeypatch, way):
    (tmp_path / "file").write_text("")
    for module in (harness, length, recall, certificate):
        monkeypatch.setattr(module, "load_checkpoint", lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match="no file can be written there"):
        WAYS[way](run / "checkpoints" / "latest", tmp_path / "file" / "results")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")  # no folder can be made of it
    with pytest.raises(ValueError, match="no file can be written there"):
        WAYS[way](run / "checkpoints" / "latest", tmp_path / "link")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(ValueError, match="no file can be written there"):
        WAYS[way](run / "checkpoints" / "latest", tmp_path / "new" / "results")
    monkeypatch.setattr("os.access", lambda path, mode: path not in (run / "eval", run))
    with pytest.raises(ValueError, match="no file can be written there"):
        WAYS[way](run / "checkpoints" / "latest", None)


@pytest.mark.parametrize("way", ["tasks", "length", "recall"])
def test_a_disk_that_is_full_does_not_cost_the_numbers(run, tmp_path, monkeypatch, capsys, way):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lrnn_lm.evaluate.show.replace_file", full)
    with pytest.raises(ValueError, match="cannot be written: No space left"):
        WAYS[way](run / "checkpoints" / "latest", tmp_path / "results")
    assert re.search(r"\d\.\d{2}", capsys.readouterr().out)
