"""Files behind URLs (s3://, gs://, memory://, ..), through fsspec: text is read, folders copied both ways.

What is mapped into memory, locked or renamed stays on disks: prepared data, and the folder of a run.
"""

import atexit
import os
import posixpath
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)")  # at least two letters: c:/ is a drive
_HIDDEN = re.compile(r"(^|/)\.")


def url_of(path: str | Path | None) -> str | None:
    """The URL that a path stands for; None for a local one. `Path` makes s3:/ of s3://."""
    if re.fullmatch("[a-z][a-z0-9+.-]+:/*", str(path or "")):
        raise ValueError(f"{path}: names no place: give a URL such as s3://bucket/folder")
    match = _URL.fullmatch(str(path or ""))
    root = "/" if match and match[1] in ("file", "local") else ""
    return f"{match[1]}://{root}{match[2]}" if match else None


def check_here(path: str, why: str) -> str:
    """The path; ValueError if it is a URL, where a local folder is needed."""
    if url := url_of(path):
        raise ValueError(f"{url}: give a folder of this machine, not a URL: {why}")
    return path


@dataclass(frozen=True, order=True)
class RemoteFile:
    """A file behind a URL, with what readers of text use of `pathlib.Path`."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return posixpath.basename(self.url)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.url)[1]

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The open file; errors are OSErrors, of a driver that is missing an ImportError."""
        fs, path = _filesystem(self.url)
        return fs.open(path, mode)

    def resolve(self) -> "RemoteFile":
        """Itself: there are no links."""
        return self

    def stat(self) -> SimpleNamespace:
        """st_size, and for st_mtime_ns what changes with the content (an entity tag, a time)."""
        fs, path = _filesystem(self.url)
        return SimpleNamespace(st_size=fs.size(path), st_mtime_ns=fs.ukey(path))


def find_remote(url: str, suffixes: Sequence[str] = ()) -> list[RemoteFile]:
    """The files that a URL names, in order: of a folder, those that end in `suffixes`; of a glob; or one.

    Hidden files are left out unless a glob names them. Raises ValueError if there is none, or the store
    cannot be read.
    """
    with told(url):
        fs, path = _filesystem(url)
        if fs.isdir(path):
            ends = tuple(suffixes) or ""
            found = [name for name in fs.find(path) if name.lower().endswith(ends)]
            found = [name for name in found if not _HIDDEN.search(name.removeprefix(path))]
        elif re.search(r"[*?[]", path) and not fs.isfile(path):
            found = [name for name in fs.glob(path) if _HIDDEN.search(path) or not _HIDDEN.search(name)]
            found = [name for name in found if fs.isfile(name)]
        else:
            found = [path] if fs.isfile(path) else []
        if not found:
            raise ValueError(f"{url}: no such file or folder")
        return sorted(RemoteFile(fs.unstrip_protocol(name)) for name in found)


