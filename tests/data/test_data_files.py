"""The files that a path names: links, loops, suffixes, globs, empty ones; and archives of any window."""

import gzip
import itertools
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from corpora import make_texts, write_jsonl

from lrnn_lm.data import DataError, DataSpec, SourceSpec, prepare
from lrnn_lm.data.files import find_files
from lrnn_lm.data.sources import documents, fingerprint


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """corpus/{a,b/{c,d}}.txt, and a folder and a file outside of it."""
    (tmp_path / "corpus" / "b").mkdir(parents=True)
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    for name in ("corpus/a", "corpus/b/c", "corpus/b/d", "outside/e", "outside/deep/f", "alone"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    return tmp_path / "corpus"


def names(path: Path | str, suffixes: tuple[str, ...] = (), base: Path | None = None) -> list[str]:
    files = find_files(str(path), suffixes)
    return [str(f.relative_to(base)) if base else f.name for f in files]


def read(type: str, path: Path | str) -> list[str]:
    return list(documents(SourceSpec(type=type, path=str(path))))


WAYS = pytest.mark.parametrize("way", ["", "**/*.txt", "**/*", "**"])


@WAYS
def test_linked_folders_and_files_are_read(corpus: Path, way: str) -> None:
    (corpus / "link").symlink_to("../outside")
    (corpus / "b" / "file.txt").symlink_to(corpus.parent / "alone.txt")
    got = names(corpus / way, base=corpus)
    assert got == ["a.txt", "b/c.txt", "b/d.txt", "b/file.txt", "link/deep/f.txt", "link/e.txt"]


@WAYS
def test_each_real_file_counts_once(corpus: Path, way: str) -> None:
    before = names(corpus / way, base=corpus)
    (corpus / "0-before").symlink_to("b")  # comes first by name, but what is no link names the file
    (corpus / "0-a.txt").symlink_to("a.txt")
    (corpus / "z.txt").symlink_to(corpus / "b" / "c.txt")
    assert names(corpus / way, base=corpus) == before == ["a.txt", "b/c.txt", "b/d.txt"]
    for k in range(2):
        (corpus / f"twice-{k}").symlink_to("../outside")
    assert names(corpus / way, base=corpus) == [*before, "twice-0/deep/f.txt", "twice-0/e.txt"]


@WAYS
def test_loops_end(corpus: Path, way: str) -> None:
    before = names(corpus / way)
    folders = [corpus, corpus / "b", corpus.parent / "outside"]
    for (k, folder), target in itertools.product(enumerate(folders), folders):
        (folder / f"loop-{k}-{target.name}").symlink_to(target, target_is_directory=True)
    started = time.process_time()
    assert sorted(names(corpus / way)) == sorted([*before, "e.txt", "f.txt"])
    assert time.process_time() - started < 2


def test_globs_without_two_stars(corpus: Path) -> None:
    (corpus / "self").symlink_to(".")
    (corpus / "link").symlink_to("../outside")
    assert names(corpus / "*" / "*.txt", base=corpus) == ["b/c.txt", "b/d.txt", "link/e.txt", "self/a.txt"]
    assert names(corpus / "self" / "self" / "?.txt") == ["a.txt"]
    assert names(corpus / "[ab]" / "[!c].txt") == ["d.txt"]


def test_globs_match_as_in_a_shell(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/.hidden.txt", ".cache/x.txt", "b/more.md", "b/c/deeper/c.txt"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text("x")
    assert names(corpus / "**" / "c.txt", base=corpus) == ["b/c/deeper/c.txt", "b/c.txt"]
    assert names(corpus / "**" / "c" / "**" / "*.txt", base=corpus) == ["b/c/deeper/c.txt"]
    assert names(corpus / "**" / "b" / "*", base=corpus) == ["b/c.txt", "b/d.txt", "b/more.md"]
    assert names(corpus / "**" / ".cache" / "*.txt", base=corpus) == [".cache/x.txt"]
    assert names(corpus / "*" / "**" / "c.txt", base=corpus) == ["b/c/deeper/c.txt", "b/c.txt"]
    monkeypatch.chdir(corpus)
    assert [str(f) for f in find_files("**/d.txt")] == ["b/d.txt"]
    assert [str(f) for f in find_files("b")] == ["b/c/deeper/c.txt", "b/c.txt", "b/d.txt", "b/more.md"]


def test_a_name_with_signs_of_a_glob_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "x[1]*.txt").write_text("starred")
    assert names(tmp_path / "x[1]*.txt") == ["x[1]*.txt"]


@pytest.mark.parametrize("name", ["gone.txt", "folder", "b/gone.jsonl"])
@pytest.mark.parametrize("way", ["", "**", "itself"])
def test_broken_links_are_named(corpus: Path, name: str, way: str) -> None:
    (corpus / name).symlink_to("/nowhere/at/all")
    path = corpus / name if way == "itself" else corpus / way
    with pytest.raises(DataError, match=rf"{name}: a link to /nowhere/at/all, which is not there"):
        find_files(str(path))


def test_a_link_to_itself_is_broken(corpus: Path) -> None:
    (corpus / "self.txt").symlink_to("self.txt")
    with pytest.raises(DataError, match=r"self\.txt: a link to self\.txt, which is not there"):
        find_files(str(corpus))


def test_hidden_ones_are_left_out(corpus: Path) -> None:
    (corpus / ".link").symlink_to("/nowhere")
    (corpus / ".git").mkdir()
    (corpus / ".git" / "x.txt").write_text("x")
    assert names(corpus) == ["a.txt", "c.txt", "d.txt"]


def test_a_pipe_is_no_corpus(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe: a pipe or a device; .* give a file"):
        find_files(str(tmp_path / "pipe"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_named(corpus: Path) -> None:
    (corpus / "b").chmod(0)
    with pytest.raises(DataError, match=r"corpus/b: cannot be read \(Permission denied\)"):
        find_files(str(corpus))
    (corpus / "b").chmod(0o700)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson", ".JSONL", ".Json", ".NDJSON"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst", ".GZ", ".Zst"])
@pytest.mark.parametrize("whole_folder", [True, False])
def test_suffixes_in_any_case(tmp_path: Path, suffix: str, packed: str, whole_folder: bool) -> None:
    texts = make_texts(3)
    data = write_jsonl(tmp_path / "plain", texts).read_bytes()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[packed.lower()]
    path = tmp_path / f"part{suffix}{packed}"
    path.write_bytes(pack(data))
    (tmp_path / "notes.md").write_text("not a JSON line")
    assert read("jsonl", tmp_path if whole_folder else path) == texts


def test_upper_case_parquet_and_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "x.Parquet")
    assert read("parquet", tmp_path) == ["one"]
    (tmp_path / "x.Parquet").unlink()
    (tmp_path / "x.TXT").write_text("one")
    (tmp_path / "y.TXT.GZ").write_bytes(gzip.compress(b"two"))
    assert read("text", tmp_path) == ["one", "two"]


def test_a_folder_named_as_a_file_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "part.jsonl").mkdir()
    write_jsonl(tmp_path / "part.jsonl" / "x.jsonl", make_texts(2))
    assert read("jsonl", tmp_path) == make_texts(2)
    with pytest.raises(DataError, match="no file matches this pattern"):
        read("jsonl", tmp_path / "*")


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_empty_files_are_left_out(tmp_path: Path, kind: str) -> None:
    (tmp_path / "first").mkdir()
    suffix = "txt" if kind == "text" else kind
    for name in (f"first/x.{suffix}", f"y.{suffix}"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"all of its 2 files are empty"):
        read(kind, tmp_path)
    for path in (tmp_path / f"y.{suffix}", tmp_path / "y.*", tmp_path / "first"):  # a folder is no file
        with pytest.raises(DataError, match=rf"[xy]\.{suffix}: the file is empty"):
            read(kind, path)
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": make_texts(2)}), tmp_path / "z.parquet")
    elif kind == "jsonl":
        write_jsonl(tmp_path / "z.jsonl", make_texts(2))
    else:
        (tmp_path / "z.txt").write_text("".join(make_texts(200)))
    got = read(kind, tmp_path)
    assert got == make_texts(2) if kind != "text" else "".join(got) == "".join(make_texts(200))
    assert kind != "text" or len(got) > 20, "a lone text file beside empty ones is cut into parts"


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_archives_of_nothing_count_as_empty(tmp_path: Path, pack) -> None:
    suffix = "gz" if pack is gzip.compress else "zst"
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(pack(b""))
    with pytest.raises(DataError, match="is empty: it holds no document with text"):
        read("jsonl", tmp_path)
    write_jsonl(tmp_path / "b.jsonl", make_texts(2))
    assert read("jsonl", tmp_path) == make_texts(2)


