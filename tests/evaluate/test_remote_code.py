"""Code that comes with a folder is not run: not asked for, not on a `y`, only with --trust-remote-code."""

import io
import json
import shutil

import pytest
from forks import LRNN, run_code
from short_models import RECURRENT, build
from tiny_run import write_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from lrnn_lm.cli import main
from lrnn_lm.model.export import write_remote_code
from lrnn_lm.runs.export import export

CODE = """
from pathlib import Path
Path({marker!r}).write_text("run")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "made_up"
class Model(LlamaForCausalLM):
    config_class = Config
    def get_input_embeddings(self):
        raise NotImplementedError("as transformers has it for names that it does not know")
class Words(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoModel": "code.Model"}
WORDS = {"auto_map": {"AutoTokenizer": [None, "code.Words"]}, "tokenizer_class": "Words"}


def change(file, **keys):
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture(params=["model", "tokenizer", "both"])
def folder(request, checkpoint, tmp_path, marker, write_documents):
    """A checkpoint whose model, tokenizer or both need the code beside them; the code leaves a marker."""
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    write_documents(tmp_path / "heldout.jsonl")
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    if request.param != "tokenizer":
        change(folder / "config.json", auto_map=AUTO_MAP, model_type="made_up", architectures=["Model"])
    if request.param != "model":
        change(folder / "tokenizer_config.json", **WORDS)
    return folder


@pytest.fixture
def lrnn(monkeypatch, capsys, tmp_path):
    """A function of a command line, with a `y` on standard input; returns its exit code and its stderr."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def run(*words):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        with pytest.raises(SystemExit) as done:
            main([str(word) for word in words])
        shown = capsys.readouterr()
        assert "Do you wish" not in shown.out
        return done.value.code or 0, shown.err

    return run


@pytest.mark.parametrize("command", ["eval", "length", "recall", "generate"])
def test_a_folder_with_code_is_refused_in_a_line(folder, marker, lrnn, command):
    words = {
        "eval": [
            "eval",
            folder,
            "--tasks",
            "heldout_bits_per_byte",
            "--data",
            folder.parent / "heldout.jsonl",
        ],
        "length": [
            "eval",
            folder,
            "--length",
            "40",
            "--rows",
            "1",
            "--data",
            folder.parent / "heldout.jsonl",
        ],
        "recall": ["eval", folder, "--recall", "--rows", "1", "--data", folder.parent / "heldout.jsonl"],
        "generate": ["generate", folder, "--max-new-tokens", "2", "--prompt", "the"],
    }[command]
    code, told = lrnn(*words, "--device", "cpu")
    assert (code, told.count("\n")) == (2, 1), told
    assert "--trust-remote-code" in told
    assert not marker.exists()


@pytest.mark.parametrize("folder", ["model", "tokenizer"], indirect=True)
def test_the_flag_lets_it_run(folder, marker, tmp_path):
    """In a process of its own, as the code changes what transformers knows."""
    code = f"from transformers import dynamic_module_utils as m; m.HF_MODULES_CACHE = {str(tmp_path)!r}\n"
    words = ("generate", folder, "--max-new-tokens", "2", "--prompt", "the", "--device", "cpu")
    done = run_code(code + LRNN, *words, "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert marker.exists()


def test_every_other_command_refuses_such_a_folder(folder, marker, tmp_path, lrnn):
    for words in (["info", folder], ["export", folder, tmp_path / "out"], ["report", folder]):
        code, told = lrnn(*words)
        assert (code, told.count("\n")) == (2, 1), told
        assert not marker.exists()


def test_code_beside_a_model_that_transformers_knows_is_left_alone(checkpoint, tmp_path, marker, lrnn):
    folder = shutil.copytree(checkpoint, tmp_path / "known")
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    change(folder / "config.json", auto_map=AUTO_MAP)
    assert lrnn("generate", folder, "--max-new-tokens", "2", "--device", "cpu")[0] == 0
    assert not marker.exists()


@pytest.fixture
def ours(tokenizer, tmp_path, marker):
    """An export of this project whose code beside the weights leaves a marker."""
    made = tmp_path / "made"
    build(tokenizer, mixer=RECURRENT).save_pretrained(made)
    tokenizer.save_pretrained(made)
    write_remote_code(made)
    folder = export(made, tmp_path / "exported")
    for file in folder.glob("*.py"):
        mark = f"from pathlib import Path\nPath({str(marker)!r}).write_text('run')\n"
        file.write_text(mark + file.read_text())
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    return folder


@pytest.mark.parametrize("flag", [[], ["--trust-remote-code"]])
def test_our_own_folders_need_neither_flag_nor_their_code(ours, marker, tmp_path, lrnn, flag):
    assert lrnn("generate", ours, "--max-new-tokens", "2", "--device", "cpu", *flag)[0] == 0
    assert lrnn("info", ours)[0] == 0
    assert lrnn("export", ours, tmp_path / "again")[0] == 0
    assert not marker.exists()


def test_an_export_takes_no_tokenizer_that_needs_code(ours, marker, tmp_path, lrnn):
    (ours / "code.py").write_text(CODE.format(marker=str(marker)))
    change(ours / "tokenizer_config.json", **WORDS)
    code, told = lrnn("export", ours, tmp_path / "again")
    assert (code, told.count("\n")) == (2, 1), told
    assert "code of its own" in told
    assert not marker.exists()
    assert not (tmp_path / "again").exists()


def test_a_recipes_tokenizer_with_code_is_refused(checkpoint, marker, tmp_path, lrnn):
    folder = shutil.copytree(checkpoint, tmp_path / "words")
    (folder / "config.json").unlink()
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    change(folder / "tokenizer_config.json", **WORDS)
    recipe = write_recipe(tmp_path / "run", data={"tokenizer": str(folder)})
    for command in ("prepare", "train"):
        code, told = lrnn(command, recipe)
        assert code == 2
        assert "code of its own" in told.splitlines()[-1]
        assert not marker.exists()


def test_an_untied_config_of_a_tied_model_is_told_so(checkpoint, tmp_path, lrnn):
    """The weights are whole: to copy them anew would not help."""
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    tied = AutoConfig.from_pretrained(folder, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(tied).save_pretrained(folder)
    change(folder / "config.json", tie_word_embeddings=False)
    code, said = lrnn("generate", str(folder), "--max-new-tokens", "1")
    assert code == 2
    assert said.endswith("such as lm_head.weight; set tie_word_embeddings to true in its config.json\n")


def test_no_weight_is_made_up_or_run(checkpoint, tmp_path, marker, lrnn):
    """Weights that are missing would be drawn at random; pickled ones may hold code."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    code, said = lrnn("generate", str(folder), "--max-new-tokens", "1")
    assert code == 2
    assert said.endswith(
        "1 weights are missing, such as model.layers.1.mlp.up_proj.weight; copy the folder again\n"
    )
    (folder / "model.safetensors").unlink()

    class Code:
        def __reduce__(self):
            return exec, (f"open({str(marker)!r}, 'w')",)

    torch.save({"lost": lost, "code": Code()}, folder / "pytorch_model.bin")
    code, said = lrnn("generate", str(folder), "--max-new-tokens", "1")
    assert code == 2
    assert "cannot be loaded as a model" in said
    assert not marker.exists()
