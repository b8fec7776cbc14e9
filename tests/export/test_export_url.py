"""Models behind URLs: exported there, and read from there by name."""

from pathlib import Path

import fsspec
import pytest

from lrnn_lm import generate
from lrnn_lm.api import export_checkpoint
from lrnn_lm.cli import main
from lrnn_lm.evaluate.show import check_output
from lrnn_lm.remote import local_copy
from lrnn_lm.runs.export import export
from lrnn_lm.train.init_from import find_weights

STORE = fsspec.filesystem("memory")
URL = "memory://bucket/models/small"


@pytest.fixture(autouse=True)
def _empty_store():
    local_copy.cache_clear()
    yield
    STORE.store.clear()
    STORE.pseudo_dirs[:] = [""]


def test_there_and_back(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("bd_lru")
    export_checkpoint(checkpoint, URL)
    want = export(checkpoint, tmp_path / "here")
    there = {name.removeprefix("/bucket/models/small/") for name in STORE.find("/bucket/models/small")}
    assert there == {file.name for file in want.iterdir()} | {"README.md"}
    options = {"max_new_tokens": 5, "temperature": 0}
    assert generate(URL, "w5", **options) == generate(checkpoint, "w5", **options)
    assert find_weights(URL, main=True) == local_copy(URL)
    export_checkpoint(URL, tmp_path / "back")
    back = (tmp_path / "back" / "model.safetensors").read_bytes()
    assert back == (want / "model.safetensors").read_bytes()


def test_a_copy_that_was_stopped_is_no_model(make_checkpoint, monkeypatch):
    def stop(self, source, target, **options):
        if target.endswith("config.json") and "generation" not in target and "tokenizer" not in target:
            raise OSError("gone")
        STORE.pipe_file(target, b"")

    monkeypatch.setattr(type(STORE), "put_file", stop)
    with pytest.raises(
        ValueError, match=r"^memory://bucket/models/small: cannot be read or written \(gone\)"
    ):
        export(make_checkpoint("bd_lru"), URL)
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        generate(URL, "w5")


@pytest.mark.parametrize(
    "arguments",
    [["generate", URL, "--prompt", "x"], ["info", URL], ["eval", URL, "--tasks", "x"]],
)
def test_the_command_line_says_what_is_wrong(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"lrnn: {URL}: no such folder\n"


def test_scores_stay_here():
    with pytest.raises(ValueError, match="s3://bucket/x: give a folder of this machine, not a URL"):
        check_output(Path("s3://bucket/x"))


def test_a_url_that_is_taken(make_checkpoint):
    STORE.pipe_file("/bucket/models/small/x", b"1")
    with pytest.raises(ValueError, match=rf"^{URL}: is not empty"):
        export(make_checkpoint("bd_lru"), URL)
