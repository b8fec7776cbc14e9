"""Token shards on disk: the concatenated documents of a split, as memory-mapped integers.

A split of token files made elsewhere has an index of them in place of shards: see token_files.py. Otherwise,
shard k of split S is `S-k.tokens.bin` (uint16 or uint32, little-endian) and `S-k.starts.bin` (uint64: where
in the shard each document starts). A document never crosses shards. Counts and checksums are in the folder's
manifest.
"""

import hashlib
import resource
from pathlib import Path
from typing import Any, BinaryIO, ClassVar
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from .specs import DataError

Tokens = npt.NDArray[np.integer[Any]]
HELDOUT = "validation.jsonl"  # the held-out documents beside the shards
STARTS_DTYPE = np.dtype("<u8")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


class HashedFile:
    """A new file that computes its sha256 while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._file: BinaryIO = path.open("xb")
        self._sha = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha.update(data)
        self.size += len(data)

    def close(self) -> dict[str, Any]:
        """Close and return {"bytes": .., "sha256": ..}; a second call returns the same."""
        self._file.close()
        return {"bytes": self.size, "sha256": self._sha.hexdigest()}


class ShardWriter:
    """Writes the shards of one split, in memory that does not grow with the text."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.num_documents = self.num_bytes = 0
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._open: tuple[HashedFile, HashedFile] | None = None

    def add(self, tokens: Tokens, num_bytes: int) -> None:
        """Append one document (n,) whose text has `num_bytes` bytes of UTF-8."""
        if self._open is None:
            stem = f"{self._split}-{len(self._shards):05d}"
            names = (f"{stem}.tokens.bin", f"{stem}.starts.bin")
            self._open = (HashedFile(self._folder / names[0]), HashedFile(self._folder / names[1]))
            self._shards.append({"tokens": names[0], "starts": names[1], "num_tokens": 0, "num_documents": 0})
        shard = self._shards[-1]
        self._open[0].write(tokens.astype(self._dtype).tobytes())
        self._open[1].write(np.array(shard["num_tokens"], STARTS_DTYPE).tobytes())
        shard["num_tokens"] += len(tokens)
        shard["num_documents"] += 1
        self.num_documents += 1
        self.num_bytes += num_bytes
        if shard["num_tokens"] >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        """Close the current shard; the next `add` opens another."""
        for file in self._open or ():
            self.files[file.path.name] = file.close()
        self._open = None

    def summary(self) -> dict[str, Any]:
        """The split's entry in the manifest."""
        return {
            "num_tokens": sum(shard["num_tokens"] for shard in self._shards),
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "shards": self._shards,
        }


class TokenShards:
    """One split, read by position in its stream of tokens. Cheap to pickle: files are mapped on first use."""

    # Those of this process that have mapped files. A map keeps its file open, and `ulimit -n` is often 1,024.
    _mapping: ClassVar["WeakSet[TokenShards]"] = WeakSet()

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        entry = manifest["splits"][split]
        self.folder, self.split = folder, split
        self.dtype = np.dtype(manifest["dtype"])
        self.num_tokens: int = entry["num_tokens"]
        self.num_documents: int = entry["num_documents"]
        self.num_bytes: int | None = entry["num_bytes"]  # None: not known, of token files
        self._shards: list[dict[str, Any]] = entry["shards"]
        ends = np.cumsum([shard["num_tokens"] for shard in self._shards], dtype=np.int64)
        self._offsets = np.concatenate([np.zeros(1, np.int64), ends])  # (shards + 1,)
        self._maps: dict[str, Tokens] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens start..stop-1 of the stream, (stop - start,); shorter at its end."""
        parts = [  # copies, so that no map is held
            self._map(shard["tokens"], self.dtype)[a:b].astype(np.int64)
            if "tokens" in shard
            else self._gather(shard, a, b)
            for shard, a, b, _ in self._overlaps(start, stop)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Positions p in start..stop-1 at which a document starts, as p - start, ascending."""
        found = [np.zeros(0, np.int64)]
        for shard, a, b, offset in self._overlaps(start, stop):
            starts = self._map(shard["starts"], STARTS_DTYPE)
            low, high = starts.searchsorted(np.array([a, b], STARTS_DTYPE))
            found.append(starts[low:high].astype(np.int64) + (offset - start))
        return np.concatenate(found)

    def _overlaps(self, start: int, stop: int) -> list[tuple[dict[str, Any], int, int, int]]:
        """(shard, from, to, its offset in the stream) of each shard that holds some of start..stop-1."""
        first = int(self._offsets.searchsorted(start, side="right")) - 1
        pieces = []
        for k in range(first, len(self._shards)):
            offset = int(self._offsets[k])
            if offset >= stop:
                break
            shard = self._shards[k]
            pieces.append((shard, max(start - offset, 0), min(stop - offset, shard["num_tokens"]), offset))
        return pieces

    def _gather(self, shard: dict[str, Any], start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens start..stop-1 of a shard that is an index of a token file (token_files.py)."""
        ids = self._map(shard["file"], np.dtype(shard["dtype"]), shard["begin"])
        starts, offsets = (self._map(shard[key], STARTS_DTYPE) for key in ("starts", "offsets"))
        parts = []
        for k in range(int(np.searchsorted(starts, start, side="right")) - 1, len(starts)):
            begin = int(starts[k])
            if begin >= stop:
                break
            end = int(starts[k + 1]) if k + 1 < len(starts) else shard["num_tokens"]
            low, high = max(start, begin) - begin, min(stop, end) - begin  # first, its ids, last
            if low == 0:
                parts.append([shard["first"]])
            offset = int(offsets[k]) - 1
            parts.append(ids[offset + max(low, 1) : offset + min(high, end - begin - 1)])
            if high == end - begin:
                parts.append([shard["last"]])
        return np.concatenate(parts).astype(np.int64)

    def _map(self, name: str, dtype: np.dtype[Any], begin: int = 0) -> Tokens:
        """A file from byte `begin` on; `name` may be a path elsewhere. All splits share half of the limit;
        the one with most maps gives way."""
        if name not in self._maps:
            self._mapping.add(self)
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            while 0 <= limit // 2 <= sum(len(split._maps) for split in self._mapping):
                oldest_first = max((split._maps for split in self._mapping), key=len)
                del oldest_first[next(iter(oldest_first))]
            # A plain array of the map: each cut of a memmap makes an object of Python's.
            self._maps[name] = np.asarray(np.memmap(self.folder / name, dtype, "r", offset=begin))
        return self._maps[name]


def check_file(folder: Path, name: str, facts: dict[str, Any], checksum: bool) -> None:
    """Raise DataError if a file's size, or with `checksum` its sha256, is not that of the manifest."""
    path = folder / name
    rebuild = f"remove the folder {folder} and run `lrnn prepare` again to rebuild it"
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise DataError(f"{path}: damaged ({size} bytes instead of {facts['bytes']}); {rebuild}")
        if checksum:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != facts["sha256"]:
                raise DataError(f"{path}: damaged (its sha256 differs from the manifest's); {rebuild}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {rebuild}") from None
