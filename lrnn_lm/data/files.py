"""The files of a corpus: what a path, a folder or a glob names, and their bytes, unpacked.

Links are followed. A file with several names counts once, by its real path, so that links back up a tree end.
"""

import fnmatch
import glob
import gzip
import io
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..files import user_path
from ..remote import RemoteFile, find_remote, url_of
from ..requirements import check_extra
from .specs import DataError

PACKED = (".gz", ".zst")  # what is unpacked here
NOT_READ = (".bz2", ".xz", ".lzma", ".lz4", ".br", ".zip", ".zstd")  # what is not
_LARGEST_WINDOW = 1 << 31  # bytes: the window of `zstd --long=31`, the largest that its tools write


def find_files(path: str, suffixes: Sequence[str] = ()) -> list[Path] | list[RemoteFile]:
    """The files that `path` names, in order of path: of a folder, of a glob, or one file; also of a URL.

    Of a folder only those that end in `suffixes`, in any case (none: all files). Hidden files are left out
    unless a glob names them. Raises DataError if there is no file, a link is broken, a folder cannot be
    listed, or a file cannot be unpacked.
    """
    if (url := url_of(path)) is not None:
        try:
            return _unpackable(find_remote(url, suffixes))
        except ValueError as error:
            raise DataError(f"{error} (data.source.path)") from None
    target = user_path(path)
    try:
        if target.is_dir():
            found = [(real, f) for real, f in _walk(target) if f.name.lower().endswith(tuple(suffixes) or "")]
            plain = [suffix for suffix in suffixes if suffix.count(".") == 1]
            nothing = f"no {' or '.join(plain) + ' ' if plain else ''}file in this folder"
        elif glob.has_magic(str(target)) and not target.exists():
            found = list(_glob(target))
            nothing = "no file matches this pattern (data.source.path)"
        else:
            found = [(os.path.realpath(target), target)] if _is_file(target) else []
            nothing = "no such file or folder (data.source.path)"
            if target.exists():
                nothing = "a pipe or a device; the text is read more than once, so give a file"
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
    if not found:
        raise DataError(f"{path}: {nothing}")
    once: dict[str, Path] = {}
    for real, file in found:
        once.setdefault(real, file)
    return _unpackable(sorted(once.values()))


def _unpackable(files: list[Any]) -> list[Any]:
    """The same files. DataError for one that cannot be unpacked, or lies beside itself unpacked."""
    names = {str(file) for file in files}
    for file in files:
        packer = file.suffix.lower()
        if packer in NOT_READ:
            raise DataError(f"{file}: {packer} files are not unpacked here; repack it as .zst or .gz")
        if packer in PACKED and (plain := str(file)[: -len(packer)]) in names:
            raise DataError(f"{file}: it would be read twice, as {plain} lies beside it; remove one of them")
    return files


def _walk(root: Path, hidden: bool = False) -> Iterator[tuple[str, Path]]:
    """(real path, path) of the files below a folder. Each folder is visited once.

    Links come last, so that a file reached in both ways keeps the name that is not a link.
    """
    seen: set[str] = set()
    folders, links = deque([root]), deque[Path]()
    while folders or links:
        if not folders:
            link = links.popleft()
            if link.is_dir():
                folders.append(link)
            elif _is_file(link):
                yield os.path.realpath(link), link
            continue
        folder = folders.popleft()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith(".") and not hidden:
                continue
            if entry.is_symlink():
                links.append(folder / entry.name)
            elif entry.is_dir():
                folders.append(folder / entry.name)
            elif entry.is_file():
                yield os.path.join(real, entry.name), folder / entry.name


def _is_file(path: Path) -> bool:
    """Whether a path is a file. Raises DataError for a broken link."""
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path}: a link to {os.readlink(path)}, which is not there; mend the link or remove it"
        )
    return path.is_file()


def _glob(pattern: Path) -> Iterator[tuple[str, Path]]:
    """(real path, path) of the files that a glob matches.

    From a `**` on, folders are walked here: `glob` would follow a link back up until the path is too long.
    """
    parts = pattern.parts
    if "**" not in parts:
        for path in map(Path, sorted(glob.glob(str(pattern)))):
            if _is_file(path):
                yield os.path.realpath(path), path
        return
    start = parts.index("**")
    rest = parts[start:]
    hidden = any(part.startswith(".") for part in rest)
    for base in sorted(glob.glob(str(Path(*parts[:start])))) if start else ["."]:
        if os.path.isdir(base):
            for real, path in _walk(Path(base), hidden):
                if _matches(path.relative_to(base).parts, rest):
                    yield real, path


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path below a folder matches a glob's parts; `**` stands for any number of names."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        deeper = bool(names) and not names[0].startswith(".") and _matches(names[1:], pattern)
        return deeper or _matches(names, pattern[1:])
    if not names or (names[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


@contextmanager
def open_bytes(path: Path | RemoteFile) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if it ends in .gz or .zst; DataError if it is damaged or unreadable."""
    check_extra("train", "zstandard")
    import zstandard

    try:
        with path.open("rb") as raw:
            if path.suffix.lower() == ".gz":
                with gzip.open(raw) as unpacked:
                    yield unpacked  # type: ignore[misc]
            elif path.suffix.lower() == ".zst":
                yield io.BufferedReader(_ZstdReader(raw), 1 << 20)
            else:
                yield raw
    except (zstandard.ZstdError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        if "Dictionary mismatch" in str(error):
            raise DataError(
                f"{path}: packed with a dictionary, which is not read; repack it without"
            ) from None
        raise DataError(f"{path}: damaged archive ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


class _ZstdReader(io.RawIOBase):
    """Unpacks consecutive Zstandard frames; EOFError for a truncated one, which the library accepts."""

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
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
        self._ready = self._frame.decompress(self._packed)
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True
