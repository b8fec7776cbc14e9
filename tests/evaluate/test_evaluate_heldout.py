"""Held-out documents: how they are found, read and cut, cloze passages made of them, gzip's figure."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lrnn_lm.evaluate import check_tasks
from lrnn_lm.evaluate.tasks import heldout
from lrnn_lm.evaluate.tasks.names import find_tasks
from lrnn_lm.runs.layout import RunFolder


def test_the_run_of_a_checkpoint_holds_the_documents(checkpoint, tmp_path, write_documents, monkeypatch):
    run = checkpoint.parent.parent
    assert heldout.heldout_path(None, checkpoint) == run / "heldout.jsonl"
    assert heldout.heldout_path(None, run / "checkpoints" / "latest") == run / "heldout.jsonl"
    assert heldout.heldout_path(run, None) == run / "heldout.jsonl"
    prepared = write_documents(tmp_path / "validation.jsonl")
    assert heldout.heldout_path(tmp_path, checkpoint) == prepared
    with pytest.raises(ValueError, match="--data FILE"):
        heldout.heldout_path(None, tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert heldout.heldout_path(f"~/{tmp_path.name}") == prepared
    home = Path("~") / os.path.relpath(checkpoint, tmp_path.parent)
    assert heldout.heldout_path(None, home) == run / "heldout.jsonl"
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
        (b"[" * 9000, "line 1"),
        (b'{"text": ' + b"9" * 9000 + b"}", "line 1"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        heldout.read_documents(path)


def test_blank_lines_are_no_documents(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('\ufeff\n{"text": "a"}\n \t\n{"text": ""}\n{"text": "b"}')
    assert heldout.read_documents(path) == ["a", "b"]


@pytest.mark.parametrize(("max_bytes", "read"), [(1, 1), (3, 1), (4, 2), (8, 2), (9, 3)])
def test_reading_stops_at_the_document_that_reaches_the_budget(tmp_path, write_documents, max_bytes, read):
    path = write_documents(tmp_path / "d.jsonl", ["abc", " ", "défg", "the rest"])
    assert heldout.read_documents(path, max_bytes=max_bytes) == ["abc", "défg", "the rest"][:read]


@pytest.mark.parametrize(
    "document", ["", "x", "word " * 50, "line\n" * 50, "x" * 1000, "a\n" + "y" * 99 + " z" * 60]
)
@pytest.mark.parametrize("size", [10, 64, 100])
def test_pieces_join_to_the_document(document, size):
    pieces = heldout.cut(document, size)
    assert "".join(pieces) == document
    assert all(len(piece) <= size for piece in pieces)


@pytest.mark.parametrize(
    ("document", "pieces"),
    [
        ("aaaa bbbb\ncccc dddd", ["aaaa bbbb\n", "cccc dddd"]),
        ("aaaaaa\nbb bb\nbbbb", ["aaaaaa\n", "bb bb\nbbbb"]),  # the first of the window's second half
        ("aaaaa\nbbbb b bbbb", ["aaaaa\nbbbb ", "b bbbb"]),  # the last of its first half is none
        ("aaaaa bbbbbbb\nb", ["aaaaa bbbbbb", "b\nb"]),
        ("aaaaaaa\tb bbbbbb", ["aaaaaaa\tb ", "bbbbbb"]),
        ("aaaaaaa b\tbbbbbb", ["aaaaaaa b\t", "bbbbbb"]),
        ("aaaaaaaaaaa\nb", ["aaaaaaaaaaa\n", "b"]),  # the window's last character
        ("aaaaaaaaaaaa", ["aaaaaaaaaaaa"]),
        ("aaaaaaaaaaaab", ["aaaaaaaaaaaa", "b"]),
    ],
)
def test_pieces_of_twelve_end_at_white_space_where_there_is_some(document, pieces):
    assert heldout.cut(document, 12) == pieces


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


def sentences(*counts_and_words):
    """Sentences of so many words each, of which the last is given."""
    return " ".join(" ".join(["it"] * (count - 1) + [word]) for count, word in counts_and_words)


@pytest.mark.parametrize(
    ("words", "last", "fits"),
    [
        (29, "word.", False), (30, "word.", True), (100, "word.", True), (101, "word.", False),
        (50, "ore.", False), (50, "ores.", True), (50, "Ores!", True), (50, 'ores?")', True),
        (50, "ores2.", False), (50, "co-ores.", False), (50, "ores", False),
    ],
)  # fmt: skip
def test_the_size_and_the_end_of_a_cloze_passage(words, last, fits):
    document = sentences((5, "now."), (5, "then."), (words - 10, last))
    (row,) = [*heldout._cloze_passages(document)] or [None]
    assert (row is not None) == fits
    if fits:
        answer = last.strip("\"').!?")
        assert row == {"context": document[: -len(f" {last}")], "answer": f" {answer}", "repeated": False}
    assert not [*heldout._cloze_passages(sentences((10, "now."), (words - 10, last)))], "of two sentences"


def test_the_shortest_passages_whose_answer_stands_earlier_and_others_between():
    ends = ["apples.", "rivers.", "stones.", "Rivers.", "clouds.", "meadow.", "forest.", "garden."]
    document = sentences(*((12, end) for end in ends))
    rows = [*heldout._cloze_passages(document)]
    assert [(row["answer"], row["repeated"]) for row in rows] == [(" Rivers", True), (" forest", False)]
    assert [len(row["context"].split()) for row in rows] == [4 * 12 - 1, 3 * 12 - 1]
    unlike = sentences(*((12, end) for end in [*ends[:3], *ends[4:]]))
    rows = [*heldout._cloze_passages(unlike)]
    assert [row["answer"] for row in rows] == [" stones", " forest"], "which do not overlap"


@pytest.mark.parametrize(("enough", "others"), [(1, 0), (2, 1), (4, 3), (9, 5)])
def test_other_passages_fill_up_to_enough(tmp_path, monkeypatch, write_documents, enough, others):
    alone = [sentences((12, "now."), (12, f"{3 * x}."), (12, f"{4 * x}.")) for x in "abcde"]
    repeated = sentences((12, "now."), (12, "river."), (12, "river."))
    path = str(write_documents(tmp_path / "d.jsonl", [*alone, repeated]))
    every = list(heldout.cloze_dataset(data=path)["test"])
    assert sum(row["repeated"] for row in every) == 1 == len(every) - 5
    monkeypatch.setattr(heldout, "CLOZE_ENOUGH", enough)
    few = list(heldout.cloze_dataset(data=path)["test"])
    assert sum(not row["repeated"] for row in few) == others == len(few) - 1
    assert [row for row in every if row in few] == few


@pytest.mark.parametrize(("repeated", "others", "rows"), [(310, 20, 300), (99, 20, 100), (101, 20, 101)])
def test_the_size_of_the_cloze_task(tmp_path, write_documents, repeated, others, rows):
    """Scores are compared between models, so the number of passages is a part of the task."""
    seen = [sentences((12, "river."), (12, f"{i}."), (12, "river.")) for i in range(repeated)]
    new = [sentences((12, "now."), (12, f"{i}."), (12, "river.")) for i in range(others)]
    found = heldout.cloze_dataset(data=str(write_documents(tmp_path / "d.jsonl", [*seen, *new])))["test"]
    assert len(found) == rows
    assert sum(found["repeated"]) == min(repeated, rows)


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
    for names in (["heldout_bits_per_byte", "heldout_cloze"], ["heldout_cloze"], ["heldout"], ["heldout_*"]):
        with pytest.raises(ValueError, match="ask for heldout_bits_per_byte alone") as told:
            check_tasks(names, path)
        for part in (str(path), "heldout_cloze, of the tag heldout", "30 to 100 words, and its 1 documents"):
            assert part in str(told.value)


def test_a_tag_is_checked_as_its_tasks_are():
    """A run with `eval.tasks: [heldout]` trained to its end before the cloze was refused."""
    manager = find_tasks(["heldout"], {})[0]
    tags = sorted(manager.all_tags)
    assert {"heldout", "mad", "state"} <= {*tags}
    for tag in tags:
        members = [task for task in manager.all_subtasks if tag in manager.task_index[task].tags]
        assert sorted(check_tasks([tag])) == sorted(members)
        assert members


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
