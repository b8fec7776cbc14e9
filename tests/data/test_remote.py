"""Text behind URLs: documents and rows as of files on a disk, and plain words where it cannot be read."""

import gzip
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from corpora import make_texts, write_jsonl

from lrnn_lm.data import DataError, DataSpec, PreparedData, SourceSpec, prepare
from lrnn_lm.data.sources import documents, fingerprint
from lrnn_lm.recipe import recipe_from_dict

TEXTS = make_texts(40)
STORE = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def _empty_store():
    yield
    STORE.store.clear()


def source(type: str, url: str, **keys: object) -> SourceSpec:
    return SourceSpec(type=type, path=url, **keys)


def put(folder: Path, url: str) -> None:
    STORE.put(str(folder), url, recursive=True)


def test_documents_are_those_of_the_disk(tmp_path: Path) -> None:
    local = tmp_path / "corpus"
    (local / "b").mkdir(parents=True)
    plain = write_jsonl(local / "a.jsonl", TEXTS[:20])
    (local / "b" / "two.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (local / "b" / ".hidden.jsonl").write_text("no JSON")
    (local / "empty.jsonl").touch()
    write_jsonl(local / "[a].jsonl", TEXTS[:3])
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), local / "part.parquet")
    put(local, "memory://bucket/corpus")
    for type, path in (
        ("jsonl", ""),
        ("jsonl", "/**/*.gz"),
        ("jsonl", "/b/*"),
        ("jsonl", "/[a].jsonl"),
        ("parquet", ""),
    ):
        want = list(documents(source(type, f"{local}{path}")))
        for where in ("memory://bucket/corpus", f"file://{local}"):
            assert list(documents(source(type, f"{where}{path}"))) == want


def test_a_file_that_changes_is_another_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    put(tmp_path / "a.jsonl", "memory://bucket/a.jsonl")
    spec = source("jsonl", "memory://bucket/a.jsonl")
    before = fingerprint(spec)
    assert fingerprint(spec) == before
    put(tmp_path / "a.jsonl", "memory://bucket/a.jsonl")
    assert fingerprint(spec) != before


def test_prepares_the_same_rows(prepared: PreparedData, spec: DataSpec) -> None:
    put(Path(spec.source.path or ""), "memory://bucket/corpus.jsonl")
    there = prepare(replace(spec, source=source("jsonl", "memory://bucket/corpus.jsonl")), progress=False)
    assert there.manifest["splits"] == prepared.manifest["splits"]
    assert there.manifest["files"] == prepared.manifest["files"]


@pytest.mark.parametrize(
    ("url", "match"),
    [
        (
            "memory://bucket/absent",
            r"^memory://bucket/absent: no such file or folder \(data\.source\.path\)$",
        ),
        ("memory://bucket/*.txt", "no such file or folder"),
        ("nothing://bucket/a", "Protocol not known"),
    ],
)
def test_what_cannot_be_read(url: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        list(documents(source("text", url)))


def test_a_store_without_access(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, path: str) -> bool:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(STORE), "isdir", refuse)
    with pytest.raises(DataError, match=r"^memory://bucket/a: no access \(Access Denied\)"):
        list(documents(source("text", "memory://bucket/a")))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"data": {"source": {"type": "tokens", "path": "s3://bucket/a.npy"}}}, "'tokens' reads no URL"),
        ({"data": {"source": {"type": "hf", "path": "s3://bucket/a"}}}, "'hf' reads no URL"),
        ({"data": {"cache_dir": "s3://bucket/cache"}}, "s3://bucket/cache: give a folder of this machine"),
        ({"train": {"runs_dir": "gs://bucket/runs"}}, "checkpoint.copy_to copies it to a URL"),
    ],
)
def test_a_recipe_that_needs_a_disk(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        recipe_from_dict({"name": "x", **settings})


def test_two_names_of_one_url() -> None:
    two = [{"type": "text", "path": "s3://bucket/a", "name": name} for name in ("x", "y")]
    with pytest.raises(ValueError, match="both read s3://bucket/a"):
        recipe_from_dict({"name": "x", "data": {"sources": two}})
