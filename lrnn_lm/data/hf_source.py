"""A Hugging Face dataset as rows, streamed: from save_to_disk, a local dataset folder, or a hub name."""

import logging
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from ..files import hub_is_reachable, user_path
from ..output import error_console
from ..requirements import check_extra
from .specs import DataError, SourceSpec, missing_field

_KINDS = {".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".txt"}
_NO_ROWS = {"dataset_infos.json", "license.txt", "readme.txt", "requirements.txt"}  # in folders of datasets


def read_rows(spec: SourceSpec, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each row; `name` is the source's name in messages. Raises DataError."""
    check_extra("train", "datasets")
    from datasets.exceptions import DatasetsError
    from datasets.table import CastError

    with _log_of_datasets() as said:
        for part, rows in _parts(spec, name, said):
            number = 0
            try:
                for number, row in enumerate(rows):
                    yield f"{part}: row {number}", row
            except (OSError, EOFError, ValueError, TypeError, zlib.error, DatasetsError) as error:
                # pyarrow raises ValueErrors; a column that changes its type raises a TypeError
                advice = "; all its files must have the same columns" if isinstance(error, CastError) else ""
                raise DataError(
                    f"{part}: reading stopped near row {number} ({_why(said, error)}){advice}"
                ) from None


def _parts(spec: SourceSpec, name: str, said: list[logging.LogRecord]) -> Iterator[tuple[str, Any]]:
    """(name, rows) of each file of a dataset, in order, as errors in rows do not name the file.

    If there are not as many files as shards, the name is the dataset's with the shard's number.
    """
    dataset, files = _load(spec, name, said)
    if known := dataset.features:  # before a row is read
        if spec.text_field not in known:
            raise missing_field(f"dataset {name}", spec.text_field, known)
        # Pictures and sound beside the text would be decoded, by packages that may be missing.
        dataset = dataset.select_columns([spec.text_field])
    shards = dataset.num_shards if files is not None else 1
    if shards == 1:
        yield files[0] if files and len(files) == 1 else f"dataset {name}", dataset
        return
    for shard in range(shards):
        of_file = files is not None and len(files) == shards
        part = files[shard] if of_file else f"dataset {name}, shard {shard} of {shards}"
        yield part, dataset.shard(shards, shard)


def _load(spec: SourceSpec, name: str, said: list[logging.LogRecord]) -> tuple[Any, list[str] | None]:
    """The split, and the files that it streams from (None for a folder of save_to_disk)."""
    import datasets
    from datasets.exceptions import DatasetsError

    path = user_path(spec.path or "")
    if str(spec.path).startswith(("/", ".", "~")) and not path.exists():
        raise DataError(f"{spec.path}: no such file or folder (data.source.path)")
    if not path.exists() and not hub_is_reachable():
        raise DataError(
            f"dataset {name} is not here and the hub cannot be reached; "
            "without a network give the folder of a local copy"
        )
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if not saved:
            where = str(path) if path.exists() else str(spec.path)
            builder = datasets.load_dataset_builder(where, spec.name)
            dataset = builder.as_streaming_dataset(split=spec.split)
            found = builder.config.data_files or {}
            _tell_left_out(path, frozenset(Path(file).suffix for files in found.values() for file in files))
            return dataset, list(map(str, found.get(spec.split, [])))
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        advice = "" if path.exists() else "; if there is no network here, give the folder of a local copy"
        if isinstance(error, RecursionError):
            advice = "; a row is nested too deeply (of JSON, data.source.type=jsonl says which)"
        raise DataError(
            f"dataset {name} (split {spec.split}) cannot be loaded{advice} ({_why(said, error)})"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if spec.split not in loaded:
            raise DataError(f"dataset {name}: no split {spec.split!r}; there are: {', '.join(loaded)}")
        loaded = loaded[spec.split]
    elif spec.split != (there := str(loaded.split or "")):
        if {"[", "+"} & {*spec.split}:
            raise DataError(
                f"dataset {name}: a folder of save_to_disk with one split is read whole, not as "
                f"{spec.split!r}; save the part that you want (data.source.split)"
            )
        # "train" is the default and reads whatever was saved; a dataset that was not loaded has no split.
        # Both parts of train_test_split have the split of the whole, so the folder's name counts too.
        if there and spec.split not in ("train", path.name):
            raise DataError(
                f"dataset {name}: no split {spec.split!r}; the folder holds {there!r}: leave "
                "data.source.split out to read it"
            )
    return loaded.with_format(None), None  # one that was saved with it may hide columns


@cache  # once for all readings
def _tell_left_out(folder: Path, read: frozenset[str]) -> None:
    """`datasets` reads one kind of files in a folder, of which there are most."""
    files = [file for file in folder.rglob("*") if file.name.lower() not in _NO_ROWS]
    if left := sorted(({file.suffix for file in files} & _KINDS) - read):
        error_console().print(
            f"lrnn: {folder}: its {', '.join(left)} files are left out, as datasets reads one kind of files",
            markup=False,
            soft_wrap=True,
        )


@contextmanager
def _log_of_datasets() -> Iterator[list[logging.LogRecord]]:
    """Collect the library's log lines instead of printing them: some name a file that the exception does not.

    Every reader adds a handler of its own, as several may be open at a time.
    """
    logger = logging.getLogger("datasets")
    lines = BufferingHandler(sys.maxsize)
    printing = [handler for handler in logger.handlers if not isinstance(handler, BufferingHandler)]

    def silent(_: logging.LogRecord) -> bool:
        return False

    for handler in printing:
        handler.addFilter(silent)
    logger.addHandler(lines)
    try:
        yield lines.buffer
    finally:
        logger.removeHandler(lines)
        for handler in printing:
            handler.removeFilter(silent)


def _why(said: list[logging.LogRecord], error: Exception) -> str:
    return " ".join((said[-1].getMessage() if said else str(error)).split())[:300]