def test_prepare_tells_empty_files_once(
    spec: DataSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    shutil.copy(str(spec.source.path), folder / "x.jsonl")
    for k in range(5):
        (folder / f"empty-{k}.jsonl").touch()
    spec = replace(spec, source=SourceSpec(type="jsonl", path=str(folder)))
    first = prepare(spec, progress=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lrnn: empty files are left out: ")
    assert "empty-0.jsonl, " in line
    assert line.endswith("empty-2.jsonl and 2 more")
    assert prepare(spec, progress=False).folder == first.folder
    assert capsys.readouterr().err == ""
    (folder / "empty-5.jsonl").touch()
    assert prepare(spec, progress=False).folder == first.folder, "an empty file is no other text"


def test_fingerprint_follows_what_links_lead_to(corpus: Path) -> None:
    spec = SourceSpec(type="text", path=str(corpus))
    (corpus / "link").symlink_to("../outside")
    before = fingerprint(spec)
    (corpus.parent / "outside" / "e.txt").write_text("another text")
    assert fingerprint(spec) != before


@pytest.mark.parametrize("window_log", [20, 27, 28, 31])
def test_zstd_windows_of_any_size(tmp_path: Path, window_log: int) -> None:
    data = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(60)).encode()
    settings = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(packer.compress(data) + packer.flush())
    assert read("jsonl", path) == make_texts(60)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"x\.jsonl\.zst: damaged archive"):
        read("jsonl", path)