class RemoteFolder:
    """A folder behind a URL, or of a disk. Methods raise ValueError, naming the URL, if the store refuses."""

    def __init__(self, url: str):
        self.url = url
        with told(url):
            self._fs, self._path = _filesystem(url)
        # Paths of stores without folders begin with a bucket.
        self._has_folders = self._path.startswith("/") and self._fs.protocol != "memory"

    def lies_in(self, path: Path) -> bool:
        """Whether this is that folder of this machine, or inside of it."""
        here, there = (Path(os.path.realpath(each)) for each in (path, self._path))
        return "file" in self._fs.protocol and there.is_relative_to(here)

    def check_writable(self) -> None:
        """Write a file and remove it."""
        with told(self.url):
            self._make_folders([self._at("x")])
            self._fs.pipe_file(self._at(".writable"), b"")
            self._fs.rm_file(self._at(".writable"))

    def files(self) -> list[str]:
        """Names of all files in it, with those of subfolders before them; none if nothing is there."""
        with told(self.url):
            found = self._fs.find(self._path) if self._fs.isdir(self._path) else []
        names = (posixpath.relpath(name, self._path) for name in found)
        return [name for name in names if not name.startswith("..")]  # a key may hold dots

    def folders(self, name: str) -> list[str]:
        """Names of the folders in a subfolder; none if it is not there."""
        with told(self.url):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._at(name), detail=True)
            except FileNotFoundError:
                return []
        return [posixpath.basename(each["name"].rstrip("/")) for each in found if each["type"] == "directory"]

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it is not there."""
        with told(self.url):
            try:
                return self._fs.cat_file(self._at(name))
            except FileNotFoundError:
                return None

    def put(self, folder: Path, names: Sequence[str]) -> None:
        """Copy files of a local folder to the same names here. Each appears whole."""
        targets = [self._at(name) for name in names]
        # An object store shows a file once it is whole; elsewhere write it aside, then rename.
        asides = [f"{target}.tmp" if self._has_folders else target for target in targets]
        with told(self.url):
            self._make_folders(targets)
            self._fs.put([str(folder / name) for name in names], asides)
            for aside, target in zip(asides, targets, strict=True):
                if aside != target:
                    self._fs.mv(aside, target)

    def get(self, names: Sequence[str], folder: Path) -> None:
        """Copy files from here to the same names in a local folder."""
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with told(self.url):
            self._fs.get([self._at(name) for name in names], [str(folder / name) for name in names])

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        with told(self.url), suppress(FileNotFoundError):
            self._fs.rm(self._at(name), recursive=True)

    def _at(self, name: str) -> str:
        return posixpath.join(self._path, name)

    def _make_folders(self, paths: Sequence[str]) -> None:
        if self._has_folders:  # elsewhere there are none to make, and s3fs would make a missing bucket
            for parent in {posixpath.dirname(path) for path in paths}:
                self._fs.makedirs(parent, exist_ok=True)


@cache
def local_copy(url: str) -> Path:
    """A temporary copy of a model's folder behind a URL, without a trainer's state, until the process ends.

    Raises ValueError if nothing is there, or the store cannot be read.
    """
    scratch = Path(tempfile.mkdtemp(prefix="lrnn-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    folder = scratch / (posixpath.basename(url.rstrip("/")) or "model")
    store = RemoteFolder(url)
    names = store.files()
    if not names:
        raise ValueError(f"{url}: no such folder")
    store.get([name for name in names if not name.startswith("trainer/")], folder)
    return folder


def check_free(url: str) -> None:
    """Raise ValueError if something is behind a URL already, or the store cannot be read."""
    with told(url):
        fs, path = _filesystem(url)
        if fs.isfile(path) or fs.find(path):
            raise ValueError(f"{url}: is not empty; give a new folder to export to")


def upload(folder: Path, url: str) -> None:
    """Copy a folder to a URL. config.json comes last: without it the copy is no model yet."""
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    last = [name for name in files if posixpath.basename(name) == "config.json"]
    store = RemoteFolder(url)
    store.put(folder, [name for name in files if name not in last])
    store.put(folder, last)


@contextmanager
def told(url: str) -> Iterator[None]:
    """Inside, errors of a store are ValueErrors that name the URL."""
    try:
        yield
    except ImportError as error:  # the driver of a protocol is a package of its own
        raise ValueError(f"{url}: {error}") from None
    except (OSError, *_errors_of_drivers()) as error:
        plain = isinstance(error, OSError) and not isinstance(error, PermissionError)
        why = "cannot be read or written" if plain else "no access"
        raise ValueError(
            f"{url}: {why} ({' '.join(str(error).split())[:200] or 'no reason given'})"
        ) from None


def _errors_of_drivers() -> list[type[Exception]]:
    """What drivers raise for missing keys, which is no OSError."""
    names = {"botocore.exceptions": "BotoCoreError", "google.auth.exceptions": "GoogleAuthError"}
    return [getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules]


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ImportError("URLs need fsspec: pip install fsspec, or copy the files here") from None
    try:
        return url_to_fs(url)
    except ValueError as error:  # an unknown protocol
        raise ValueError(f"{url}: {error}") from None
