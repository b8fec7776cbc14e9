"""`prepare`: from a DataSpec to a tokenizer and token shards on disk, once.

Both are kept under cache_dir in folders named by a hash of everything that decides their bytes: a second call
finds them, and another text, tokenizer or split makes new ones.

    cache_dir/tokenizers/NAME-HASH/  a fast HF tokenizer
    cache_dir/data/NAME-HASH/        tokenizer/, train-*.bin, validation-*.bin, validation.jsonl, manifest
"""

import errno
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import sources, storage, tokenize
from .encode import encode_documents
from .progress import Progress
from .shards import HashedFile, ShardWriter, TokenShards, check_file, token_dtype
from .specs import DataError, DataSpec
from .split import HASHES, HeldOut, OneSidedError, text_hash, training_sample

FORMAT = 3  # raise it when the same spec would give other bytes
MANIFEST = "manifest.json"
HELDOUT = "validation.jsonl"


@dataclass(frozen=True)
class PreparedData:
    """What `prepare` leaves in `folder`."""

    folder: Path
    tokenizer_dir: Path
    tokenizer_hash: str
    vocab_size: int  # the tokenizer's largest id + 1
    train: TokenShards
    validation: TokenShards
    heldout_path: Path  # held-out documents, {"text": ..} a line, in the order of `validation`'s tokens
    manifest: dict[str, Any]  # its content_hash is equal for folders of the same shards and tokenizer

    def check_tokenizer(self, folder: str | Path) -> None:
        """Raise DataError unless the tokenizer in `folder` (a checkpoint) is the one that made the shards."""
        if tokenize.tokenizer_hash(folder) != self.tokenizer_hash:
            raise DataError(
                f"the tokenizer in {folder} is not the one that made the shards in {self.folder}; "
                "set data.tokenizer to that folder and run `lrnn prepare` again"
            )


def prepare(spec: DataSpec, progress: bool = True) -> PreparedData:
    """Make the tokenizer and the shards of `spec` unless they exist, and open them.

    If it is interrupted, nothing half-made stays. Raises DataError for every mistake of the user's.
    """
    cache = Path(spec.cache_dir).expanduser()
    try:
        for kind in ("tokenizers", "data"):
            (cache / kind).mkdir(parents=True, exist_ok=True)
        folder = _prepare_folder(spec, cache, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise DataError(f"cannot write to data.cache_dir {spec.cache_dir}: {error.strerror}") from None
        raise
    prepared = open_prepared(folder)
    if prepared.train.num_tokens < spec.sequence_length + 1:
        raise DataError(
            f"the text is too short: its {prepared.train.num_tokens} training tokens do not fill one row of "
            f"data.sequence_length + 1 = {spec.sequence_length + 1}; use more text or shorter rows"
        )
    if spec.vocab_size is not None and prepared.vocab_size > spec.vocab_size:
        raise DataError(
            f"tokenizer {spec.tokenizer} has {prepared.vocab_size} tokens, "
            f"which do not fit in vocab_size {spec.vocab_size}"
        )
    return prepared


def open_prepared(folder: str | Path, verify: bool = False) -> PreparedData:
    """Open a folder that `prepare` made; checks the sizes of its files, with `verify` also their sha256.

    Raises DataError, with how to rebuild, for a damaged file or a tokenizer that did not make the shards.
    """
    folder = Path(folder)
    rebuild = f"remove the folder {folder} and run `lrnn prepare` again to rebuild it"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder}: no prepared data here ({MANIFEST} is missing)") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST}: damaged ({error}); {rebuild}") from None
    if manifest.get("format") != FORMAT:
        raise DataError(f"{folder}: prepared by another version (format {manifest.get('format')}); {rebuild}")
    for name, facts in manifest["files"].items():
        check_file(folder, name, facts, checksum=verify)
    tokenizer_dir = folder / "tokenizer"
    expected = manifest["tokenizer"]["hash"]
    if tokenize.tokenizer_hash(tokenizer_dir) != expected:
        raise DataError(f"{tokenizer_dir}: this tokenizer did not make the shards beside it; {rebuild}")
    return PreparedData(
        folder=folder,
        tokenizer_dir=tokenizer_dir,
        tokenizer_hash=expected,
        vocab_size=manifest["tokenizer"]["vocab_size"],
        train=TokenShards(folder, "train", manifest),
        validation=TokenShards(folder, "validation", manifest),
        heldout_path=folder / HELDOUT,
        manifest=manifest,
    )


def _prepare_folder(spec: DataSpec, cache: Path, progress: bool) -> Path:
    recipe = _tokenizer_recipe(spec)
    text_key = [
        FORMAT,
        sources.fingerprint(spec.source),
        sources.fingerprint(spec.validation_source) if spec.validation_source else spec.validation_fraction,
    ]
    tokenizer_key = [
        FORMAT,
        *([tokenize.recipe_key(recipe), text_key] if recipe else _tokenizer_fingerprint(spec.tokenizer)),
    ]
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", Path(spec.tokenizer).stem).strip("-.") or "tokenizer"
    tokenizer = cache / "tokenizers" / f"{stem}-{_hash(tokenizer_key)}"
    folder = cache / "data" / f"{spec.source.type}-{_hash([text_key, tokenizer_key, spec.shard_tokens])}"
    if folder.is_dir():
        return folder
    for parent in (tokenizer.parent, folder.parent):
        storage.clear_leftovers(parent)
    storage.build_folder(folder, partial(_build, spec, recipe, tokenizer, progress))
    return folder


