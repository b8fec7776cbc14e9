"""`prepare`: what it leaves, that it does so once and whole, and what it says to mistakes."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpora import leftovers, make_texts, write_jsonl, write_recipe
from transformers import AutoTokenizer

from lrnn_lm.data import (
    DataError,
    DataSpec,
    PreparedData,
    SourceSpec,
    open_prepared,
    prepare,
    prepare_all,
    tokenizer_hash,
)
from lrnn_lm.data.sources import documents
from lrnn_lm.data.tokenize import load_backend
from lrnn_lm.train.sources import notes


def stream(shards) -> tuple[np.ndarray, np.ndarray]:
    return shards.read(0, shards.num_tokens), shards.document_starts(0, shards.num_tokens)


def heldout(prepared: PreparedData) -> list[str]:
    return [json.loads(line)["text"] for line in prepared.heldout_path.read_text().splitlines()]


def test_tokens_are_the_documents(prepared: PreparedData) -> None:
    source = SourceSpec(**prepared.manifest["source"])
    held = heldout(prepared)
    train = [text for text in documents(source) if text not in set(held)]
    tokenizer = load_backend(prepared.tokenizer_dir)
    for shards, texts in [(prepared.train, train), (prepared.validation, held)]:
        tokens, starts = stream(shards)
        assert len(starts) == len(texts) == shards.num_documents > 0
        assert shards.num_bytes == sum(len(text.encode()) for text in texts)
        assert shards.dtype == np.uint16
        for text, ids in zip(texts, np.split(tokens, starts[1:]), strict=True):
            assert (ids[0], ids[-1]) == (1, 2)
            assert tokenizer.decode(ids[1:-1].tolist()) == text
    assert len(prepared.manifest["splits"]["train"]["shards"]) > 2
    assert prepared.vocab_size == 400
    assert prepared.tokenizer_hash == tokenizer_hash(prepared.tokenizer_dir)
    assert (
        prepared.manifest["content_hash"]
        == open_prepared(prepared.folder, verify=True).manifest["content_hash"]
    )


def test_reading_across_shards(prepared: PreparedData) -> None:
    tokens, starts = stream(prepared.train)
    for start, stop in [(0, 1), (1400, 1700), (0, 4000), (1499, 1501), (len(tokens) - 5, len(tokens) + 20)]:
        assert prepared.train.read(start, stop).tolist() == tokens[start:stop].tolist()
        expected = [p - start for p in starts if start <= p < stop]
        assert prepared.train.document_starts(start, stop).tolist() == expected


def test_second_call_does_nothing(spec: DataSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(spec, progress=False)
    before = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")}
    monkeypatch.setattr("lrnn_lm.data.storage.build_folder", None)
    started = time.process_time()
    second = prepare(spec, progress=False)
    assert time.process_time() - started < 1
    assert second.folder == first.folder
    assert before == {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")}


def test_bytes_do_not_depend_on_processes_or_place(spec: DataSpec, tmp_path: Path) -> None:
    one = prepare(spec, progress=False)
    two = prepare(replace(spec, num_proc=2, cache_dir=str(tmp_path / "other")), progress=False)
    assert one.folder.name == two.folder.name
    assert one.manifest == two.manifest
    other_rows = prepare(replace(spec, sequence_length=16), progress=False)
    assert other_rows.folder == one.folder
    with pytest.raises(AssertionError):
        assert prepare(replace(spec, validation_fraction=0.5), progress=False).folder == one.folder


def test_split_is_by_text(spec: DataSpec, tmp_path: Path) -> None:
    texts = make_texts(60)
    twice = write_jsonl(tmp_path / "twice.jsonl", texts[::-1] + texts)
    again = prepare(replace(spec, source=SourceSpec(type="jsonl", path=str(twice))), progress=False)
    held = heldout(prepare(spec, progress=False))
    assert set(heldout(again)) == set(held), "whatever the order"
    assert again.train.num_documents + again.validation.num_documents == 120
    assert again.train.num_documents == 2 * (60 - len(held)), "no copy of a held-out text is trained on"


def test_short_training_documents_are_left_out(spec: DataSpec) -> None:
    """By their tokens of text; the held-out text and the tokenizer stay, and what is left out is told."""
    whole = prepare(spec, progress=False)
    tokens, starts = stream(whole.train)
    kept = np.split(tokens, starts[1:])
    lengths = sorted(len(ids) - 2 for ids in kept)
    least = lengths[len(lengths) // 2]
    assert lengths[0] < least < lengths[-1]
    long = prepare(replace(spec, min_document=least), progress=False)
    tokens, starts = stream(long.train)
    assert tokens.tolist() == [i for ids in kept if len(ids) - 2 >= least for i in ids]
    assert heldout(long) == heldout(whole)
    assert long.tokenizer_hash == whole.tokenizer_hash
    short = [length for length in lengths if length < least]
    facts = {"below": least, "num_documents": len(short), "num_tokens": sum(short)}
    assert long.manifest["splits"]["train"]["short"] == facts
    assert "short" not in whole.manifest["splits"]["train"]
    with pytest.raises(DataError, match=f"min_document 9,999 .* has {lengths[-1]:,} tokens"):
        prepare(replace(spec, min_document=9999), progress=False)


def test_validation_source(spec: DataSpec, tmp_path: Path) -> None:
    texts = make_texts(60)
    held = [*texts[5:8], "something else altogether"]
    source = SourceSpec(type="jsonl", path=str(write_jsonl(tmp_path / "held.jsonl", held)))
    prepared = prepare(replace(spec, validation_source=source), progress=False)
    assert heldout(prepared) == held
    assert prepared.train.num_documents == 57
    assert prepared.manifest["validation_fraction"] is None
    with pytest.raises(DataError, match="no document is left for train"):
        prepare(replace(spec, validation_source=spec.source), progress=False)


@pytest.mark.parametrize("fraction", [1e-6, 0.999999])
def test_small_corpus_gives_each_side_a_document(spec: DataSpec, fraction: float) -> None:
    prepared = prepare(replace(spec, validation_fraction=fraction), progress=False)
    assert min(prepared.train.num_documents, prepared.validation.num_documents) == 1
    assert prepared.train.num_documents + prepared.validation.num_documents == 60


@pytest.mark.parametrize("rare", [["the gates \u6570", "the \u5b66 \u6570"], []])
def test_text_behind_unknown_tokens_has_no_bytes_to_be_divided_by(
    spec: DataSpec, tmp_path: Path, rare: list[str]
) -> None:
    """One likely token would stand for any number of bytes: bits per byte would be too low."""
    recipe = write_recipe(tmp_path / "plain.yaml", vocab_size=120, byte_fallback="false")
    texts = ["the state of values", *rare]
    held = SourceSpec("jsonl", str(write_jsonl(tmp_path / "held.jsonl", texts)))
    found = prepare(replace(spec, tokenizer=str(recipe), vocab_size=None, validation_source=held))
    assert found.validation.num_bytes == (None if rare else len(texts[0]))
    assert found.train.num_bytes > 0
    assert ["bits per byte is left out: 2" in line for line in notes(found)] == [True] * bool(rare)


@pytest.mark.parametrize("keeps", [True, False])
def test_text_that_the_tokenizer_changes_is_counted(spec: DataSpec, tmp_path: Path, keeps: bool) -> None:
    """Case that is not predicted makes bits per byte too low. A space put before a text changes nothing."""
    from transformers import AutoTokenizer

    from tokenizers import normalizers

    first = prepare(spec, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(first.tokenizer_dir)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ") if keeps else normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "ready")
    texts = ["the state", "The State", "GATES", "values"]
    held = SourceSpec("jsonl", str(write_jsonl(tmp_path / "held.jsonl", texts)))
    ready = replace(spec, tokenizer=str(tmp_path / "ready"), vocab_size=None, validation_source=held)
    found = prepare(ready, progress=False)
    assert found.validation.num_bytes == sum(map(len, texts))
    assert [line.split(" documents ")[0] for line in notes(found)] == ["2 held-out"] * (not keeps)


def test_a_lone_text_file_is_cut(spec: DataSpec, tmp_path: Path) -> None:
    text = "\n\n".join(make_texts(60))
    (tmp_path / "only.txt").write_text(text)
    source = SourceSpec(type="text", path=str(tmp_path / "only.txt"))
    parts = list(documents(source))
    assert "".join(parts) == text
    assert len(parts) > 20
    assert sum(part.endswith("\n\n") for part in parts) > len(parts) // 2
    prepared = prepare(replace(spec, source=source), progress=False)
    assert prepared.train.num_documents + prepared.validation.num_documents == len(parts)
    (tmp_path / "only.txt").write_text("x" * 1000)  # nowhere to cut, every part the same
    assert "".join(documents(source)) == "x" * 1000


@pytest.mark.parametrize("tokenizer", ["trained", "ready"])
@pytest.mark.parametrize("only", ["one document", "held-out text"])
def test_a_source_that_cannot_be_split_is_named(
    spec: DataSpec, tmp_path: Path, tokenizer: str, only: str
) -> None:
    """Also one of many."""
    texts = make_texts(60)
    texts = ["".join(texts)] if only == "one document" else texts[:20]
    source = SourceSpec(type="jsonl", path=str(write_jsonl(tmp_path / "only.jsonl", texts)))
    if tokenizer == "ready":
        spec = replace(spec, tokenizer=str(prepare(spec, progress=False).tokenizer_dir))
    other = replace(spec, source=source, validation_source=source if only == "held-out text" else None)
    with pytest.raises(DataError, match=r"^jsonl .*only.jsonl: no document is left for .*validation_source"):
        prepare_all([spec, other], progress=False)
    assert leftovers(spec) == []


def test_mistakes(spec: DataSpec, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"too short: its \d+ training tokens do not fill one row .* = 100001"
    ):
        prepare(replace(spec, sequence_length=100_000), progress=False)
    with pytest.raises(DataError, match="largest that works"):
        prepare(replace(spec, vocab_size=9000), progress=False)
    with pytest.raises(DataError, match="no such tokenizer recipe"):
        prepare(replace(spec, tokenizer="absent.yaml"), progress=False)
    with pytest.raises(DataError, match="not this file"):
        prepare(replace(spec, tokenizer=spec.source.path), progress=False)
    with pytest.raises(DataError, match="no such file"):
        prepare(replace(spec, source=SourceSpec(type="text", path="absent.txt")), progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write to data\.cache_dir"):
        prepare(replace(spec, cache_dir=str(tmp_path / "file" / "cache")), progress=False)
    ready = prepare(spec, progress=False).tokenizer_dir
    with pytest.raises(DataError, match="has 400 tokens, which do not fit in vocab_size 300"):
        prepare(replace(spec, tokenizer=str(ready), vocab_size=300), progress=False)
    assert leftovers(spec) == []


def test_ready_tokenizer_and_its_hash(spec: DataSpec, tmp_path: Path) -> None:
    trained = prepare(spec, progress=False)
    ready = prepare(replace(spec, tokenizer=str(trained.tokenizer_dir)), progress=False)
    assert ready.tokenizer_hash == trained.tokenizer_hash
    assert ready.manifest["files"] == trained.manifest["files"]
    other = prepare(
        replace(spec, tokenizer=str(write_recipe(tmp_path / "other.yaml", vocab_size=420))), progress=False
    )
    ready.check_tokenizer(trained.tokenizer_dir)
    with pytest.raises(DataError, match="is not the one that made the shards"):
        ready.check_tokenizer(other.tokenizer_dir)


def test_a_changed_chat_template_is_taken(spec: DataSpec, tmp_path: Path) -> None:
    """transformers keeps them in files of their own. A run of the same text goes on with the new ones."""
    folder = tmp_path / "chats"
    shutil.copytree(prepare(spec, progress=False).tokenizer_dir, folder)
    spec, contents = replace(spec, tokenizer=str(folder)), set()
    for templates in ({"default": "a", "tool_use": "t"}, {"default": "b", "tool_use": "t"},
                      {"default": "b", "tool_use": "u"}):  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = templates
        tokenizer.save_pretrained(folder)
        made = prepare(spec, progress=False)
        assert AutoTokenizer.from_pretrained(made.tokenizer_dir).chat_template == templates
        contents.add(made.manifest["content_hash"])
    assert len(contents) == 1


@pytest.mark.parametrize("special", [("<e>", None), ("<e>", "<e>"), ("<e>", "<b>")])
def test_first_and_last_token(spec: DataSpec, tmp_path: Path, special: tuple[str, str | None]) -> None:
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    eos, bos = special
    names = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **names).save_pretrained(
        tmp_path / "ready"
    )
    prepared = prepare(replace(spec, tokenizer=str(tmp_path / "ready")), progress=False)
    tokens, starts = stream(prepared.train)
    to_id = load_backend(prepared.tokenizer_dir).token_to_id
    assert set(tokens[starts]) == {to_id(bos or eos)}
    assert set(tokens[np.append(starts[1:], len(tokens)) - 1]) == {to_id(eos)}


def test_wide_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    from lrnn_lm.data.shards import ShardWriter, TokenShards, token_dtype

    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32
    writer = ShardWriter(tmp_path, "train", token_dtype(70_000), 10)
    writer.add(np.array([69_999, 1, 2], np.uint32), 5)
    writer.close()
    manifest = {"dtype": "uint32", "splits": {"train": writer.summary()}, "files": writer.files}
    assert TokenShards(tmp_path, "train", manifest).read(0, 3).tolist() == [69_999, 1, 2]


@pytest.mark.slow  # `make test-fresh` prepares it too
def test_python_docs_whole(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "tokenizers" / "bpe-4k.yaml"
    spec = DataSpec(tokenizer=str(recipe), sequence_length=256, cache_dir=str(tmp_path), num_proc=2)
    prepared = prepare(spec, progress=False)
    assert prepared.vocab_size == 4096
    assert prepared.train.num_tokens > 400_000
    assert prepared.validation.num_documents > 5
    assert 3 < prepared.train.num_bytes / prepared.train.num_tokens < 5
