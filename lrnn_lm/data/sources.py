"""Sources: one text document after another, streamed, in an order that does not change.

Files may be plain, .gz or .zst. A folder or glob is read in order of path. What is missing, empty, binary or
broken raises DataError naming the place.
"""

import glob
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from . import python_docs
from .hub import hub_is_reachable
from .specs import DataError, SourceSpec

# A lone text file is cut into about 50 parts of no fewer than 200 characters and no more than twice 5,000.
_PARTS, _PART_CHARS = 50, (200, 5000)
_SUFFIXES = {
    "text": (),  # every file of a folder
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json"),
    "parquet": (".parquet",),
}


def documents(spec: SourceSpec) -> Iterator[str]:
    """The texts of a source, at most `spec.limit`; documents of nothing but white space are left out.

    Raises DataError (at once or on the way) for what cannot be read, and where there is no document at all.
    """
    count = 0
    for text in itertools.islice(_reader(spec)(), spec.limit):
        if text and not text.isspace():
            count += 1
            yield text
    if not count:
        raise DataError(f"source {describe(spec)} is empty: it holds no document with text")


def describe(spec: SourceSpec) -> str:
    """A source in a few words, for messages and manifests."""
    return spec.type + "".join(f" {part}" for part in (spec.path, spec.name) if part)


def fingerprint(spec: SourceSpec) -> list[object]:
    """What tells this source's text from another's: names, sizes and times of local files, the name of a hub
    set.

    A hub dataset is known by its name only, so that what is prepared stays usable without a network.
    """
    what: list[object] = [spec.type, spec.name, spec.split, spec.text_field, spec.limit]
    if spec.type == "python-docs":
        return [*what, python_docs.fingerprint()]
    if spec.type == "hf" and not Path(spec.path or "").expanduser().exists():
        return [*what, spec.path]
    files = _files(spec)
    base = Path(spec.path or "").expanduser()
    names = [str(f.relative_to(base)) if base.is_dir() else f.name for f in files]
    stats = [f.stat() for f in files]
    return [*what, [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)]]


def _reader(spec: SourceSpec) -> Callable[[], Iterator[str]]:
    readers = {
        "python-docs": python_docs.documents,
        "text": lambda: _read_texts(_files(spec)),
        "jsonl": lambda: itertools.chain.from_iterable(_read_jsonl(f, spec.text_field) for f in _files(spec)),
        "parquet": lambda: itertools.chain.from_iterable(
            _read_parquet(f, spec.text_field) for f in _files(spec)
        ),
        "hf": lambda: _read_hf(spec),
    }
    if spec.type not in readers:
        raise DataError(f"source type {spec.type!r} is unknown; known: {', '.join(readers)}")
    if spec.type != "python-docs" and not spec.path:
        raise DataError(f"source type {spec.type!r} needs a path")
    return readers[spec.type]


def _files(spec: SourceSpec) -> list[Path]:
    """The files of a source in order of path, without hidden ones. Raises DataError if there are none."""
    path = Path(spec.path or "").expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        suffixes = _SUFFIXES.get(spec.type, ())
        found = [p for p in path.rglob("*") if not suffixes or p.name.endswith(suffixes)]
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        files = sorted(p for p in found if p.is_file())
        if not files:
            wanted = f"{' or '.join(suffixes)} file" if suffixes else "file"
            raise DataError(f"{spec.path}: no {wanted} in this folder")
        return files
    files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not files:
        kind = "no file matches this pattern" if glob.has_magic(str(path)) else "no such file or folder"
        raise DataError(f"{spec.path}: {kind} (data.source.path)")
    return files


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if its name says so. Raises DataError for a damaged or unreadable one."""
    import zstandard

    try:
        with path.open("rb") as raw:
            if path.suffix == ".gz":
                with gzip.open(raw) as unpacked:
                    yield unpacked  # type: ignore[misc]
            elif path.suffix == ".zst":
                yield io.BufferedReader(_ZstdReader(raw), 1 << 20)
            else:
                yield raw
    except (zstandard.ZstdError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: damaged archive ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


class _ZstdReader(io.RawIOBase):
    """Unpacks Zstandard frames in a row. EOFError if the last is cut short (the library lets that pass)."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._unpack():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack(self) -> bool:
        """Make some bytes ready; False at the end of the file."""
        import zstandard

        self._packed = self._packed or self._raw.read(1 << 17)
        if not self._packed:
            if self._frame is not None:
                raise EOFError("it ends in the middle")
            return False
        self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
        self._ready = self._frame.decompress(self._packed)
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True


