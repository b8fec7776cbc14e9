"""Held-out documents: how they are found, read and cut, cloze passages made of them, gzip's figure."""

import ast
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from lrnn_lm.evaluate import check_tasks
from lrnn_lm.evaluate.tasks import heldout
from lrnn_lm.runs.layout import RunFolder


def test_the_run_of_a_checkpoint_holds_the_documents(checkpoint, tmp_path, write_documents):
    run = checkpoint.parent.parent
    assert heldout.heldout_path(None, checkpoint) == run / "heldout.jsonl"
    assert heldout.heldout_path(None, run / "checkpoints" / "latest") == run / "heldout.jsonl"
    assert heldout.heldout_path(run, None) == run / "heldout.jsonl"
    prepared = write_documents(tmp_path / "validation.jsonl")
    assert heldout.heldout_path(tmp_path, checkpoint) == prepared
    with pytest.raises(ValueError, match="--data FILE"):
        heldout.heldout_path(None, tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        heldout.heldout_path(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no documents"),
        (b'{"text": "  "}\n', "holds no documents"),
        (b'{"text": "a"}\n{"tex', "line 2"),
        (b'{"txt": "a"}\n', "line 1"),
        (b'{"text": 3}\n', "line 1"),
        (b"[1]\n", "line 1"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        heldout.read_documents(path)


def test_reading_stops_at_the_byte_budget(tmp_path, write_documents):
    path = write_documents(tmp_path / "d.jsonl", ["abc", " ", "défg", "never read"])
    assert heldout.read_documents(path, max_bytes=7) == ["abc", "défg"]


@pytest.mark.parametrize(
    "document", ["", "x", "word " * 50, "line\n" * 50, "x" * 1000, "a\n" + "y" * 99 + " z" * 60]
)
@pytest.mark.parametrize("size", [10, 64, 100])
def test_pieces_join_to_the_document(document, size):
    pieces = heldout.cut(document, size)
    assert "".join(pieces) == document
    assert all(len(piece) <= size for piece in pieces)


def test_pieces_end_at_white_space_where_there_is_some():
    assert heldout.cut("aaaa bbbb\ncccc dddd", 12) == ["aaaa bbbb\n", "cccc dddd"]


def test_passages_hold_the_documents_bytes_in_order(tmp_path, documents, write_documents):
    documents = [*documents, "long words " * 2000]
    rows = heldout.heldout_dataset(data=str(write_documents(tmp_path / "d.jsonl", documents)))["test"]
    assert "".join(rows["text"]) == "".join(documents)
    assert rows["index"] == list(range(len(rows)))
    assert max(map(len, rows["text"])) <= heldout.PASSAGE_CHARACTERS


@pytest.mark.skipif(shutil.which("gzip") is None, reason="no gzip command")
def test_gzip_figure_is_that_of_the_command(documents):
    text = "".join(documents).encode()
    shell = subprocess.run(["gzip", "-9", "-c", "-n"], input=text, stdout=subprocess.PIPE, check=True).stdout
    ours = heldout.gzip_bits_per_byte(list(enumerate(documents))[::-1])  # the order given does not matter
    assert ours == pytest.approx(8 * len(shell) / len(text), rel=1e-3)


def test_cloze_asks_for_a_final_word_seen_before(tmp_path, documents, write_documents):
    path = write_documents(tmp_path / "d.jsonl")
    rows = list(heldout.cloze_dataset(data=str(path))["test"])
    answers = {row["answer"] for row in rows}
    assert {" river", " roses", " source", " strangers"} <= answers
    whole = [row["context"] + row["answer"] for row in rows]
    assert all(any(text in document for document in documents) for text in whole), (
        "text must stand as written"
    )
    assert len(set(whole)) == len(whole)
    for row in rows:
        assert row["answer"].strip().isalpha()
        assert len(row["answer"].strip()) >= heldout.CLOZE_LETTERS
        assert not row["context"].endswith((" ", "\n"))
    assert rows == list(heldout.cloze_dataset(data=str(path))["test"])


def test_cloze_prefers_repeated_answers_and_caps_the_number(tmp_path, monkeypatch, write_documents):
    path = str(write_documents(tmp_path / "d.jsonl"))
    every = list(heldout.cloze_dataset(data=path)["test"])
    monkeypatch.setattr(heldout, "CLOZE_ENOUGH", 2)
    monkeypatch.setattr(heldout, "CLOZE_PASSAGES", 3)
    few = list(heldout.cloze_dataset(data=path)["test"])
    assert len(few) == 3
    assert all(row["repeated"] for row in few)
    assert [row for row in every if row in few] == few, "the cap keeps the order"


def test_cloze_says_when_no_passage_fits(tmp_path, write_documents):
    path = write_documents(tmp_path / "d.jsonl", ["Only code: x = 1; y = 2", "Too short. Really."])
    with pytest.raises(ValueError, match="heldout_cloze"):
        heldout.cloze_dataset(data=str(path))


def test_words_and_bytes_are_counted_as_upstream_counts_them():
    scores = heldout.score_passage({"index": 0, "text": "naïve  words\n"}, [-3.0])
    assert scores["bits_per_byte"] == (-3.0, len("naïve  words\n".encode()))
    assert scores["word_perplexity"] == (-3.0, 3)  # the part after the last white space counts, though empty
    json.dumps(scores)


def test_a_cloze_that_the_documents_cannot_fill_is_told_before_training(tmp_path):
    path = tmp_path / "heldout.jsonl"
    path.write_text(json.dumps({"text": "one two three four " * 50}) + "\n")
    check_tasks(["heldout_bits_per_byte"], path)
    with pytest.raises(ValueError, match="leave heldout_cloze out"):
        check_tasks(["heldout_bits_per_byte", "heldout_cloze"], path)


def test_the_file_stands_alone(tmp_path):
    """Beside an exported model it is copied to the YAML files, where this package may not be."""
    alone = shutil.copy(heldout.__file__, tmp_path / "functions.py")
    names = {
        n.module or "" for n in ast.walk(ast.parse(Path(alone).read_text())) if isinstance(n, ast.ImportFrom)
    }
    assert not any(name.startswith("lrnn_lm") for name in names)
    assert RunFolder(tmp_path).heldout.name == heldout.HELDOUT_NAME
    spec = importlib.util.spec_from_file_location("functions", alone)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # a relative import would fail here
