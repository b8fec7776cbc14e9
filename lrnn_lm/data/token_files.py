"""Token files of others as sources: Megatron's .bin/.idx pairs, and flat .npy or .bin arrays of ids.

Nothing is tokenised or copied. An index says where in a file each document's ids are, and `TokenShards` maps
the file. A document is read as if its text had been tokenised here: first + ids + last, without the separator
and the begin-of-text token that the file may hold.
"""

import hashlib
import itertools
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import sources
from .encode import encode_documents
from .files import PACKED
from .progress import Progress
from .shards import HELDOUT, STARTS_DTYPE, HashedFile
from .specs import DataError, DataSpec, SourceSpec
from .split import HeldOut, Short, one_sided, text_hash
from .tokenize import TokenizerFacts, load_backend

Ints = npt.NDArray[np.integer[Any]]
TYPES = ("megatron", "tokens")
_NPY = b"\x93NUMPY"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents + 1
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_ODD = 0.1  # part of the held-out documents that may be left out
_CHUNK = 1 << 24  # tokens checked at once
_TELLING = 256  # bytes from which zeros in every second number are no chance


@dataclass(frozen=True)
class TokenFile:
    """A file's ids, and where its documents are in them: starts..stops-1, without separators."""

    path: Path
    dtype: np.dtype[Any]  # of the ids
    begin: int  # bytes before them
    length: int  # their number
    starts: Ints  # (documents,)
    stops: Ints
    sha256: str  # of the ids as uint32, whatever the file's format

    def documents(self, numbers: Iterable[int]) -> Iterator[Ints]:
        """The ids of documents as uint32."""
        # Not mapped before: a map keeps its file open, and there may be thousands.
        ids = np.memmap(self.path, self.dtype, "r", self.begin, self.length)
        for k in numbers:
            yield ids[self.starts[k] : self.stops[k]].astype("<u4")

    def hashes(self) -> Ints:
        """A hash of each document (documents,) uint64, equal for equal ids in any format."""
        return np.fromiter(map(id_hash, self.documents(range(len(self.starts)))), np.uint64)


def id_hash(ids: Ints) -> int:
    """`text_hash` of a document's ids, without its first and last token."""
    return text_hash(ids.astype("<u4").tobytes())


def read_token_files(spec: SourceSpec, tokenizer: Path, facts: TokenizerFacts) -> list[TokenFile]:
    """The files of a source, checked against the tokenizer. DataError for a damaged or foreign one."""
    separator = _separator(spec, tokenizer, facts)
    found, left = [], spec.limit
    for path in sources.files(spec):
        ids, ends = _megatron(path) if spec.type == "megatron" else (_flat(path, spec, facts), None)
        if not len(ids):  # an .npy with a header alone; files without bytes are left out, too
            continue
        path = Path(ids.filename)
        separators, sha = _scan(path, ids, separator, facts)
        if ends is None and not len(separators):
            raise DataError(
                f"{path}: no separator between documents (id {separator}) in its {len(ids):,} tokens; "
                "name it as data.source.separator"
            )
        starts, stops = _documents(ids, separators, ends, facts.first if facts.first != separator else None)
        found.append(TokenFile(path, ids.dtype, ids.offset, len(ids), starts[:left], stops[:left], sha))
        left = None if left is None else left - len(found[-1].starts)
    if not any(len(file.starts) for file in found):
        raise DataError(f"source {sources.describe(spec)} is empty: it holds no document")
    return found


def _separator(spec: SourceSpec, tokenizer: Path, facts: TokenizerFacts) -> int:
    if spec.separator is None:
        return facts.last
    is_id = spec.separator.isdecimal()
    number = int(spec.separator) if is_id else load_backend(tokenizer).token_to_id(spec.separator)
    if number is None or number >= facts.vocab_size:
        raise DataError(
            f"data.source.separator {spec.separator!r} is no token of the tokenizer, nor an id below its "
            f"{facts.vocab_size:,}"
        )
    return number


