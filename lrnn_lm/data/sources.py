"""Sources: text documents, streamed in a fixed order.

Files may be plain, .gz or .zst, here or behind a URL. A folder or glob is read in order of path, without its
empty files. Missing, binary or broken files raise DataError with the file and the row.
"""

import codecs
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..files import user_path
from ..remote import RemoteFile
from . import python_docs
from .files import NOT_READ, PACKED, find_files, open_bytes
from .hf_source import read_rows
from .specs import DataError, SourceSpec, missing_field

File = Path | RemoteFile
# A single text file is cut into parts of one to two 50ths of it, where a 50th is 200 to 5,000 characters:
# about 25 parts, more above 250 KB, fewer below 10 KB.
_PARTS, _PART_CHARS = 50, (200, 5000)
FILE_TYPES = {  # and how the files that they read in a folder end
    "text": (),  # every file of a folder
    "jsonl": tuple(
        f".{kind}{packed}" for kind in ("jsonl", "ndjson", "json") for packed in ("", *PACKED, *NOT_READ)
    ),
    "parquet": (".parquet",),
    "megatron": (".idx",),
    "tokens": (".npy", ".bin"),
}
_TYPE_BY_NAME = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}


def documents(spec: SourceSpec) -> Iterator[str]:
    """The texts of a source, at most `spec.limit`, without those of white space only.

    Raises DataError, at once or on the way, for what cannot be read, and if there is no document.
    """
    with_text = (text for text in _reader(spec)() if text and not text.isspace())
    count = 0
    for count, text in enumerate(itertools.islice(with_text, spec.limit), 1):  # noqa: B007
        yield text
    if not count:
        raise DataError(f"source {describe(spec)} is empty: it holds no document with text")


def describe(spec: SourceSpec) -> str:
    """A source in a few words, for messages and manifests."""
    return spec.type + "".join(f" {part}" for part in (spec.path, spec.name) if part)


def fingerprint(spec: SourceSpec) -> list[object]:
    """What identifies a source's text: names, sizes and times of local files, the name of a hub dataset.

    Of a hub dataset only the name, so that prepared data can be used without a network.
    """
    what: list[object] = [spec.type, spec.name, spec.split, spec.text_field, spec.limit]
    if spec.limit is not None:
        what.append("with text")  # blank documents once counted, too
    if spec.type == "python-docs":
        return [*what, python_docs.fingerprint()]
    if spec.type == "hf" and not _is_local(spec):
        return [*what, spec.path]
    found = files(spec)
    if spec.type in ("megatron", "tokens"):  # the index names the files, so it does not move with them
        found += [_ids_of(file) for file in found if file.suffix == ".idx"]
        what += [str(user_path(spec.path or "").resolve()), spec.separator, spec.dtype]
    base = user_path(spec.path or "")
    names = [str(f.relative_to(base)) if base.is_dir() else f.name for f in found]
    stats = [f.stat() for f in found]  # where a link leads
    return [*what, [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)]]


def empty_files(spec: SourceSpec) -> list[File]:
    """The empty files that reading this source leaves out."""
    if spec.type == "python-docs" or not spec.path or (spec.type == "hf" and not _is_local(spec)):
        return []
    return [f for f in _found(spec) if not f.stat().st_size]


def _ids_of(index: Path) -> Path:
    """The .bin of a Megatron .idx."""
    data = index.with_suffix(".bin")
    if not data.is_file():
        raise DataError(f"{data}: no such file; {index.name} is its index")
    return data


def _is_local(spec: SourceSpec) -> bool:
    return user_path(spec.path or "").exists()


def _reader(spec: SourceSpec) -> Callable[[], Iterator[str]]:
    readers = {
        "python-docs": python_docs.documents,
        "text": lambda: _read_texts(_text_files(spec)),
        "jsonl": lambda: itertools.chain.from_iterable(_read_jsonl(f, spec.text_field) for f in files(spec)),
        "parquet": lambda: itertools.chain.from_iterable(
            _read_parquet(f, spec.text_field) for f in files(spec)
        ),
        "hf": lambda: (_field(row, spec.text_field, where) for where, row in read_rows(spec, describe(spec))),
    }
    if spec.type not in readers:
        raise DataError(f"source type {spec.type!r} is unknown; known: {', '.join(readers)}")
    if spec.type != "python-docs" and not spec.path:
        raise DataError(f"source type {spec.type!r} needs a path")
    if spec.type == "hf" and (file := user_path(spec.path)).is_file():
        kind = _type_by_name(file.name)
        what = f"set data.source.type={kind}" if kind else "give the folder that holds it"
        raise DataError(f"{spec.path}: a file, and type 'hf' takes a folder or a hub name; {what}")
    return readers[spec.type]