def test_a_zstd_dictionary_is_no_damage(tmp_path: Path) -> None:
    texts = make_texts(1000)
    trained = zstandard.train_dictionary(2000, [text.encode() for text in texts])
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(dict_data=trained).compress(data))
    with pytest.raises(DataError, match=r"x\.jsonl\.zst: packed with a dictionary, .* repack it without"):
        read("jsonl", path)


def test_zstd_frames_to_skip(tmp_path: Path) -> None:
    """Seekable archives end in a table that is no text."""
    pack, skipped = zstandard.ZstdCompressor().compress, bytes.fromhex("5e2a4d1803000000") + b"abc"
    parts = [json.dumps({"text": text}).encode() + b"\n" for text in make_texts(2)]
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(skipped + pack(parts[0]) + skipped + pack(b"") + pack(parts[1]) + skipped)
    assert read("jsonl", path) == make_texts(2)


@pytest.mark.parametrize("way", ["", "*", "a.JSONL{}"])
@pytest.mark.parametrize("packer", [".bz2", ".XZ", ".zstd"])
def test_what_cannot_be_unpacked_is_not_left_out(tmp_path: Path, packer: str, way: str) -> None:
    write_jsonl(tmp_path / "b.jsonl", make_texts(3))
    (tmp_path / f"a.JSONL{packer}").write_bytes(b"packed")
    with pytest.raises(DataError, match=rf"a.JSONL{packer}: {packer.lower()} files are not unpacked here"):
        read("jsonl", tmp_path / way.format(packer))


@pytest.mark.parametrize("way", ["", "*"])
def test_a_file_beside_its_archive_is_not_read_twice(tmp_path: Path, way: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", make_texts(3))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    with pytest.raises(DataError, match=r"a.jsonl.gz: it would be read twice"):
        read("jsonl", tmp_path / way)
    assert len(read("jsonl", tmp_path / "a.jsonl.gz")) == 3
