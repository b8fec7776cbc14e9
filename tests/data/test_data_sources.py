"""Every kind of source: its documents, and what it says when it cannot be read."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpora import make_texts, write_jsonl

from lrnn_lm.data import DataError, SourceSpec
from lrnn_lm.data.sources import documents, fingerprint

TEXTS = make_texts(7)


def read(type: str, path: Path | str, **keys: object) -> list[str]:
    return list(documents(SourceSpec(type=type, path=str(path), **keys)))


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


def test_hf_saved_and_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    saved = datasets.Dataset.from_dict({"text": TEXTS})
    saved.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", TEXTS)
    for name in ("single", "splits", "folder"):
        assert read("hf", tmp_path / name) == TEXTS, name
    with pytest.raises(DataError, match=r"no split 'test'.*train"):
        read("hf", tmp_path / "splits", split="test")
    for split in ("train[:1]", "train+test"):
        with pytest.raises(DataError, match="with one split is read whole"):
            read("hf", tmp_path / "single", split=split)
    with pytest.raises(DataError, match=r"no field 'body'.*one of: text"):
        read("hf", tmp_path / "single", text_field="body")
    with pytest.raises(DataError, match="no such file or folder"):
        read("hf", tmp_path / "absent")


@pytest.mark.parametrize("kind", ["Image", "Audio"])
def test_pictures_and_sound_beside_the_text_are_not_decoded(tmp_path: Path, kind: str) -> None:
    """They may be broken, and what decodes them may not be installed. A saved format hides no column."""
    import datasets

    cells = [{"bytes": b"none", "path": None}] * len(TEXTS)
    features = datasets.Features({"text": datasets.Value("string"), "other": getattr(datasets, kind)()})
    table = pyarrow.table([TEXTS, pyarrow.array(cells)], names=["text", "other"]).cast(features.arrow_schema)
    made = datasets.Dataset(table)
    made.to_parquet(tmp_path / "folder" / "train.parquet")
    made.with_format("numpy", columns=["other"]).save_to_disk(str(tmp_path / "saved"))
    for name in ("folder", "saved"):
        assert read("hf", tmp_path / name) == TEXTS, name
        with pytest.raises(DataError, match=r"no field 'body'.*one of: text, other"):
            read("hf", tmp_path / name, text_field="body")


def test_another_split_than_the_one_saved_is_refused(tmp_path: Path) -> None:
    """Its name was ignored, for the rows of the split that is there."""
    import datasets

    for there in (None, "train", "validation", "train[:10%]"):
        folder = tmp_path / str(there)
        saved = datasets.Dataset.from_dict({"text": TEXTS})
        saved._split = there and datasets.NamedSplit(there)
        saved.save_to_disk(str(folder))
        assert read("hf", folder) == TEXTS, "the default takes what was saved"
        for asked in ("train", "validation", "test", "train[:10%]"):
            if asked in ("train", there) or (there is None and "[" not in asked):
                assert read("hf", folder, split=asked) == TEXTS, (there, asked)
                continue
            with pytest.raises(DataError) as told:
                read("hf", folder, split=asked)
            assert repr(asked) in str(told.value)
            assert "[" in asked or f"holds {there!r}" in str(told.value)


def test_a_part_of_train_test_split_is_known_by_its_folder(tmp_path: Path) -> None:
    """Both parts are called 'train' inside: `split: test` for the folder `test` was refused."""
    import datasets

    whole = datasets.Dataset.from_dict({"text": TEXTS})
    whole._split = datasets.NamedSplit("train")
    parts = whole.train_test_split(test_size=1, shuffle=False)
    parts.save_to_disk(str(tmp_path))
    assert read("hf", tmp_path / "test", split="test") == read("hf", tmp_path, split="test") == TEXTS[-1:]
    assert read("hf", tmp_path / "train") == TEXTS[:-1]
    with pytest.raises(DataError, match=r"leave data\.source\.split out"):
        read("hf", tmp_path / "test", split="validation")


def test_hub_dataset_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing .*give the folder of a local copy"):
        read("hf", "nobody/nothing")


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


GOOD = b'{"text": "one"}\n{"text": "two"}\n'
DEEP = b'{"text": "a", "tree": ' + b"[" * 1100 + b"]" * 1100 + b"}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.jsonl", b'{"text": "a", "more": 1}', r"b\.jsonl: .*near row 0 \(.*\); all its files must have"),
        ("b.jsonl", b'{"text": "a"}\n{"text": ', r"b\.jsonl: reading stopped near row 0"),
        ("b.jsonl", b'{"text": "\xff"}', r"b\.jsonl: reading stopped near row 0"),
        ("b.jsonl", b'{"text": "\\ud800"}', r"b\.jsonl: reading stopped near row 0"),
        ("b.jsonl", b'{"text": "a"}\n{"text": null}', r"b\.jsonl: row 1: field 'text' holds null"),
        ("b.jsonl", DEEP, r"b\.jsonl: reading stopped near row 0"),
        ("0.jsonl", DEEP, r"nested too deeply \(of JSON, data\.source\.type=jsonl says which\)"),
        ("b.jsonl.gz", b"\x1f\x8b\x08\0broken", r"b\.jsonl\.gz: reading stopped near row 0"),
        ("b.jsonl.gz", gzip.compress(GOOD * 50, mtime=0)[:-30], r"b\.jsonl\.gz: reading stopped near row 0"),
    ],
)
def test_local_hf_files_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, name: str, content: bytes, message: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(GOOD)
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read("hf", folder)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == "", "one line tells it"


def test_hf_files_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    for k in range(4):
        write_jsonl(folder / f"{k}.jsonl", TEXTS[2 * k : 2 * k + 2])
    assert read("hf", folder) == TEXTS
    assert read("hf", folder, limit=3) == TEXTS[:3]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.parquet").write_bytes(b"PAR1 but no more")
    still_open = documents(SourceSpec(type="hf", path=str(folder)))
    next(still_open)  # a reader that is not at its end must not take the messages of another
    with pytest.raises(DataError, match=r"broken \(split train\) cannot be loaded \(.*x\.parquet"):
        read("hf", tmp_path / "broken")


@pytest.mark.parametrize("more", ["b.csv", "README.md", "dataset_infos.json", "LICENSE.txt"])
def test_files_of_another_kind_in_an_hf_folder_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, text in (("a", "one"), ("c", "two")):
        write_jsonl(folder / f"{name}.jsonl", [text])
    (folder / more).write_text("{}" if more.endswith(".json") else "text\nthree\n")
    for _ in range(2):
        assert list(documents(SourceSpec("hf", str(folder)))) == ["one", "two"]
    assert capsys.readouterr().err.count("files are left out") == (more == "b.csv")


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