def _found(spec: SourceSpec) -> list[File]:
    path = spec.path or ""
    if spec.type == "megatron" and not user_path(path).is_dir():  # with or without a suffix
        path = path.removesuffix(".bin").removesuffix(".idx") + ".idx"
    return find_files(path, FILE_TYPES.get(spec.type, ()))


def files(spec: SourceSpec) -> list[File]:
    """The files of a source that are not empty. Raises DataError if there are none."""
    found = _found(spec)
    files = [f for f in found if f.stat().st_size]
    if not files:
        if len(found) == 1:  # of a folder or a glob, too
            raise DataError(f"{found[0]}: the file is empty")
        raise DataError(f"{spec.path}: all of its {len(found)} files are empty")
    return files


def _text_files(spec: SourceSpec) -> list[File]:
    """`files` of a source that is read as plain text. Raises DataError if all are JSON lines.

    Not in `files`, which also looks up prepared data: a run that was trained on such text goes on with it.
    """
    found = files(spec)
    if all(_type_by_name(file.name) == "jsonl" for file in found):
        raise DataError(f"{spec.path}: holds JSON lines, not plain text; set data.source.type=jsonl")
    return found


def _type_by_name(name: str) -> str | None:
    """The type of source that files of this name usually have: `a.jsonl.zst` -> jsonl; None if unknown."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    plain = suffixes[:-1] if suffixes and suffixes[-1] in PACKED else suffixes
    return _TYPE_BY_NAME.get(plain[-1]) if plain else None


def _read_texts(files: list[File]) -> Iterator[str]:
    """A document a file; a single file is cut into parts, so that some can be held out."""
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
    """Where a part of at most 2 * size characters ends: after a blank line, else a line, else a word."""
    if len(text) - start <= 2 * size:
        return len(text)
    for mark in ("\n\n", "\n", " "):
        if (at := text.rfind(mark, start + size, start + 2 * size)) >= 0:
            return min(at + len(mark), start + 2 * size)
    return start + 2 * size


def _read_text(path: File) -> str:
    with open_bytes(path) as file:
        data = file.read()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: UTF-16 text; convert it to UTF-8")
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


def _read_jsonl(path: File, field: str) -> Iterator[str]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8)
            if line and not line.isspace():
                try:
                    yield _parse_line(line, f"{path}:{number}", field)
                except DataError as error:
                    other = _type_by_name(path.name)
                    if number > 1 or other in (None, "jsonl"):
                        raise
                    raise DataError(f"{error}; is it of data.source.type={other}?") from None


def _parse_line(line: bytes, where: str, field: str) -> str:
    pairs: list[tuple[str, Any]] = []  # of the object that ended last: the line's own

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found
        return dict(found)

    try:
        record = json.loads(line.decode(), object_pairs_hook=keep)
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text; is this a JSONL file?") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply to be read; remove the line") from None
    except ValueError:  # Python limits whole numbers to a few thousand digits
        raise DataError(
            f"{where}: a number too long to be read; remove it, or write it as a string"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a line holds one JSON object, not {_kind(record)}")
    if len(record) < len(pairs) and (count := [key for key, _ in pairs].count(field)) > 1:
        raise DataError(f"{where}: field {field!r} is given {count} times; keep one of them")
    return _field(record, field, where)


def _field(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise missing_field(where, field, record)
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} holds {_kind(text)}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: field {field!r} holds half a surrogate pair, which is not Unicode text"
        ) from None
    return text


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _read_parquet(path: File, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path.open("rb") if isinstance(path, RemoteFile) else path) as file:
            names = file.schema_arrow.names
            if (found := names.count(field)) != 1:
                others = [name for name in names if names.count(name) == 1]
                raise missing_field(str(path), field, others, f"{found} columns" if found else "no column")
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for text in _values(batch.column(0)):
                    yield _field({field: text}, field, f"{path}: row {row}")
                    row += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row {row}: column {field!r} is not UTF-8 text ({error.reason})") from None
    except (pyarrow.ArrowException, OSError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{path}: not a readable Parquet file, from row {row} on ({why})") from None


def _values(column: Any) -> Iterator[Any]:
    """A column's values; at one that is not UTF-8, UnicodeDecodeError after those before it."""
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:  # to_pylist has yielded nothing; go value by value to find the row
        for value in column:
            yield value.as_py()