def _megatron(index: Path) -> tuple[Ints, Ints]:
    """Ids of a .bin beside its .idx, and where documents end in them."""
    data = index.with_suffix(".bin")
    try:
        raw = np.memmap(index, mode="r") if index.stat().st_size else b""
        size = data.stat().st_size
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    damaged = f"{index}: truncated or no Megatron index"
    if len(raw) < _HEADER.size or bytes(raw[: len(_MAGIC)]) != _MAGIC:
        raise DataError(f"{damaged}: it does not begin as one")
    _, version, code, sequences, documents = _HEADER.unpack_from(raw)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{index}: version {version}, dtype {code} of a Megatron index is not known here")
    expected = _HEADER.size + sequences * 12 + documents * 8
    if len(raw) not in (expected, expected + sequences):  # with a mode for each sequence
        raise DataError(f"{damaged}: {len(raw):,} bytes where its header says {expected:,}")
    sizes = np.frombuffer(raw, "<i4", sequences, _HEADER.size)
    pointers = np.frombuffer(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
    order = np.frombuffer(raw, "<i8", documents, _HEADER.size + 12 * sequences)
    dtype = np.dtype(_DTYPES[code])
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if (sizes < 0).any() or (pointers != ends[:-1] * dtype.itemsize).any():
        raise DataError(f"{damaged}: its sequences do not follow one another")
    if size != ends[-1] * dtype.itemsize:
        wanted = ends[-1] * dtype.itemsize
        raise DataError(f"{data}: {size:,} bytes where its index says {wanted:,}; truncated?")
    if not size:
        raise DataError(f"{data}: the file is empty")
    if documents and (order.min() < 0 or order.max() > sequences):
        raise DataError(f"{damaged}: its documents lie outside its sequences")
    return np.memmap(data, dtype, "r"), ends[order]


def _flat(path: Path, spec: SourceSpec, facts: TokenizerFacts) -> Ints:
    """Ids of an .npy file, or of a .bin whose dtype is given or found out."""
    if path.suffix.lower() == ".npy":
        return _npy(path)
    if path.suffix.lower() in (*PACKED, ".npz"):
        raise DataError(f"{path}: is packed, and token files are mapped as they are; unpack it first")
    if path.with_suffix(".idx").exists():
        raise DataError(f"{path}: beside its .idx this is Megatron's pair; set data.source.type=megatron")
    size = path.stat().st_size
    dtype = np.dtype(spec.dtype or _found_dtype(path, size, facts.vocab_size)).newbyteorder("<")
    wider = np.dtype(_found_dtype(path, size, 256**dtype.itemsize))
    if wider.itemsize > dtype.itemsize and size >= _TELLING and not np.memmap(path, dtype, "r")[1::2].any():
        raise DataError(  # all of the file: its beginning may be padding
            f"{path}: read as {dtype} every second number is 0, as in a file of {wider}; "
            "leave data.source.dtype out"
        )
    if size % dtype.itemsize:
        raise DataError(
            f"{path}: {size:,} bytes are no whole number of {dtype} ids; truncated, or set data.source.dtype"
        )
    return np.memmap(path, dtype, "r")


def _npy(path: Path) -> Ints:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        with path.open("rb") as file:
            why = str(error)
            if file.read(len(_NPY)) != _NPY:  # to numpy a pickle, which it advises to load
                why = "NumPy's header is missing; if it holds ids alone, as dolma's does, name it .bin"
        raise DataError(f"{path}: truncated or no .npy file ({why})") from None
    if not isinstance(ids, np.ndarray):
        raise DataError(f"{path}: several arrays in an archive (.npz); save each as an .npy file")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(f"{path}: a row of whole numbers is expected, not {ids.dtype} {ids.shape}")
    if len(ids) and (more := path.stat().st_size - ids.offset - ids.nbytes):
        raise DataError(f"{path}: {more:,} bytes follow its array; save one array in a file")
    return ids


def _found_dtype(path: Path, size: int, vocab_size: int) -> str:
    """The widest type whose upper bytes, which no id needs, are all zero at the file's beginning."""
    needed = 1 if vocab_size <= 65536 else 2  # 16-bit words of an id
    words = np.fromfile(path, "<u2", 1 << 20)
    for width, name in ((4, "int64"), (2, "uint32")):
        if width > needed and size % (2 * width) == 0:
            parts = words[: len(words) // width * width].reshape(-1, width)
            if not parts[:, needed:].any():
                return name
    return "uint16" if needed == 1 else "uint32"


def _scan(path: Path, ids: Ints, separator: int, facts: TokenizerFacts) -> tuple[Ints, str]:
    """Positions of the separators, and the sha256. Raises DataError for an id outside the vocabulary."""
    found, sha = [np.zeros(0, np.int64)], hashlib.sha256()
    for start in range(0, len(ids), _CHUNK):
        chunk = np.asarray(ids[start : start + _CHUNK])
        foreign = (chunk < 0) | (chunk >= facts.vocab_size)
        if foreign.any():
            at = int(foreign.argmax())
            raise DataError(
                f"{path}: token {start + at:,} is {chunk[at]}, and the tokenizer has "
                f"{facts.vocab_size:,} ids; "
                f"set data.tokenizer to the one that made the file, or data.source.dtype (here {ids.dtype})"
            )
        found.append(np.flatnonzero(chunk == separator) + start)
        sha.update(chunk.astype("<u4").tobytes())
    return np.concatenate(found), sha.hexdigest()


def _documents(ids: Ints, separators: Ints, ends: Ints | None, first: int | None) -> tuple[Ints, Ints]:
    """Where documents start and stop: between separators, and where an index says so; none is empty.

    first: the begin-of-text token, which is left out where a document begins with it.
    """
    cuts = [np.zeros(1, np.int64), separators + 1, *([ends] if ends is not None else [])]
    starts = np.unique(np.concatenate(cuts))
    starts = starts[starts < len(ids)]
    stops = np.append(starts[1:], len(ids)).astype(np.int64)
    stops -= np.isin(stops - 1, separators, assume_unique=True)
    if first is not None:
        starts = starts + (ids[starts] == first)
    return starts[stops > starts], stops[stops > starts]


class Index:
    """Writes the index of a source of token files into a folder."""

    def __init__(self, folder: Path, tokenizer: Path, facts: TokenizerFacts, num_proc: int | None) -> None:
        self._folder, self._tokenizer, self._facts, self._num_proc = folder, tokenizer, facts, num_proc

    def write(
        self, spec: DataSpec, named: Sequence[SourceSpec], listed: set[int], held_out: HeldOut, bar: Progress
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Index both splits, or only train if the validation text is no token files.

        named: token files that some source names for validation. listed: hashes of other held-out documents.
        Returns the splits' entries in the manifest, and those of the files.
        """
        files = self._read(spec.source)
        for source in named:
            listed = listed.union(*(file.hashes().tolist() for file in self._read(source)))
        hashes = [file.hashes() for file in files]
        for file, numbers in zip(files, hashes, strict=True):
            bar.advance(file.length, 0, documents=len(numbers))
        own = spec.validation_source
        if not own:
            held_out = replace(held_out, listed=frozenset(listed))
            held_out = held_out.with_both_sides(map(int, itertools.chain.from_iterable(hashes)), spec.source)
        below, named_ids = np.uint64(held_out.threshold), np.array(sorted(listed), np.uint64)
        held = [(numbers < below) | np.isin(numbers, named_ids) for numbers in hashes]
        short = Short(spec)
        train = [
            ~mask & ~short.left_out(file.stops - file.starts, ~mask)
            for file, mask in zip(files, held, strict=True)
        ]
        if short.documents and not any(mask.any() for mask in train):
            raise short.error()
        splits, written = self._index("train", spec.source, files, train)
        splits["train"] |= short.facts()
        if own and own.type not in TYPES:
            return splits, written
        others = self._read(own) if own else files
        masks = [np.ones(len(file.starts), bool) for file in others] if own else held
        kept, facts, heldout = self._write_texts(others, masks)
        more, also = self._index("validation", own or spec.source, others, kept)
        more["validation"] |= facts
        return splits | more, written | also | heldout

    def _read(self, spec: SourceSpec) -> list[TokenFile]:
        return read_token_files(spec, self._tokenizer, self._facts)

    def _write_texts(
        self, files: Sequence[TokenFile], masks: Sequence[Ints]
    ) -> tuple[list[Ints], dict[str, Any], dict[str, Any]]:
        """Decode held-out documents into validation.jsonl, and count their bytes.

        The bytes are right if tokenising the text gives the same ids. A few documents where it does not (cut
        at the end of a file) are left out of the validation; with more of them the bytes count as unknown.
        Returns the masks of the documents that are kept, facts for the manifest, and the file.
        """
        backend = load_backend(self._tokenizer)
        texts = (
            (backend.decode(ids.tolist(), skip_special_tokens=False), ids)
            for file, mask in zip(files, masks, strict=True)
            for ids in file.documents(np.flatnonzero(mask))
        )
        out, same, odd, size = HashedFile(self._folder / HELDOUT), [], [], 0
        with closing(encode_documents(texts, self._tokenizer, self._facts, self._num_proc)) as encoded:
            for text, ids, again in encoded:
                same.append(np.array_equal(again[1:-1], ids))
                size += len(text.encode()) if same[-1] else 0
                line = json.dumps({"text": text}).encode() + b"\n"
                out.write(line) if same[-1] else odd.append(line)
        facts: dict[str, Any] = {"num_bytes": size, "left_out": len(odd)}
        kept = [mask.copy() for mask in masks]
        if len(odd) > _ODD * len(same):
            out.write(b"".join(odd))
            facts = {"num_bytes": None, "left_out": 0, "changed": len(odd)}
        else:
            ends = np.cumsum([mask.sum() for mask in masks])[:-1]
            for mask, keep in zip(kept, np.split(np.array(same, bool), ends), strict=True):
                mask[mask] = keep
        return kept, facts, {HELDOUT: out.close()}

    def _index(
        self, split: str, source: SourceSpec, files: Sequence[TokenFile], chosen: Sequence[Ints]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Index the chosen documents (a mask a file). Returns the split's entry, and those of its files."""
        shards, written = [], {}
        for file, mask in zip(files, chosen, strict=True):
            if not mask.any():
                continue
            stem = f"{split}-{len(shards):05d}"
            lengths = (file.stops - file.starts)[mask] + 2
            columns = {"starts": np.cumsum(lengths) - lengths, "offsets": file.starts[mask]}
            for name, column in columns.items():
                out = HashedFile(self._folder / f"{stem}.{name}.bin")
                out.write(column.astype(STARTS_DTYPE).tobytes())
                written[out.path.name] = out.close()
            shards.append(
                {
                    "file": str(file.path.resolve()),
                    "file_bytes": file.path.stat().st_size,
                    "dtype": file.dtype.str,
                    "begin": file.begin,
                    "ids_sha256": file.sha256,
                    **{name: f"{stem}.{name}.bin" for name in columns},
                    "first": self._facts.first,
                    "last": self._facts.last,
                    "num_tokens": int(lengths.sum()),
                    "num_documents": len(lengths),
                }
            )
        if not shards:
            raise one_sided(split, source)
        total = {key: sum(shard[key] for shard in shards) for key in ("num_tokens", "num_documents")}
        return {split: {**total, "num_bytes": None, "shards": shards}}, written


def check_unchanged(manifest: dict[str, Any]) -> None:
    """Raise DataError if an indexed file is gone or has another size."""
    for shard in (s for split in manifest["splits"].values() for s in split["shards"] if "file" in s):
        path = Path(shard["file"])
        if not path.is_file() or path.stat().st_size != shard["file_bytes"]:
            raise DataError(f"{path}: has changed or is gone since `lrnn prepare` indexed it; put it back")
