"""Text, models and copies of runs in an S3-compatible store on this machine, which the test starts."""

import gzip
import json
import os
import shutil
import signal

import pytest
import tiny_run
from rich.console import Console
from tiny_run import STEPS, losses, write_recipe

from lrnn_lm import generate, train
from lrnn_lm.cli import main
from lrnn_lm.data import SourceSpec
from lrnn_lm.data.sources import documents, fingerprint
from lrnn_lm.recipe import load_recipe
from lrnn_lm.remote import local_copy
from lrnn_lm.runs.checkpoint import list_checkpoints, verify
from lrnn_lm.runs.export import export
from lrnn_lm.train.build import build_trainer
from lrnn_lm.train.stop import Stopped


@pytest.fixture(scope="module")
def store():
    """The file system of a server with one bucket; its address and keys are in the environment."""
    s3fs = pytest.importorskip("s3fs", reason="the extra `dev` has s3fs and moto")
    server = pytest.importorskip("moto.server", reason="the extra `dev` has s3fs and moto")
    server = server.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(key, "key")
        fs = s3fs.S3FileSystem()
        fs.mkdir("bucket")
        yield fs
    server.stop()


def read(path: str) -> list[str]:
    return list(documents(SourceSpec(type="jsonl", path=path)))


def test_text(store):
    lines = [json.dumps({"text": f"document {k}"}).encode() + b"\n" for k in range(6)]
    store.pipe_file("bucket/corpus/a.jsonl", b"".join(lines[:3]))
    store.pipe_file("bucket/corpus/b/c.jsonl.gz", gzip.compress(b"".join(lines[3:])))
    want = [f"document {k}" for k in range(6)]
    assert read("s3://bucket/corpus") == read("s3://bucket/corpus/**") == want
    assert read("s3://bucket/corpus/*.jsonl") == want[:3]
    before = fingerprint(SourceSpec(type="jsonl", path="s3://bucket/corpus"))
    store.pipe_file("bucket/corpus/a.jsonl", b"".join(reversed(lines[:3])))  # of the same size
    assert fingerprint(SourceSpec(type="jsonl", path="s3://bucket/corpus")) != before


def test_a_model(store, make_checkpoint):
    checkpoint, url, options = make_checkpoint("bd_lru"), "s3://bucket/models/small", {"temperature": 0}
    export(checkpoint, url)
    assert generate(url, "w5", max_new_tokens=5, **options) == generate(
        checkpoint, "w5", max_new_tokens=5, **options
    )
    with pytest.raises(ValueError, match=f"^{url}: is not empty"):
        export(checkpoint, url)


@pytest.mark.slow  # tests/train/test_train_copy.py has it in another store
def test_a_run_goes_on_from_its_copy(store, tmp_path):
    recipe, place = write_recipe(tmp_path), "checkpoint.copy_to=s3://bucket/runs"
    train(recipe, ["name=straight"])
    trainer = build_trainer(load_recipe(recipe, [place]), Console(quiet=True))
    forward = trainer.forward

    def stopped(*given, **options):
        if trainer.position.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*given, **options)

    trainer.forward = stopped
    with pytest.raises(Stopped):
        trainer.run()
    shutil.rmtree(trainer.folder)
    train(recipe, [place])
    last = f"checkpoints/step-{STEPS:08d}"
    ends = [tiny_run.fingerprint(run / last) for run in (trainer.folder, tmp_path / "runs/straight")]
    assert ends[0] == ends[1]
    assert losses(trainer.folder) == losses(tmp_path / "runs/straight")
    store.get("bucket/runs/tiny", str(tmp_path / "copy"), recursive=True)
    assert verify(tmp_path / "copy" / last) is None
    assert (tmp_path / "copy/README.md").is_file()
    assert losses(tmp_path / "copy") == losses(trainer.folder)
    kept = [folder.name for folder in list_checkpoints(trainer.folder / "checkpoints")]
    assert {folder.name for folder in list_checkpoints(tmp_path / "copy/checkpoints")} <= {*kept}


def test_a_bucket_that_is_not_there_is_not_made(store, make_checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(write_recipe(tmp_path)), "checkpoint.copy_to=s3://mistyped/runs"])
    assert "lrnn: s3://mistyped/runs/tiny: cannot be read or written" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"^s3://mistyped/model: cannot be read or written"):
        export(make_checkpoint("bd_lru"), "s3://mistyped/model")
    store.invalidate_cache()
    assert not store.exists("mistyped")


def test_what_is_not_there(store):
    with pytest.raises(ValueError, match=r"^s3://absent/corpus: "):
        read("s3://absent/corpus")
    with pytest.raises(ValueError, match=r"^s3://bucket/absent: no such folder"):
        local_copy("s3://bucket/absent")


def test_without_keys(store, monkeypatch):
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    type(store).clear_instance_cache()
    with pytest.raises(ValueError, match=r"^s3://bucket/corpus: no access"):
        read("s3://bucket/corpus")


@pytest.mark.parametrize(
    "words",
    [
        ["export", "CHECKPOINT", "s3://bucket/new"],
        ["train", "RECIPE", "checkpoint.copy_to=s3://bucket/runs"],
        ["generate", "s3://bucket/model"],
        ["prepare", "RECIPE", "data.source={type: jsonl, path: s3://bucket/corpus}"],
    ],
)
def test_a_bucket_without_rights(store, make_checkpoint, tmp_path, monkeypatch, capsys, words):
    """The store refuses the key that it took before."""
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
    type(store).clear_instance_cache()
    given = {"CHECKPOINT": make_checkpoint("bd_lru"), "RECIPE": write_recipe(tmp_path)}
    with pytest.raises(SystemExit, match="2"):
        main([str(given.get(word, word)) for word in words])
    told = capsys.readouterr().err.splitlines()[-1]  # the server's words come before
    assert told.startswith("lrnn: s3://bucket/")
    assert ": no access (" in told
