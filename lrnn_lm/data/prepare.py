"""`prepare`: from DataSpecs, one a source, to a tokenizer and token shards on disk, once.

Both are kept under cache_dir in folders named by a hash of everything that decides their bytes: a second call
finds them, and another text, tokenizer or split makes new ones.

    cache_dir/tokenizers/NAME-HASH/  a fast HF tokenizer
    cache_dir/data/NAME-HASH/        tokenizer/, train-*.bin, validation-*.bin, validation.jsonl, manifest
"""

import errno
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..files import user_path
from ..output import error_console
from . import sources, storage, token_files, tokenize
from .encode import encode_documents
from .progress import Progress
from .shards import HELDOUT, HashedFile, ShardWriter, TokenShards, check_file, token_dtype
from .specs import DataError, DataSpec, SourceSpec
from .split import HASHES, HeldOut, Short, one_sided, text_hash, training_sample

T = TypeVar("T")
FORMAT = 3  # raise it when the same spec would give other bytes
MANIFEST = "manifest.json"
_REBUILD = "remove the folder {} and run `lrnn prepare` again to rebuild it"


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
    """Make the tokenizer and the shards of `spec` unless they exist, and open them; see `prepare_all`."""
    return prepare_all([spec], progress)[0]


def prepare_all(specs: Sequence[DataSpec], progress: bool = True) -> list[PreparedData]:
    """Make one tokenizer for all sources, and the shards of each, unless they exist; open them.

    The specs differ only in their sources and what is held out of them. A text that one source names for
    validation is left out of the training text of all. If it is interrupted, nothing half-made stays. Raises
    DataError for every mistake of the user's.
    """
    _check_files(specs)
    cache = user_path(specs[0].cache_dir)
    try:
        for kind in ("tokenizers", "data"):
            (cache / kind).mkdir(parents=True, exist_ok=True)
        folders = _prepare_folders(specs, cache, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise DataError(f"cannot write to data.cache_dir {cache}: {error.strerror}") from None
        raise
    return [_opened(spec, folder) for spec, folder in zip(specs, folders, strict=True)]


def _opened(spec: DataSpec, folder: Path) -> PreparedData:
    prepared = open_prepared(folder)
    if prepared.train.num_tokens < spec.sequence_length + 1:
        raise DataError(
            f"{sources.describe(spec.source)}: the text is too short: its {prepared.train.num_tokens} "
            "training tokens do not fill one row of "
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
    rebuild = _REBUILD.format(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        ours = (folder / "tokenizer").is_dir()  # else it may be anybody's folder, and nothing to remove
        advice = f"; {rebuild}" if ours else ""
        raise DataError(f"{folder}: no prepared data here ({MANIFEST} is missing){advice}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST}: damaged ({error}); {rebuild}") from None
    if manifest.get("format") != FORMAT:
        raise DataError(f"{folder}: prepared by another version (format {manifest.get('format')}); {rebuild}")
    for name, facts in manifest["files"].items():
        check_file(folder, name, facts, checksum=verify)
    token_files.check_unchanged(manifest)
    tokenizer_dir = folder / "tokenizer"
    expected = manifest["tokenizer"]["hash"]
    if _tokenizer_of_ours(tokenize.tokenizer_hash, tokenizer_dir, folder) != expected:
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


def _tokenizer_of_ours(read: Callable[[Path], T], tokenizer: Path, folder: Path) -> T:
    """What `read` finds in a tokenizer that lies in `folder` of the cache. DataError, with how to rebuild, if
    files are gone: some clusters remove what has not been read for weeks."""
    try:
        return read(tokenizer)
    except DataError as error:
        raise DataError(f"{error}; {_REBUILD.format(folder)}") from None


def _prepare_folders(specs: Sequence[DataSpec], cache: Path, progress: bool) -> list[Path]:
    """The folder of each source, made unless it exists."""
    recipe = _tokenizer_recipe(specs[0])
    text_keys = [_text_key(spec, specs) for spec in specs]
    name = specs[0].tokenizer
    tokenizer_key = [
        FORMAT,
        *([tokenize.recipe_key(recipe), *text_keys] if recipe else tokenize.fingerprint(name)),
    ]
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", Path(name).stem).strip("-.") or "tokenizer"
    tokenizer = cache / "tokenizers" / f"{stem}-{_hash(tokenizer_key)}"
    least = [] if specs[0].min_document is None else [specs[0].min_document]
    folders = [
        cache / "data" / f"{spec.source.type}-{_hash([key, tokenizer_key, spec.shard_tokens, *least])}"
        for spec, key in zip(specs, text_keys, strict=True)
    ]
    if all(folder.is_dir() for folder in folders):
        return folders
    for parent in (tokenizer.parent, cache / "data"):
        storage.clear_leftovers(parent)
    _report_empty_files(specs)
    named = [spec.validation_source for spec in specs if spec.validation_source]
    texts = [source for source in named if source.type not in token_files.TYPES]
    listed = frozenset(text_hash(text) for source in texts for text in sources.documents(source))
    splits = [_held_out(spec, listed) for spec in specs]
    if recipe and any(split.threshold != _threshold(spec) for split, spec in zip(splits, specs, strict=True)):
        tokenizer = tokenizer.with_name(f"{tokenizer.name}-resplit")  # it saw other train documents
    make_tokenizer = partial(_build_tokenizer, specs, recipe, splits)
    if recipe:
        make_tokenizer = partial(_unchanged, make_tokenizer, specs, dict(enumerate(text_keys)))
    named = [source for source in named if source not in texts]
    for number, (spec, split, folder) in enumerate(zip(specs, splits, folders, strict=True)):
        fill = partial(_build, spec, split, named, tokenizer, make_tokenizer, progress)
        storage.build_folder(folder, partial(_unchanged, fill, specs, {number: text_keys[number]}))
    return folders


def _unchanged(
    fill: Callable[[Path], None], specs: Sequence[DataSpec], keys: dict[int, list[Any]], aside: Path
) -> None:
    """`fill` a folder. DataError if a text is not what its key (of the spec of this number) says any more: no
    later start would find the same, and whatever else `fill` complains of is a consequence."""
    problem = None
    try:
        fill(aside)
    except DataError as error:
        problem = error
    for number, key in keys.items():
        if specs[number].source.type == "hf":  # its key is of all files in a folder, `datasets` reads some
            continue
        if _text_key(specs[number], specs) != key:
            what = "the files changed while they were read; run again once they are whole"
            raise DataError(f"{sources.describe(specs[number].source)}: {what} (is a copy under way?)")
    if problem is not None:
        raise problem


def _check_files(specs: Sequence[DataSpec]) -> None:
    """Raise DataError if two sources read the same file, as two globs may."""
    owners: dict[Path, SourceSpec] = {}
    for spec in specs if len(specs) > 1 else ():
        source = spec.source
        for file in sources.files(source) if source.type in sources.FILE_TYPES else ():
            if (other := owners.setdefault(file.resolve(), source)) is not source:
                raise DataError(
                    f"{file} is in two sources, {sources.describe(other)} and {sources.describe(source)}; "
                    "let one of them leave it out"
                )


def _text_key(spec: DataSpec, specs: Sequence[DataSpec]) -> list[Any]:
    """What decides a source's documents and which of them are held out."""
    own, others = spec.validation_source, [s.validation_source for s in specs if s is not spec]
    key = [
        FORMAT,
        sources.fingerprint(spec.source),
        sources.fingerprint(own) if own else spec.validation_fraction,
    ]
    excluded = [sources.fingerprint(other) for other in others if other]
    return [*key, excluded] if excluded else key


def _threshold(spec: DataSpec) -> int:
    return 0 if spec.validation_source else int(spec.validation_fraction * HASHES)


def _held_out(spec: DataSpec, listed: frozenset[int]) -> HeldOut:
    """What is held out of a source: its own fraction or text, and all that is `listed` for validation."""
    if spec.source.type in token_files.TYPES:
        return HeldOut(_threshold(spec))  # hashes of ids are known later
    held_out = HeldOut(_threshold(spec), listed)
    if spec.validation_source:
        return held_out
    return held_out.with_both_sides(map(text_hash, sources.documents(spec.source)), spec.source)


def _tokenizer_recipe(spec: DataSpec) -> tokenize.TokenizerRecipe | None:
    """The SentencePiece recipe that spec.tokenizer names; None for a ready tokenizer."""
    path = user_path(spec.tokenizer)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise DataError(f"{spec.tokenizer}: no such tokenizer recipe (data.tokenizer)")
        return tokenize.read_recipe(path, spec.vocab_size)
    if path.is_file():
        raise DataError(
            f"{spec.tokenizer}: data.tokenizer takes a folder, a hub name or a .yaml recipe, not this file"
        )
    return None


def _hash(key: object) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _report_empty_files(specs: Sequence[DataSpec]) -> None:
    both = [source for spec in specs for source in (spec.source, spec.validation_source) if source]
    empty = [str(file) for source in both for file in sources.empty_files(source)]
    if empty:
        names = ", ".join(empty[:3]) + (f" and {len(empty) - 3} more" if len(empty) > 3 else "")
        error_console().print(f"lrnn: empty files are left out: {names}", markup=False, soft_wrap=True)


def _build(
    spec: DataSpec,
    held_out: HeldOut,
    named: Sequence[SourceSpec],
    tokenizer: Path,
    make_tokenizer: Callable[[Path], None],
    progress: bool,
    aside: Path,
) -> None:
    """Fill `aside` with the tokenizer, made unless it is there, the shards and the held-out documents.

    named: the token files that some source names for validation.
    """
    with Progress(progress) as bar:
        bar.stage("tokenizer")
        storage.build_folder(tokenizer, make_tokenizer)
        facts = _tokenizer_of_ours(tokenize.read_facts, tokenizer, tokenizer)
        shutil.copytree(tokenizer, aside / "tokenizer")
        bar.stage("tokenising")
        write = partial(_write_texts, aside, spec, tokenizer, facts, bar)
        if spec.source.type not in token_files.TYPES:
            splits, files, _ = write(_tagged_documents(spec, held_out), ("train", "validation"))
        else:
            own, listed = spec.validation_source, set()
            splits, files = {}, {}
            if own and own.type not in token_files.TYPES:
                texts = ((text, "validation") for text in sources.documents(own))
                splits, files, listed = write(texts, ("validation",))
            index = token_files.Index(aside, tokenizer, facts, spec.num_proc)
            indexed, more = index.write(spec, named, listed, held_out, bar)
            splits, files = splits | indexed, files | more
    _write_manifest(aside, spec, held_out, facts, splits, files)


def _write_texts(
    aside: Path,
    spec: DataSpec,
    tokenizer: Path,
    facts: tokenize.TokenizerFacts,
    bar: Progress,
    pairs: Iterable[tuple[str, str]],
    splits: Sequence[str],
) -> tuple[dict[str, Any], dict[str, Any], set[int]]:
    """Tokenise (text, split) pairs into shards, and write the held-out texts.

    Returns the splits' entries in the manifest, those of the files, and the hashes of the held-out ids.
    """
    dtype = token_dtype(facts.vocab_size)
    writers = {split: ShardWriter(aside, split, dtype, spec.shard_tokens) for split in splits}
    short = Short(spec)
    heldout_file, hashes, unknown, changed = HashedFile(aside / HELDOUT), set(), 0, 0
    backend = tokenize.load_backend(tokenizer)
    with closing(encode_documents(pairs, tokenizer, facts, spec.num_proc)) as encoded:
        for text, split, ids in encoded:
            size = len(text.encode())
            if split == "train" and short.leaves_out(len(ids) - 2):
                continue
            writers[split].add(ids, size)
            if split == "validation":
                heldout_file.write(json.dumps({"text": text}).encode() + b"\n")
                hashes.add(token_files.id_hash(ids[1:-1]))
                unknown += facts.unknown is not None and facts.unknown in ids[1:-1]
                changed += not tokenize.spells(backend, ids[1:-1].tolist(), text)
            bar.advance(len(ids), size)
    files = {HELDOUT: heldout_file.close()}
    for split, writer in writers.items():
        writer.close()
        if not writer.num_documents:
            raise short.error() if split == "train" and short.documents else one_sided(split, spec.source)
        files |= writer.files
    found = {split: writer.summary() for split, writer in writers.items()}
    if "train" in found:
        found["train"] |= short.facts()
    if unknown:  # one token hides any text, so bytes say nothing of what was predicted
        found["validation"] |= {"num_bytes": None, "unknown": unknown}
    elif changed:
        found["validation"] |= {"respelt": changed}
    return found, files, hashes


def _build_tokenizer(
    specs: Sequence[DataSpec],
    recipe: tokenize.TokenizerRecipe | None,
    splits: Sequence[HeldOut],
    folder: Path,
) -> None:
    """Import the tokenizer, or train it on equal parts of all sources' training text."""
    if recipe is None:
        tokenize.import_tokenizer(specs[0].tokenizer, folder)
        return
    size = recipe.sample_bytes // len(specs)
    samples = [training_sample(spec.source, split, size) for spec, split in zip(specs, splits, strict=True)]
    tokenize.train(itertools.chain.from_iterable(samples), recipe, folder)


def _tagged_documents(spec: DataSpec, held_out: HeldOut) -> Iterator[tuple[str, str]]:
    """(text, split) of every document, without train documents that are in the validation source too."""
    if spec.validation_source:
        for text in sources.documents(spec.validation_source):
            yield text, "validation"
    for text in sources.documents(spec.source):
        if not held_out.holds(text_hash(text)):
            yield text, "train"
        elif not spec.validation_source:
            yield text, "validation"


def _write_manifest(
    aside: Path,
    spec: DataSpec,
    held_out: HeldOut,
    facts: tokenize.TokenizerFacts,
    splits: dict[str, Any],
    files: dict[str, dict[str, Any]],
) -> None:
    hashes = [facts.hash, *(file["sha256"] for file in files.values())]
    hashes += [s["ids_sha256"] for split in splits.values() for s in split["shards"] if "file" in s]
    manifest = {
        "format": FORMAT,
        "source": asdict(spec.source),
        "validation_source": asdict(spec.validation_source) if spec.validation_source else None,
        "validation_fraction": None if spec.validation_source else held_out.threshold / HASHES,
        "tokenizer": {"name": spec.tokenizer, **asdict(facts)},
        "dtype": token_dtype(facts.vocab_size).name,
        "splits": splits,
        "files": files,
        "content_hash": hashlib.sha256("".join(hashes).encode()).hexdigest(),
    }
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
