"""Token files of others: Megatron's pair and flat arrays give what tokenising their text here gives."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpora import make_texts, write_jsonl

from lrnn_lm.data import DataError, DataSpec, PreparedData, SourceSpec, open_prepared, prepare
from lrnn_lm.data.encode import Encoder
from lrnn_lm.data.token_files import read_token_files
from lrnn_lm.data.tokenize import load_backend, read_facts

BOS, EOS = 1, 2
TEXTS = make_texts(40, seed=7)
HELD = make_texts(6, seed=8)
CODES = {"uint16": 8, "int32": 4, "int64": 5}


@pytest.fixture(scope="module")
def tokenizer(prepared: PreparedData) -> Path:
    return prepared.tokenizer_dir


@pytest.fixture(scope="module")
def documents(tokenizer: Path) -> list[list[int]]:
    """The ids of TEXTS, without first and last token."""
    encoder = Encoder(tokenizer, read_facts(tokenizer))
    return [encoder(text)[1:-1].tolist() for text in TEXTS]


def megatron(path: Path, documents: list[list[int]], dtype: str = "uint16", parts: int = 1) -> Path:
    """A pair; each document in `parts` sequences."""
    pieces = [piece for ids in documents for piece in np.array_split(np.array(ids, dtype), parts)]
    np.concatenate(pieces).tofile(path.with_suffix(".bin"))
    sizes = np.array([len(piece) for piece in pieces], np.int32)
    pointers = (np.cumsum(sizes) - sizes).astype(np.int64) * np.dtype(dtype).itemsize
    order = np.arange(len(documents) + 1, dtype=np.int64) * parts
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, CODES[dtype], len(sizes), len(order))
    path.with_suffix(".idx").write_bytes(head + sizes.tobytes() + pointers.tobytes() + order.tobytes())
    return path


def flat(path: Path, documents: list[list[int]], dtype: str = "uint16", separator: int = EOS) -> Path:
    ids = np.array([i for document in documents for i in [*document, separator]], dtype)
    np.save(path, ids) if path.suffix == ".npy" else ids.tofile(path)
    return path


def spec_of(folder: Path, tokenizer: Path, kind: str, path: Path, **keys: object) -> DataSpec:
    source = SourceSpec(type=kind, path=str(path), **keys)
    return DataSpec(
        source=source, validation_fraction=0.2, tokenizer=str(tokenizer), sequence_length=32,
        cache_dir=str(folder / "cache"), num_proc=1,
    )  # fmt: skip


def make(folder: Path, form: str, documents: list[list[int]]) -> tuple[str, Path, dict[str, str]]:
    """Type, path and other keys of a source of these documents in a form."""
    ended = [[*ids, EOS] for ids in documents]
    if form == "megatron":
        return "megatron", megatron(folder / "m", ended), {}
    if form == "sentences":
        return "megatron", megatron(folder / "s", documents, "int32", parts=3).with_suffix(".bin"), {}
    if form == "npy":
        return "tokens", flat(folder / "a.npy", documents, "int64"), {}
    if form == "big-endian":
        np.save(folder / "e.npy", np.load(flat(folder / "a.npy", documents)).astype(">u2"))
        return "tokens", folder / "e.npy", {}
    if form == "bos":
        return "tokens", flat(folder / "b.bin", [[BOS, *ids] for ids in documents]), {}
    if form == "leading":  # the separator begins each document
        np.array([i for ids in documents for i in [EOS, *ids]], "uint16").tofile(folder / "l.bin")
        return "tokens", folder / "l.bin", {}
    if form == "named":
        return "tokens", flat(folder / "n.bin", documents, separator=3), {"separator": "<pad>"}
    if form == "files":
        flat(folder / "f-0.bin", documents[:13])
        flat(folder / "f-1.bin", documents[13:], "uint32")
        return "tokens", folder / "f-*.bin", {}
    return "tokens", flat(folder / "w.bin", documents, form), {}


FORMS = ["megatron", "sentences", "npy", "big-endian", "bos", "leading", "named", "files"]
FORMS += ["uint16", "int32", "uint32", "int64"]


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_the_text(
    tmp_path: Path, tokenizer: Path, documents: list[list[int]], form: str
) -> None:
    """The same held-out text beside both; the ids of every training row are equal."""
    held = SourceSpec(type="jsonl", path=str(write_jsonl(tmp_path / "held.jsonl", [*HELD, TEXTS[5]])))
    text = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    kind, path, keys = make(tmp_path, form, documents)
    made = [
        prepare(replace(spec_of(tmp_path, tokenizer, k, p, **keys), validation_source=held), progress=False)
        for k, p, keys in (("jsonl", text, {}), (kind, path, keys))
    ]
    own, foreign = (part.train for part in made)
    assert foreign.num_documents == own.num_documents == len(TEXTS) - 1, "a held-out text is left out"
    assert foreign.num_tokens == own.num_tokens
    for start, stop in (
        (0, own.num_tokens),
        (1000, 1033),
        (own.num_tokens - 3, own.num_tokens + 9),
        (31, 33),
    ):
        assert foreign.read(start, stop).tolist() == own.read(start, stop).tolist()
        assert foreign.document_starts(start, stop).tolist() == own.document_starts(start, stop).tolist()
    assert made[0].validation.num_bytes == made[1].validation.num_bytes
    open_prepared(made[1].folder, verify=True)


def test_short_documents_are_left_out_as_of_text(
    tmp_path: Path, tokenizer: Path, documents: list[list[int]]
) -> None:
    held = SourceSpec(type="jsonl", path=str(write_jsonl(tmp_path / "held.jsonl", HELD)))
    text = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    least = sorted(map(len, documents))[len(documents) // 2]

    def made(kind: str, path: Path, least: int = least):
        spec = replace(spec_of(tmp_path, tokenizer, kind, path), validation_source=held, min_document=least)
        return prepare(spec, progress=False)

    own, foreign = made("jsonl", text), made("megatron", megatron(tmp_path / "ids", documents))
    assert 0 < foreign.train.num_documents == own.train.num_documents < len(TEXTS)
    assert foreign.train.read(0, 10**6).tolist() == own.train.read(0, 10**6).tolist()
    assert foreign.manifest["splits"]["train"]["short"] == own.manifest["splits"]["train"]["short"]
    with pytest.raises(DataError, match="min_document 9,999 leaves no training document"):
        made("megatron", tmp_path / "ids.idx", 9999)


@pytest.mark.parametrize("form", ["megatron", "uint16"])
def test_a_fraction_is_held_out_and_its_bytes_are_known(
    tmp_path: Path, tokenizer: Path, documents: list[list[int]], form: str
) -> None:
    kind, path, _ = make(tmp_path, form, documents)
    spec = spec_of(tmp_path, tokenizer, kind, path)
    prepared = prepare(spec, progress=False)
    held = [json.loads(line)["text"] for line in prepared.heldout_path.read_text().splitlines()]
    assert 2 < len(held) < 20
    assert set(held) < set(TEXTS)
    assert prepared.validation.num_documents == len(held)
    assert prepared.validation.num_bytes == sum(len(text.encode()) for text in held)
    assert prepared.train.num_documents == len(TEXTS) - len(held)
    ids = prepared.validation.read(0, prepared.validation.num_tokens).tolist()
    encoder = Encoder(tokenizer, read_facts(tokenizer))
    assert ids == [i for text in held for i in encoder(text).tolist()]
    again = prepare(replace(spec, cache_dir=str(tmp_path / "other")), progress=False)
    assert again.manifest["content_hash"] == prepared.manifest["content_hash"]
    few = SourceSpec(type="tokens", path=str(flat(tmp_path / "few.npy", documents[:7])))
    named = prepare(replace(spec, validation_source=few), progress=False)
    assert named.validation.num_documents == 7
    assert named.train.num_documents == len(TEXTS) - 7, "held-out documents in any format are left out"


def test_content_does_not_depend_on_the_format(
    tmp_path: Path, tokenizer: Path, documents: list[list[int]]
) -> None:
    found = set()
    for form in ("uint16", "npy"):
        kind, path, keys = make(tmp_path, form, documents)
        prepared = prepare(spec_of(tmp_path, tokenizer, kind, path, **keys), progress=False)
        found.add(prepared.manifest["content_hash"])
    assert len(found) == 1


def test_few_documents_that_read_back_otherwise_are_left_out(
    tmp_path: Path, tokenizer: Path, documents: list[list[int]]
) -> None:
    """A document whose ids no text gives: alone it is left out; where all are so, no bytes are known."""
    letters = [load_backend(tokenizer).token_to_id(c) for c in "the state"]  # tokenising gives longer pieces
    odd = [[*letters, 300 + k] for k in range(40)]
    flat(tmp_path / "few.bin", [*documents, *documents, odd[0]])
    prepared = prepare(
        replace(spec_of(tmp_path, tokenizer, "tokens", tmp_path / "few.bin"), validation_fraction=0.9),
        progress=False,
    )
    assert prepared.validation.num_bytes
    flat(tmp_path / "all.bin", odd)
    prepared = prepare(spec_of(tmp_path, tokenizer, "tokens", tmp_path / "all.bin"), progress=False)
    assert prepared.validation.num_bytes is None
    assert prepared.manifest["splits"]["validation"]["changed"] == prepared.validation.num_documents


def test_a_file_of_no_ids_is_left_out(tmp_path: Path, tokenizer: Path, documents: list[list[int]]) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    flat(folder / "a.npy", documents)
    alone = prepare(spec_of(tmp_path, tokenizer, "tokens", folder), progress=False)
    np.save(folder / "0.npy", np.zeros(0, np.uint16))
    (folder / "b.npy").write_bytes(b"")
    beside = prepare(spec_of(tmp_path, tokenizer, "tokens", folder), progress=False)
    assert beside.folder != alone.folder
    assert beside.manifest["content_hash"] == alone.manifest["content_hash"]


def test_a_given_dtype_is_taken_where_only_the_beginning_is_zeros(
    tmp_path: Path, tokenizer: Path, documents: list[list[int]]
) -> None:
    ids = np.concatenate([np.zeros(2 << 20), *documents, [EOS, 1]]).astype(
        "<u2"
    )  # more than a dtype is found from
    ids.tofile(tmp_path / "a.bin")
    source = spec_of(tmp_path, tokenizer, "tokens", tmp_path / "a.bin", dtype="uint16").source
    (found,) = read_token_files(source, tokenizer, read_facts(tokenizer))
    assert (found.dtype, found.length) == (ids.dtype, len(ids))


def test_mistakes(tmp_path: Path, tokenizer: Path, documents: list[list[int]]) -> None:
    def fails(match: str, kind: str, path: Path, **keys: object) -> None:
        with pytest.raises(DataError, match=match) as caught:
            prepare(spec_of(tmp_path, tokenizer, kind, path, **keys), progress=False)
        assert "\n" not in str(caught.value)

    pair = megatron(tmp_path / "m", documents)
    whole, index = pair.with_suffix(".bin").read_bytes(), pair.with_suffix(".idx").read_bytes()
    pair.with_suffix(".bin").write_bytes(whole[:-100])
    fails(r"m\.bin: [\d,]+ bytes where its index says [\d,]+; truncated", "megatron", pair)
    pair.with_suffix(".bin").write_bytes(whole)
    pair.with_suffix(".idx").write_bytes(index[:-9])
    fails(r"m\.idx: truncated .*bytes where its header says", "megatron", pair)
    pair.with_suffix(".idx").write_bytes(index[:20])
    fails(r"m\.idx: truncated or no Megatron index", "megatron", pair)
    pair.with_suffix(".idx").write_bytes(index)
    pair.with_suffix(".bin").unlink()
    fails(r"m\.bin: no such file; m\.idx is its index", "megatron", pair)
    fails("no such file", "megatron", tmp_path / "absent")
    beyond = flat(tmp_path / "beyond.bin", [*documents[:3], [5, 400, 6]])
    fails(r"beyond\.bin: token [\d,]+ is 400, and the tokenizer has 400 ids", "tokens", beyond)
    short = tmp_path / "short.bin"
    short.write_bytes(beyond.read_bytes()[:101])
    fails(r"short\.bin: 101 bytes are no whole number of uint16 ids", "tokens", short)
    fails(
        "no separator between documents .id 2. in its",
        "tokens",
        flat(tmp_path / "x.bin", documents, separator=3),
    )
    fails("separator '<x>' is no token", "tokens", tmp_path / "x.bin", separator="<x>")
    fails("separator '4000' is no token", "tokens", tmp_path / "x.bin", separator="4000")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00")
    fails(r"bad\.npy: truncated or no \.npy file", "tokens", tmp_path / "bad.npy")
    flat(tmp_path / "raw.bin", documents).rename(tmp_path / "raw.npy")  # as dolma names them
    fails(r"raw\.npy: .*header is missing; .* name it \.bin", "tokens", tmp_path / "raw.npy")
    np.save(tmp_path / "float.npy", np.ones(9))
    fails(r"float\.npy: a row of whole numbers is expected, not float64", "tokens", tmp_path / "float.npy")
    for dtype, given in (("uint32", "uint16"), ("int64", "int32"), ("int64", "uint16")):
        wide = flat(tmp_path / f"{dtype}.bin", documents, dtype)
        fails(
            f"read as {given} every second number is 0, as in a file of {dtype}", "tokens", wide, dtype=given
        )
    np.savez(tmp_path / "a.npz", np.arange(9))
    fails(r"a\.npz: is packed, .* unpack it", "tokens", tmp_path / "a.npz")
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    fails(r"a\.npy: several arrays in an archive", "tokens", tmp_path / "a.npy")
    (tmp_path / "a.bin.gz").write_bytes(b"\0" * 9)
    fails(r"a\.bin\.gz: is packed, .* unpack it", "tokens", tmp_path / "a.bin.gz")
    with (tmp_path / "two.npy").open("wb") as file:  # of which numpy reads the first
        for _ in range(2):
            np.save(file, np.arange(9))
    fails(r"two\.npy: 200 bytes follow its array; save one", "tokens", tmp_path / "two.npy")
    np.save(tmp_path / "none.npy", np.zeros(0, np.uint16))
    fails(r"none\.npy is empty: it holds no document", "tokens", tmp_path / "none.npy")
    (tmp_path / "empty.bin").write_bytes(b"")
    fails("the file is empty", "tokens", tmp_path / "empty.bin")
    found = prepare(
        spec_of(tmp_path, tokenizer, "tokens", flat(tmp_path / "y.bin", documents)), progress=False
    )
    (tmp_path / "y.bin").unlink()
    with pytest.raises(DataError, match=r"y\.bin: has changed or is gone"):
        open_prepared(found.folder)
