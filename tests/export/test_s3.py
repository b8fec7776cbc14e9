"""Text and models in an S3-compatible store on this machine, which the test starts."""

import gzip
import json

import pytest

from lrnn_lm import generate
from lrnn_lm.data import SourceSpec
from lrnn_lm.data.sources import documents, fingerprint
from lrnn_lm.remote import local_copy
from lrnn_lm.runs.export import export


@pytest.fixture(scope="module")
def store():
    """The file system of a server with one bucket; its address and keys are in the environment."""
    s3fs = pytest.importorskip("s3fs", reason="pip install s3fs")
    server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'").ThreadedMotoServer(
        port=0
    )
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
