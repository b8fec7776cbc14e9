"""From a recipe's data section to prepared data: one source, a mixture of several, or a synthetic task."""

import bisect
import hashlib
import itertools
import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from ..data import (
    DataError,
    DataSpec,
    PreparedData,
    SourceSpec,
    SyntheticData,
    SyntheticTask,
    open_prepared,
    prepare_all,
    prepare_synthetic,
)
from ..data.mixture import Mixture, MixtureStage
from ..recipe import Recipe, resolve_path
from ..recipe.data import MixtureSource, SourceSection

Spec = TypeVar("Spec", DataSpec, SourceSpec)
_VERIFIED_BYTES = 4_000_000_000  # token shards up to this size are hashed at every start; more takes minutes


@dataclass(frozen=True)
class MixedData:
    """The sources of a mixture by name, all with the same tokenizer; otherwise as `PreparedData`."""

    parts: dict[str, PreparedData]

    @property
    def tokenizer_dir(self) -> Path:
        return self._any.tokenizer_dir

    @property
    def vocab_size(self) -> int:
        return self._any.vocab_size

    @property
    def _any(self) -> PreparedData:
        return next(iter(self.parts.values()))

    def check_tokenizer(self, folder: str | Path) -> None:
        """As of `PreparedData`."""
        self._any.check_tokenizer(folder)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the run keeps as data.json."""
        kept = ("source", "validation_source", "splits", "content_hash")
        hashes = [[name, part.manifest["content_hash"]] for name, part in self.parts.items()]
        return {
            "sources": {name: {key: part.manifest[key] for key in kept} for name, part in self.parts.items()},
            "tokenizer": self._any.manifest["tokenizer"],
            "content_hash": hashlib.sha256(json.dumps(hashes).encode()).hexdigest(),
        }


Prepared = PreparedData | MixedData | SyntheticData


def parts_of(prepared: Prepared) -> dict[str, PreparedData | SyntheticData]:
    """The sources by name; a single one, which is no mixture, has the name ``."""
    return dict(prepared.parts) if isinstance(prepared, MixedData) else {"": prepared}


def prepare_data(recipe: Recipe, progress: bool = True) -> Prepared:
    """The tokenizer and token shards of a recipe, made unless they are there; or its synthetic task.

    Raises DataError also if the budget needs more epochs of a source than its max_epochs.
    """
    data, source = recipe.data, recipe.data.source
    if data.sources:
        specs = [
            _spec(recipe, s, s.validation_source, s.validation_fraction or data.validation_fraction)
            for s in data.sources
        ]
        names = [s.name for s in data.sources]
        prepared: Prepared = MixedData(dict(zip(names, prepare_all(specs, progress), strict=True)))
    elif source.type == "synthetic":
        return prepare_synthetic(
            synthetic_task(recipe),
            source.examples,
            source.validation_examples,
            recipe.seed,
            data.cache_dir,
            recipe.model.vocab_size,
        )
    else:
        spec = _spec(recipe, source, data.validation_source, data.validation_fraction)
        (prepared,) = prepare_all([spec], progress)
    check_epochs(recipe, prepared)
    return prepared


def _spec(
    recipe: Recipe, source: SourceSection, validation: SourceSection | None, held_out: float
) -> DataSpec:
    return _shared(
        DataSpec,
        recipe.data,
        source=_source_spec(source),
        validation_source=_source_spec(validation) if validation else None,
        validation_fraction=held_out,
        tokenizer=str(resolve_path(recipe.data.tokenizer)),
        vocab_size=recipe.model.vocab_size,
    )


def _source_spec(source: SourceSection) -> SourceSpec:
    is_part = isinstance(source, MixtureSource)
    return _shared(SourceSpec, source, name=source.config if is_part else source.name)


def _shared(kind: type[Spec], section: BaseModel, **others: Any) -> Spec:
    """What `data/` needs of a recipe's section: the keys that both have, and `others`."""
    names = {field.name for field in fields(kind)} - others.keys()
    return kind(**section.model_dump(include=names), **others)