def _tokenizer_recipe(spec: DataSpec) -> tokenize.TokenizerRecipe | None:
    """The SentencePiece recipe that spec.tokenizer names; None for a ready tokenizer."""
    path = Path(spec.tokenizer).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise DataError(f"{spec.tokenizer}: no such tokenizer recipe (data.tokenizer)")
        return tokenize.read_recipe(path, spec.vocab_size)
    if path.is_file():
        raise DataError(
            f"{spec.tokenizer}: data.tokenizer takes a folder, a hub name or a .yaml recipe, not this file"
        )
    return None


def _tokenizer_fingerprint(name: str) -> list[object]:
    """What identifies a ready tokenizer: hashes of its folder's files; or its hub name, without a network."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return [name]
    files = sorted(f for f in folder.iterdir() if f.suffix in (".json", ".model", ".txt") and f.is_file())
    return [[f.name, hashlib.sha256(f.read_bytes()).hexdigest()] for f in files]


def _hash(key: object) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _build(
    spec: DataSpec, recipe: tokenize.TokenizerRecipe | None, tokenizer: Path, progress: bool, aside: Path
) -> None:
    """Fill `aside` with everything. If a small corpus leaves one side of the split empty, split it again."""
    _report_empty_files(spec)
    held_out = HeldOut(int(spec.validation_fraction * HASHES))
    if spec.validation_source:
        held_out = HeldOut(0, frozenset(map(text_hash, sources.documents(spec.validation_source))))
    try:
        _build_split(spec, recipe, tokenizer, held_out, progress, aside)
    except OneSidedError as error:
        if error.threshold is None:
            raise
        shutil.rmtree(aside)
        aside.mkdir()
        if recipe:  # the tokenizer saw other train documents
            tokenizer = tokenizer.with_name(f"{tokenizer.name}-resplit")
        _build_split(spec, recipe, tokenizer, HeldOut(error.threshold), progress, aside)


def _report_empty_files(spec: DataSpec) -> None:
    both = (spec.source, spec.validation_source)
    empty = [str(file) for source in both if source for file in sources.empty_files(source)]
    if empty:
        names = ", ".join(empty[:3]) + (f" and {len(empty) - 3} more" if len(empty) > 3 else "")
        print(f"lrnn: empty files are left out: {names}", file=sys.stderr)


def _build_split(
    spec: DataSpec,
    recipe: tokenize.TokenizerRecipe | None,
    tokenizer: Path,
    held_out: HeldOut,
    progress: bool,
    aside: Path,
) -> None:
    with Progress(progress) as bar:
        bar.stage("tokenizer")
        storage.build_folder(tokenizer, partial(_build_tokenizer, spec, recipe, held_out))
        facts = tokenize.read_facts(tokenizer)
        shutil.copytree(tokenizer, aside / "tokenizer")
        bar.stage("tokenising")
        writers = {
            split: ShardWriter(aside, split, token_dtype(facts.vocab_size), spec.shard_tokens)
            for split in ("train", "validation")
        }
        heldout_file = HashedFile(aside / HELDOUT)
        pairs = _tagged_documents(spec, held_out)
        with closing(encode_documents(pairs, tokenizer, facts, spec.num_proc)) as encoded:
            for text, split, ids in encoded:
                size = len(text.encode())
                writers[split].add(ids, size)
                if split == "validation":
                    heldout_file.write(json.dumps({"text": text}).encode() + b"\n")
                bar.advance(len(ids), size)
    for split, writer in writers.items():
        writer.close()
        if not writer.num_documents:
            raise held_out.one_sided(split)
    files = {HELDOUT: heldout_file.close()} | writers["train"].files | writers["validation"].files
    _write_manifest(aside, spec, held_out, facts, writers, files)


def _build_tokenizer(
    spec: DataSpec, recipe: tokenize.TokenizerRecipe | None, held_out: HeldOut, folder: Path
) -> None:
    if recipe is None:
        tokenize.import_tokenizer(spec.tokenizer, folder)
    else:
        tokenize.train(
            training_sample(sources.documents(spec.source), held_out, recipe.sample_bytes), recipe, folder
        )


def _tagged_documents(spec: DataSpec, held_out: HeldOut) -> Iterator[tuple[str, str]]:
    """(text, split) of every document, without train documents that are in the validation source too."""
    if spec.validation_source:
        for text in sources.documents(spec.validation_source):
            yield text, "validation"
    for text in sources.documents(spec.source):
        if not held_out.holds(text):
            yield text, "train"
        elif not spec.validation_source:
            yield text, "validation"


def _write_manifest(
    aside: Path,
    spec: DataSpec,
    held_out: HeldOut,
    facts: tokenize.TokenizerFacts,
    writers: dict[str, ShardWriter],
    files: dict[str, dict[str, Any]],
) -> None:
    hashes = [facts.hash, *(file["sha256"] for file in files.values())]
    manifest = {
        "format": FORMAT,
        "source": asdict(spec.source),
        "validation_source": asdict(spec.validation_source) if spec.validation_source else None,
        "validation_fraction": None if spec.validation_source else held_out.threshold / HASHES,
        "tokenizer": {"name": spec.tokenizer, **asdict(facts)},
        "dtype": token_dtype(facts.vocab_size).name,
        "splits": {split: writer.summary() for split, writer in writers.items()},
        "files": files,
        "content_hash": hashlib.sha256("".join(hashes).encode()).hexdigest(),
    }
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
