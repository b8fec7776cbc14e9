"""`lrnn export`: what the folder holds, in which precision, and what a user can get wrong."""

import errno
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import small_config
from transformers import AutoTokenizer

from lrnn_lm import LRNNForCausalLM, LRNNModel, cli
from lrnn_lm.api import export_checkpoint
from lrnn_lm.model import load_states, prefill, save_states
from lrnn_lm.model.export.remote_code import remote_code
from lrnn_lm.requirements import UnmetRequirementError
from lrnn_lm.runs.export import export, new_folder
from lrnn_lm.runs.load import load_checkpoint


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint("bd_lru")


def test_folder_holds_the_model_and_nothing_of_the_trainer(checkpoint, tmp_path, capsys):
    target = tmp_path / "deep" / "out"
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(checkpoint), str(target), "--license", "apache-2.0"])
    assert not stop.value.code
    assert str(target) in capsys.readouterr().out
    model = {"config.json", "model.safetensors", "generation_config.json", "README.md"}
    words = {"tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in target.iterdir()} == model | words | set(remote_code())
    assert "license: apache-2.0" in (target / "README.md").read_text()
    assert not list(target.parent.glob(".*"))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision(checkpoint, tmp_path, name, dtype):
    target = export(checkpoint, tmp_path / "out", dtype=name)
    stored, given = load_file(target / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert all(torch.equal(stored[key], given[key].to(dtype)) for key in given)
    assert json.loads((target / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "near"), [("int8", 0.03), ("int4", 0.2)])
def test_integers(checkpoint, tmp_path, dtype, near, monkeypatch):
    """Fewer bytes, near the model's logits, the same again after loading; without torchao a plain message."""
    pytest.importorskip("torchao", reason="pip install 'lrnn-lm[torchao]'")
    wide = tmp_path / "wide"
    shutil.copytree(checkpoint, wide)
    # The output projection has a width of 70, which does not split into groups that share a scale.
    mixer = {"type": "bd_lru", "num_blocks": 35, "block_size": 2}
    model = LRNNForCausalLM(small_config("bd_lru", hidden_size=64, intermediate_size=96, mixer=mixer))
    model.save_pretrained(wide)
    target = export(wide, tmp_path / "out", dtype=dtype)
    stored, given = ((folder / "model.safetensors").stat().st_size for folder in (target, wide))
    assert stored < 0.5 * given
    ids = torch.arange(1, 9).view(1, 8)
    got = load_checkpoint(target, "cpu")[0](ids).logits
    want = model.eval()(ids).logits
    assert 0 < (got - want).norm() < near * want.norm()
    monkeypatch.setitem(sys.modules, "torchao", None)
    for act in (
        lambda: export(wide, tmp_path / "again", dtype=dtype),
        lambda: load_checkpoint(target, "cpu"),
    ):
        with pytest.raises(UnmetRequirementError, match=r"pip install 'lrnn-lm\[torchao\]'"):
            act()


def test_an_export_can_be_exported(checkpoint, tmp_path):
    """Its own code and card are written anew, not carried over."""
    first = export(checkpoint, tmp_path / "first")
    (first / "lrnn_stale.py").write_text("")
    second = export(first, tmp_path / "second")
    assert {file.name for file in second.iterdir()} == {file.name for file in first.iterdir()} - {
        "lrnn_stale.py"
    }


@pytest.mark.parametrize("format", ["transformers", "torch-export"])
def test_chat_templates_go_along(checkpoint, tmp_path, format):
    """transformers keeps the first in chat_template.jinja and others in a folder of their own."""
    chats, templates = tmp_path / "chats", {"default": "a", "tool_use": "b"}
    shutil.copytree(checkpoint, chats)
    AutoTokenizer.from_pretrained(chats, chat_template=templates).save_pretrained(chats)
    export_checkpoint(chats, tmp_path / "out", format=format)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates


def test_a_full_disk(checkpoint, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ValueError, match="out: cannot be written"):
            export(checkpoint, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled_and_stays(checkpoint, tmp_path, monkeypatch):
    """It may be mounted, which no folder can be renamed over, a link, or where the user stands."""
    for name in ("real", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "here")
    for target, holds in (("../link", tmp_path / "real"), (".", tmp_path / "here")):
        number = holds.stat().st_ino
        export(checkpoint, target)
        assert (holds / "model.safetensors").is_file()
        assert holds.stat().st_ino == number
        assert not list(holds.glob(".*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "real"]


def test_an_empty_folder_that_is_filled_meanwhile(checkpoint, tmp_path):
    """By another export to it: neither may write over the other's files."""
    target = tmp_path / "out"
    target.mkdir()

    def fill():
        with new_folder(target) as aside:
            export(checkpoint, tmp_path / "other")
            (tmp_path / "other").rename(aside)
            (target / "config.json").write_text("another's")

    with pytest.raises(ValueError, match="out: is no longer empty; give a new folder"):
        fill()
    assert [(file.name, file.read_text()) for file in target.iterdir()] == [("config.json", "another's")]


def test_a_file_system_without_modes(checkpoint, tmp_path, monkeypatch):
    """Some refuse to change them: what is written counts all the same."""

    def refuse(self, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "chmod", refuse)
    assert (export(checkpoint, tmp_path / "out") / "model.safetensors").is_file()
    model = load_checkpoint(tmp_path / "out", "cpu")[0]
    cache = prefill(model, torch.ones(1, 3, dtype=torch.long)).past_key_values
    save_states(cache, tmp_path / "states.safetensors", model)
    assert load_states(tmp_path / "states.safetensors", model).get_seq_length() == 3


def test_whoever_may_read_the_folder_may_read_its_files(checkpoint, tmp_path):
    """safetensors 0.8 makes files that only their maker can read, whatever the umask."""
    mask = os.umask(0o027)
    try:
        target = export(checkpoint, tmp_path / "out")
    finally:
        os.umask(mask)
    assert {file.name for file in target.iterdir() if file.stat().st_mode & 0o777 != 0o640} == set()


def test_targets_that_are_refused(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    export(checkpoint, tmp_path / "empty")
    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        export(checkpoint, tmp_path / "empty")
    (tmp_path / "file").write_text("")
    for place in ("file", "file/x", "file/x/y"):
        with pytest.raises(ValueError, match="file: is a file; give a folder"):
            export(checkpoint, tmp_path / place)
    with pytest.raises(ValueError, match="s3:: names no place: give a URL such as"):
        export(checkpoint, Path("s3://"))
    with pytest.raises(ValueError, match="license: give a name"):
        export_checkpoint(checkpoint, tmp_path / "new", license=" ")
    with pytest.raises(ValueError, match="dtype 'fp8': use bf16, fp32, int8 or int4"):
        export(checkpoint, tmp_path / "new", dtype="fp8")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("format", ["transformers", "onnx", "torch-export"])
def test_a_folder_of_integers_is_refused(checkpoint, tmp_path, format):
    """It has no weights left to write: in int8 to int8, fp32 or graphs that would end in a traceback."""
    folder = shutil.copytree(checkpoint, tmp_path / "integers")
    config = json.loads((folder / "config.json").read_text())
    stored = config | {"quantization_config": {"quant_method": "torchao"}}
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="its weights are integers; export the checkpoint that it was made"):
        export_checkpoint(folder, tmp_path / "new", format=format)
    assert not (tmp_path / "new").exists()


def test_checkpoints_that_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match=r"there is no config\.json in it"):
        export(tmp_path, tmp_path / "out")
    (checkpoint.parent / "latest").symlink_to(checkpoint.name)
    for folder in checkpoint.parents[:2]:
        with pytest.raises(ValueError, match=r"not a checkpoint folder; did you mean .*checkpoints/latest\?"):
            export(folder, tmp_path / "out")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="PEFT adapter: merge it into its model"):
        export(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_its_head(checkpoint, tmp_path):
    """To tie the embedding in its place would make another model of it."""
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    LRNNModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ValueError, match="saved as LRNNModel, without a head: save the LRNNForCausalLM"):
        export(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "model.safetensors is missing"),
        ("tokenizer_config.json", "tokenizer_config.json is missing"),
    ],
)
def test_missing_files_are_named(checkpoint, tmp_path, missing, message):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / missing).unlink()
    with pytest.raises(ValueError, match=message) as error:
        export(copy, tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "kept"),
    [("tokenizer.json", 300), ("tokenizer.json", 0), ("tokenizer_config.json", 9)],
)
def test_a_torn_tokenizer_is_refused(checkpoint, tmp_path, file, kept):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / file).write_bytes((copy / file).read_bytes()[:kept])
    with pytest.raises(ValueError, match="cannot be loaded as a tokenizer") as error:
        export(copy, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_damaged_weights_and_foreign_models(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be loaded as a model") as error:
        export(copy, tmp_path / "out")
    assert "\n" not in str(error.value)
    (copy / "config.json").write_text('{"model_type": "lrnn", "architectures": ["LRNNForReconstruction"]}')
    with pytest.raises(ValueError, match="an auto-encoder"):
        export(copy, tmp_path / "out")
    (copy / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama', and only 'lrnn'"):
        export(copy, tmp_path / "out")
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON object"):
        export(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