def synthetic_task(recipe: Recipe) -> SyntheticTask:
    """The task of a recipe whose source is synthetic; DataError if it cannot be made so."""
    source = recipe.data.source
    return SyntheticTask(source.task or "", recipe.data.sequence_length, source.options)


def mixture(recipe: Recipe) -> Mixture:
    """The order of the sources, in rows or in stretches of `rows_in_order`: a stage ends with the one in
    which its tokens are reached."""
    row = recipe.data.sequence_length * (recipe.data.rows_in_order or 1)
    ends = itertools.accumulate(stage.tokens or 0 for stage in recipe.data.stages[:-1])
    lengths = [b - a for a, b in itertools.pairwise([0, *(end // row for end in ends)])]
    weights = recipe.data.stage_weights
    return Mixture([MixtureStage(n, w) for n, w in zip([*lengths, None], weights, strict=True)])


def rows_read(recipe: Recipe, steps: int) -> list[int]:
    """Rows that the first steps read of each source."""
    order, length = mixture(recipe), recipe.data.rows_in_order
    if length is None:
        return order.counts(recipe.tokens_at(steps) // recipe.data.sequence_length)
    lanes = recipe.rows_at(0)
    turns, places = divmod(steps, length)
    pairs = zip(order.counts(turns * lanes), order.counts((turns + 1) * lanes), strict=True)
    return [before * length + (after - before) * places for before, after in pairs]


@dataclass(frozen=True)
class Use:
    """How much of a source a run reads."""

    name: str
    rows: int  # that it has; of `data.rows_in_order`, those of whole stretches, as the others are not read
    needed: int  # that the budget reads, repetitions included
    max_epochs: float | None

    @property
    def epochs(self) -> float:
        return self.needed / self.rows


def uses(recipe: Recipe, prepared: PreparedData | MixedData) -> list[Use]:
    """How much of each source the budget reads."""
    counts = rows_read(recipe, recipe.total_steps)
    sections = recipe.data.sources or [recipe.data.source]
    length, stretch = recipe.data.sequence_length, recipe.data.rows_in_order or 1
    return [
        Use(name, (part.train.num_tokens - 1) // length // stretch * stretch, needed, section.max_epochs)
        for (name, part), needed, section in zip(parts_of(prepared).items(), counts, sections, strict=True)
    ]


def check_epochs(recipe: Recipe, prepared: PreparedData | MixedData) -> None:
    """Raise DataError, with numbers, if the budget reads a source more often than its max_epochs."""
    stretch = recipe.data.rows_in_order or 1

    def over_at(steps: int) -> list[Use]:
        """Sources read too often. A stretch that is begun counts as a whole, as its first rows are read."""
        whole = -(-steps // stretch) * stretch
        found = [replace(use, needed=n) for use, n in zip(all_uses, rows_read(recipe, whole), strict=True)]
        return [use for use in found if use.max_epochs and use.needed > int(use.max_epochs * use.rows)]

    all_uses = uses(recipe, prepared)
    if short := next((use for use in all_uses if not use.rows), None):
        raise DataError(
            f"{short.name or 'data.source'}: the text is too short: it has fewer rows than "
            f"data.rows_in_order {stretch}"
        )
    if not (over := over_at(recipe.total_steps)):
        return
    worst = max(over, key=lambda use: use.epochs / use.max_epochs)
    others = f", and {len(over) - 1} more such" if len(over) > 1 else ""
    steps = bisect.bisect(range(recipe.total_steps + 1), False, key=lambda n: bool(over_at(n))) - 1
    remedies = ["raise max_epochs"] + ["lower the weight"] * (len(all_uses) > 1)
    remedies += [f"train at most train.tokens={recipe.tokens_at(steps)}"] if steps else []
    raise DataError(
        f"{worst.name or 'data.source'} has {worst.rows:,} rows of {recipe.data.sequence_length} tokens, and "
        f"the budget reads {worst.needed:,}: {worst.epochs:.2f} epochs where max_epochs is "
        f"{worst.max_epochs:g}{others}: {', or '.join(remedies)}"
    )


def describe_data(recipe: Recipe, prepared: Prepared) -> list[str]:
    """Lines on what was prepared, for `lrnn prepare`."""
    if isinstance(prepared, SyntheticData):
        task = prepared.task
        return [f"task {task.name}: {prepared.vocab_size} symbols; rows are made as they are read"]
    lines = []
    for use, part in zip(uses(recipe, prepared), parts_of(prepared).values(), strict=True):
        label = f"{use.name}, " if use.name else ""
        for split in (part.train, part.validation):
            text = f"{label}{split.split}: {split.num_tokens:,} tokens of {split.num_documents:,} documents"
            lines.append(text + (f", {split.num_bytes:,} bytes" if split.num_bytes else ""))
        lines.append(f"{label}read by the run: {use.needed:,} rows, {use.epochs:.2f} epochs of {use.rows:,}")
        lines += [f"{label}shards in {part.folder}"] if use.name else []
    where = "" if isinstance(prepared, MixedData) else f"; all in {prepared.folder}"
    return [*lines, *notes(prepared), f"tokenizer of {prepared.vocab_size:,} tokens{where}"]


def notes(prepared: Prepared) -> list[str]:
    """What to tell of documents that are left out: short ones, and held-out token files that do not read back
    as the same ids."""
    lines = []
    for name, part in parts_of(prepared).items():
        splits = {} if isinstance(part, SyntheticData) else part.manifest["splits"]
        facts = splits.get("validation", {})
        label, why = f"{name}: " if name else "", "whose text, tokenised again, gives other ids"
        if short := splits.get("train", {}).get("short"):
            lines.append(
                f"{label}{short['num_documents']:,} training documents of fewer than {short['below']:,} "
                f"tokens, {short['num_tokens']:,} tokens in all, are left out (data.min_document)"
            )
        if unknown := facts.get("unknown"):
            lines.append(
                f"{label}bits per byte is left out: {unknown:,} held-out documents have text that the "
                "tokenizer writes as its unknown token, which hides it"
            )
        if respelt := facts.get("respelt"):
            lines.append(
                f"{label}{respelt:,} held-out documents are not what their tokens decode to (the tokenizer "
                "changes case, white space or characters): bits per byte are too low"
            )
        if changed := facts.get("changed"):
            lines.append(f"{label}bits per byte is left out: there are {changed:,} held-out documents {why}")
        if left_out := facts.get("left_out"):
            lines.append(f"{label}{left_out:,} held-out documents {why}, are left out of the validation")
    return lines


def verify_shards(prepared: Prepared) -> None:
    """Check the shards' checksums, of a small data set only: opening shards has checked their sizes.

    Raises DataError naming a damaged file.
    """
    for part in parts_of(prepared).values():
        files = {} if isinstance(part, SyntheticData) else part.manifest["files"]
        if files and sum(facts["bytes"] for facts in files.values()) <= _VERIFIED_BYTES:
            open_prepared(part.folder, verify=True)


def held_out_documents(prepared: Prepared) -> bytes | None:
    """The held-out documents as JSONL, those of a mixture in turns, with their source; None if synthetic."""
    if not isinstance(prepared, MixedData):
        return prepared.heldout_path.read_bytes() if prepared.heldout_path else None
    files = [part.heldout_path.read_text(encoding="utf-8").splitlines() for part in prepared.parts.values()]
    lines = [
        json.dumps({**json.loads(line), "source": name}).encode() + b"\n"
        for turn in itertools.zip_longest(*files)
        for name, line in zip(prepared.parts, turn, strict=True)
        if line is not None
    ]
    return b"".join(lines)
