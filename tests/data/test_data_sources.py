"""Every kind of source but `hf`: its documents, and what it says when it cannot be read."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpora import make_texts, read, write_jsonl

from lrnn_lm.data import DataError, SourceSpec
from lrnn_lm.data.sources import documents, fingerprint

TEXTS = make_texts(7)


def test_text_folder_glob_and_file(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("two\r\nlines", newline="")
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "note.md").write_text("note")
    (tmp_path / "blank.txt").write_text(" \n")
    assert read("text", tmp_path) == ["two\r\nlines", "note", "one"]
    assert read("text", tmp_path / "**" / "*.txt") == ["two\r\nlines", "one"]
    assert read("text", tmp_path / "one.txt") == ["one"]


@pytest.mark.parametrize(
    ("type", "name", "told"),
    [
        ("text", "a.jsonl", r"type=jsonl"),
        ("text", "a.ndjson", r"type=jsonl"),
        ("jsonl", "a.txt", r"a\.txt:1: not valid JSON.*is it of data\.source\.type=text\?"),
        ("jsonl", "a.md", r"type=text\?"),
        ("jsonl", "a.parquet", r"type=parquet\?"),
        ("hf", "a.jsonl.gz", r"a\.jsonl\.gz: a file, .* set data\.source\.type=jsonl"),
        ("hf", "a.csv", r"a\.csv: a file, .* give the folder"),
    ],
)
def test_the_type_of_a_file_of_another_type_is_told(tmp_path: Path, type: str, name: str, told: str):
    (tmp_path / name).write_text('{"text": "fine"}\n' if type == "text" else "A plain text.\n")
    for path in (tmp_path / name, *([] if type == "hf" else [tmp_path / "a.*"])):
        with pytest.raises(DataError, match=told):
            read(type, path)
    if type == "text":
        fingerprint(SourceSpec(type=type, path=str(tmp_path / name)))  # of a run that older versions prepared
        # Beside other text it is one more text.
        (tmp_path / "b.txt").write_text("text")
        assert len(read("text", tmp_path)) == 2


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    plain = write_jsonl(tmp_path / "part.jsonl", TEXTS, field="content").read_bytes()
    half = plain.index(b"\n") + 1
    pack = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"packed.jsonl{suffix}"
    path.write_bytes(pack(plain[:half]) + pack(plain[half:]))  # two frames one after another
    assert read("jsonl", path, text_field="content") == TEXTS
    assert read("jsonl", path, text_field="content", limit=3) == TEXTS[:3]


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"id": list(range(7)), "body": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "part.parquet", row_group_size=2)
    assert read("parquet", tmp_path, text_field="body") == TEXTS
    with pytest.raises(DataError, match=r"no column 'text'.*id, body"):
        read("parquet", tmp_path)
    twice = pyarrow.Table.from_arrays([["a"], ["b"], ["c"]], names=["text", "text", "body"])
    pyarrow.parquet.write_table(twice, tmp_path / "part.parquet")
    with pytest.raises(DataError, match=r"2 columns 'text'; set data.source.text_field to one of: body"):
        read("parquet", tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"bad\.parquet: not a readable Parquet file"):
        read("parquet", tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "fine"}\n{"text": \n', r"x\.jsonl:2: not valid JSON"),
        (b'{"text": "fine"}\n\n{"body": "b", "id": 1}\n', r"x\.jsonl:3: no field 'text'.*one of: body, id"),
        (b"{}\n", r"x\.jsonl:1: no field 'text'; it has no field at all"),
        (json.dumps({f"k{i}": 1 for i in range(500)}).encode(), r"one of: k0, k1, .* k19 and 480 more$"),
        (b'{"text": 3}\n', r"x\.jsonl:1: field 'text' holds int"),
        (b'{"text": "\\ud800"}\n', r"x\.jsonl:1: .*surrogate"),
        (b'["text"]\n', r"x\.jsonl:1: a line holds one JSON object"),
        (b"\xff\xfe\x00\n", r"x\.jsonl:1: not UTF-8"),
        (b'{"text": null}\n', r"x\.jsonl:1: field 'text' holds null"),
        (b'{"text": ["a"]}\n', r"x\.jsonl:1: field 'text' holds list"),
        (b"null\n", r"x\.jsonl:1: a line holds one JSON object, not null"),
        (b'{"text": "a"}\n' + b"[" * 10**5 + b"]" * 10**5, r"x\.jsonl:2: JSON nested too deeply"),
        (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", r"x\.jsonl:1: a number too long to be read"),
        (b'{"text": "a", "id": 1, "text": "b"}\n', r"x\.jsonl:1: field 'text' is given 2 times; keep one"),
        (b'{"text": "a", "\\u0074ext": "b"}\n', r"x\.jsonl:1: field 'text' is given 2 times; keep one"),
        (b'{"text": "a"}\n\0\0\0\0', r"x\.jsonl:2: not valid JSON"),
        (b'{"text": "a"} {"text": "b"}\n', r"x\.jsonl:1: not valid JSON"),
        (b"", r"x\.jsonl: the file is empty"),
        (b"\xef\xbb\xbf", r"x\.jsonl is empty"),
        (b'{"text": "  "}\n', r"x\.jsonl is empty"),
    ],
)
def test_bad_jsonl(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read("jsonl", tmp_path / "x.jsonl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        '"meta": {"text": "b"}',
        '"id": "text"',
        '"id": [{"text": 1}, {"text": 2}]',
        '"id": {"a": 1, "a": 2}',
        '"id": 1, "id": 2',
    ],
)
def test_a_fields_name_elsewhere_in_a_line(tmp_path: Path, more: str) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a", {more}}}\n')
    assert read("jsonl", tmp_path / "x.jsonl") == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x7fELF\0\0", "a binary file"),
        ("text".encode("utf-16"), "UTF-16 text; convert it"),
        ("naïve".encode("latin-1"), "not UTF-8 text"),
    ],
)
def test_bad_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.bin: {message}"):
        read("text", tmp_path)


def test_marks_line_ends_and_characters_that_are_text(tmp_path: Path) -> None:
    mark, path = b"\xef\xbb\xbf", tmp_path / "x.jsonl"
    path.write_bytes(
        mark + b'{"text": "a"}\r\n\r\n' + mark + b'{"text": "b\\u0000c"}\r\n{"text": "\\ud83d\\ude42"}'
    )
    assert read("jsonl", path) == ["a", "b\0c", "🙂"]
    (tmp_path / "x.txt").write_bytes(mark + b"one\r\ntwo\r")
    assert read("text", tmp_path / "x.txt") == ["one\r\ntwo\r"]


def broken_strings(texts: list[bytes]) -> pyarrow.Array:
    """Strings that are not checked to be UTF-8, as other programs write them."""
    raw = pyarrow.array(texts, pyarrow.binary())
    return pyarrow.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])


@pytest.mark.parametrize("row", [0, 1023, 1024, 1500])
def test_parquet_strings_that_are_not_utf8(tmp_path: Path, row: int) -> None:
    texts = [f"text {k}".encode() for k in range(1501)]
    texts[row] = b"\xff\xfe"
    pyarrow.parquet.write_table(pyarrow.table({"text": broken_strings(texts)}), tmp_path / "x.parquet")
    got = documents(SourceSpec(type="parquet", path=str(tmp_path)))
    assert [next(got) for _ in range(row)] == [text.decode() for text in texts[:row]]
    with pytest.raises(DataError, match=rf"x\.parquet: row {row}: column 'text' is not UTF-8 text"):
        next(got)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a", None], r"x\.parquet: row 1: field 'text' holds null"),
        ([1, 2], r"x\.parquet: row 0: field 'text' holds int"),
        ([b"a"], r"x\.parquet: row 0: field 'text' holds bytes"),
        ([["a"]], r"x\.parquet: row 0: field 'text' holds list"),
    ],
)
def test_parquet_columns_that_are_no_text(tmp_path: Path, column: list[object], message: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        read("parquet", tmp_path)


def test_parquet_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": make_texts(500)}), path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"x\.parquet: not a readable Parquet file, from row 0 on") as caught:
        read("parquet", path)
    assert "\n" not in str(caught.value)
    path.write_bytes(data[:1000] + bytes(2000) + data[3000:])
    with pytest.raises(DataError, match=r"x\.parquet: (not a readable Parquet file|row \d+)"):
        read("parquet", path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read("text", tmp_path / "absent.txt")
    with pytest.raises(DataError, match="no file matches this pattern"):
        read("text", tmp_path / "*.txt")
    with pytest.raises(DataError, match=r"no \.jsonl .*file in this folder"):
        read("jsonl", tmp_path)
    with pytest.raises(DataError, match="needs a path"):
        list(documents(SourceSpec(type="jsonl")))
    with pytest.raises(DataError, match="unknown; known: python-docs"):
        read("csv", tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_archives(tmp_path: Path, suffix: str) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    data = pack("\n".join(json.dumps({"text": t}) for t in make_texts(200)).encode())
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(b"not packed\n")
    with pytest.raises(DataError, match="damaged archive"):
        read("jsonl", path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="damaged archive"):
        read("jsonl", path)


def test_python_docs(python_docs: list[str]) -> None:
    texts = python_docs
    assert len(set(texts)) == len(texts) > 300
    assert 1_500_000 < sum(map(len, texts)) < 4_000_000
    assert sorted(map(len, texts))[len(texts) // 10] > 150, "documents are not tiny"
    assert any("json.loads(" in text for text in texts)
    assert list(documents(SourceSpec(limit=5))) == texts[:5]


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet", "hf"])
def test_a_limit_counts_the_documents_that_are_read(tmp_path: Path, kind: str) -> None:
    texts = ["one", " \n", "", "two", "\t", "three"]
    folder = tmp_path / "source"
    folder.mkdir()
    if kind == "jsonl":
        write_jsonl(folder / "x.jsonl", texts)
    elif kind == "text":
        for number, text in enumerate(texts):
            (folder / f"{number}.txt").write_text(text)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "x.parquet")
    else:
        import datasets

        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder))
    for limit in (1, 2, 3, 4):
        assert read(kind, folder, limit=limit) == ["one", "two", "three"][:limit]


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    spec = SourceSpec(type="jsonl", path=str(path))
    before = fingerprint(spec)
    assert before == fingerprint(spec)
    assert before != fingerprint(replace(spec, limit=2))
    write_jsonl(path, TEXTS[1:])
    assert before != fingerprint(spec)