def _read_texts(files: list[Path]) -> Iterator[str]:
    """Each file a document; one file alone is cut into parts, so that some of it can be held out."""
    if len(files) > 1:
        yield from map(_read_text, files)
        return
    text = _read_text(files[0])
    size = min(max(len(text) // _PARTS, _PART_CHARS[0]), _PART_CHARS[1])
    start = 0
    while start < len(text):
        stop = _part_end(text, start, size)
        yield text[start:stop]
        start = stop


def _part_end(text: str, start: int, size: int) -> int:
    """Where a part of at most 2 * size characters ends: after a blank line, a line or a word if it can."""
    if len(text) - start <= 2 * size:
        return len(text)
    for mark in ("\n\n", "\n", " "):
        if (at := text.rfind(mark, start + size, start + 2 * size)) >= 0:
            return min(at + len(mark), start + 2 * size)
    return start + 2 * size


def _read_text(path: Path) -> str:
    with _open(path) as file:
        data = file.read()
    if not data:
        raise DataError(f"{path}: the file is empty")
    if b"\0" in data:
        raise DataError(
            f"{path}: a binary file, not text; name the text files with a glob such as 'folder/**/*.txt'"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start}); convert it, or choose other files"
        ) from None


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with _open(path) as file:
        number = 0
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield _parse_line(line, f"{path}:{number}", field)
        if not number:
            raise DataError(f"{path}: the file is empty")


def _parse_line(line: bytes, where: str, field: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text; is this a JSONL file?") from None
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a line holds one JSON object, not {type(record).__name__}")
    return _field(record, field, where)


def _field(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise DataError(
            f"{where}: no field {field!r}; set data.source.text_field to one of: {', '.join(record)}"
        )
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: field {field!r} holds half a surrogate pair, which is not Unicode text"
        ) from None
    return text


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path}: no column {field!r}; set data.source.text_field to one of: {names}")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield _field({field: text}, field, f"{path}: row {row}")
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from None


def _read_hf(spec: SourceSpec) -> Iterator[str]:
    """A Hugging Face dataset: a folder of save_to_disk, a local dataset folder, or a hub name; streamed."""
    from datasets.exceptions import DatasetsError

    number = 0
    try:
        for number, record in enumerate(_load_hf(spec)):
            yield _field(record, spec.text_field, f"{describe(spec)}: row {number}")
    except (OSError, DatasetsError) as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(f"dataset {describe(spec)}: reading stopped near row {number} ({why})") from None


def _load_hf(spec: SourceSpec) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(spec.path or "").expanduser()
    if str(spec.path).startswith(("/", ".", "~")) and not path.exists():
        raise DataError(f"{spec.path}: no such file or folder (data.source.path)")
    if not path.exists() and not hub_is_reachable():
        raise DataError(
            f"dataset {describe(spec)} is not here and the hub cannot be reached; "
            "without a network give the folder of a local copy"
        )
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if not saved:
            return datasets.load_dataset(
                str(path) if path.exists() else str(spec.path), spec.name, split=spec.split, streaming=True
            )
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        advice = "" if path.exists() else "; if there is no network here, give the folder of a local copy"
        why = " ".join(str(error).split())[:200]
        raise DataError(
            f"dataset {describe(spec)} (split {spec.split}) cannot be loaded{advice} ({why})"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if spec.split not in loaded:
            raise DataError(
                f"dataset {describe(spec)}: no split {spec.split!r}; there are: {', '.join(loaded)}"
            )
        return loaded[spec.split]
    return loaded
