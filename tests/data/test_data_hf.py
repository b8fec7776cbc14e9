"""Sources of type `hf`: their documents, and what they say when they cannot be read."""

import gzip
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from corpora import make_texts, read, write_jsonl

from lrnn_lm.data import DataError, SourceSpec
from lrnn_lm.data.sources import documents

TEXTS = make_texts(7)


GOOD = b'{"text": "one"}\n{"text": "two"}\n'
DEEP = b'{"text": "a", "tree": ' + b"[" * 1100 + b"]" * 1100 + b"}\n"


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
