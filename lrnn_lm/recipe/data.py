"""The recipe's data section: one source or a mixture, its stages, and how text becomes rows."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ..remote import check_here, url_of
from .quantities import TokenCount
from .section import Section


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) else value


class SourceSection(Section):
    """Where the text comes from, or which synthetic task generates the rows."""

    type: Literal["python-docs", "text", "jsonl", "parquet", "hf", "megatron", "tokens", "synthetic"] = (
        "python-docs"
    )
    path: str | None = Field(
        None,
        description="a file, folder or glob; text, jsonl and parquet also a URL, as in s3://bucket/folder; "
        "hf: a dataset. Each file of type text is a document; a single one is cut into several",
    )
    name: str | None = Field(None, description="hf: configuration of the dataset")
    split: str = Field("train", description="hf: split of the dataset")
    text_field: str = Field("text", description="jsonl, parquet, hf: field of the text")
    separator: Annotated[str | None, BeforeValidator(_as_text)] = Field(
        None, description="megatron, tokens: id or token that ends a document; default: the end-of-text token"
    )
    dtype: Literal["uint16", "int32", "uint32", "int64"] | None = Field(
        None, description="tokens: type of the ids in .bin files; default: detected"
    )
    limit: int | None = Field(None, ge=1, lt=2**63, description="read at most this many documents")
    max_epochs: float | None = Field(
        None, gt=0, description="maximum number of epochs that the run may read; default: no limit"
    )
    task: str | None = Field(None, description="synthetic: s5, parity, in_context_recall, ..")
    length: int | None = Field(None, ge=2, description="synthetic: tokens per row; default: sequence_length")
    examples: TokenCount | None = Field(
        None,
        ge=1,
        description="synthetic: number of training rows; default: the published number, or unlimited",
    )
    validation_examples: TokenCount = Field(1280, ge=1, description="synthetic: number of held-out rows")
    options: dict[str, int | float] = Field(
        default_factory=dict, description="synthetic: options of the task, as in {vocab_size: 32}"
    )
    _dataset_key: ClassVar[str] = "name"  # the key of hf's configuration

    @model_validator(mode="after")
    def _check(self) -> "SourceSection":
        synthetic = self.type == "synthetic"
        if synthetic and not self.task:
            raise ValueError("source type 'synthetic' needs a task, as in task: s5")
        if not synthetic and (self.task or self.length or self.examples or self.options):
            raise ValueError(
                f"task, length, examples and options belong to type 'synthetic', not {self.type!r}"
            )
        if synthetic and self.max_epochs:
            raise ValueError("a synthetic task has no max_epochs; give the number of its rows as examples")
        if not synthetic and self.type != "python-docs" and not self.path:
            raise ValueError(f"source type {self.type!r} needs a path")
        if url_of(self.path) and self.type not in ("text", "jsonl", "parquet"):
            raise ValueError(
                f"source type {self.type!r} reads no URL: give text, jsonl or parquet files, or copy "
                f"{self.path} to a disk here"
            )
        for key in FILE_KEYS - SOURCE_KEYS[self.type]:
            own = self._dataset_key if key == "name" else key
            if getattr(self, own) != type(self).model_fields[own].default:
                types = [kind for kind, keys in SOURCE_KEYS.items() if key in keys]
                raise ValueError(
                    f"source type {self.type!r} does not read {own}={getattr(self, own)!r}; "
                    f"set type to one of {', '.join(types)}"
                )
        return self


FILE_KEYS = {"path", "name", "split", "text_field", "separator", "dtype"}
SOURCE_KEYS: dict[str, set[str]] = {  # those of them that each type reads
    "python-docs": set(),
    "text": {"path"},
    "jsonl": {"path", "text_field"},
    "parquet": {"path", "text_field"},
    "hf": {"path", "name", "split", "text_field"},
    "megatron": {"path", "separator"},
    "tokens": {"path", "separator", "dtype"},
    "synthetic": set(),
}
TOKEN_FILES = ("megatron", "tokens")  # types whose text is tokenised already


class MixtureSource(SourceSection):
    """A source of a mixture. hf's configuration is `config` here, as `name` is the source's own."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-]+$",
        description="name in metrics and stages; default: from the path, or the type",
    )
    config: str | None = Field(None, description="hf: configuration of the dataset")
    weight: float = Field(1.0, ge=0, description="its share of the rows is weight / sum of all weights")
    validation_source: SourceSection | None = Field(
        None, description="its held-out text, with the keys of `source`; default: a fraction of the source"
    )
    validation_fraction: float | None = Field(
        None, gt=0, lt=1, description="default: data.validation_fraction"
    )
    _dataset_key: ClassVar[str] = "config"

    @model_validator(mode="before")
    @classmethod
    def _fill_name(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("name"):
            return data
        stem = Path(str(data.get("path") or "")).name.split(".")[0]
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")
        return {**data, "name": name or data.get("type", "python-docs")}

    @field_validator("type")
    @classmethod
    def _is_text(cls, kind: str) -> str:
        if kind == "synthetic":
            raise ValueError("a synthetic task cannot be part of a mixture; give it as data.source")
        return kind

    @property
    def place(self) -> tuple[str | None, ...]:
        """What two sources must not have in common."""
        is_files = self.path is not None and self.type != "hf"
        path = self.path
        if is_files and url_of(path) is None:
            path = os.path.realpath(os.path.expanduser(os.path.expandvars(path)))
        return (path or self.type, self.config, self.split if self.type == "hf" else None)


class StageSection(Section):
    """A stage of a mixture: a number of tokens, read with other weights."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # a source may be named 2024

    tokens: TokenCount | None = Field(
        None, ge=1, description="length of the stage; the last one may leave it out and takes the rest"
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="weights by source, as in {web: 0.6, code: 0.4}; other sources are not read. Default: "
        "the sources' own weights",
    )


class CurriculumStage(Section):
    """A stage in which the loss covers only the first tokens of each row."""

    length: int = Field(ge=1, description="number of tokens of a row that have targets")
    steps: int = Field(ge=1, description="number of optimizer steps")


class DataSection(Section):
    """From text to token shards, and from shards to rows of sequence_length tokens (and their targets)."""

    source: SourceSection = Field(default_factory=SourceSection)
    sources: list[MixtureSource] = Field(
        default_factory=list,
        description="a mixture, in place of `source`; each has the keys of `source` too; see docs/data.md",
    )
    stages: list[StageSection] = Field(
        default_factory=list,
        description="weights of the sources that change after a number of tokens; see docs/data.md",
    )
    validation_source: SourceSection | None = Field(
        None, description="held-out text, with the keys of `source`; default: a fraction of `source`"
    )
    validation_fraction: float = Field(
        0.02, gt=0, lt=1, description="fraction of documents held out, chosen by hash"
    )
    tokenizer: str = Field(
        "tokenizers/bpe-4k.yaml", description="a folder, a hub name, or a recipe for SentencePiece (YAML)"
    )
    sequence_length: int = Field(2048, ge=2, description="tokens per row")
    rows_in_order: int | None = Field(
        None,
        ge=2,
        description="number of rows that follow one another in the text and are read so, one per step, each "
        "from the last state of the row before; null: shuffled rows, each from an empty state",
    )
    min_document: int | None = Field(
        None, ge=2, description="leave out training documents of fewer tokens; held-out text stays whole"
    )
    cache_dir: str = Field(
        "cache", description="folder of prepared tokenizers and shards, shared by runs with equal settings"
    )
    shard_tokens: TokenCount = Field(100_000_000, ge=1, description="tokens per shard file")
    num_proc: int | None = Field(None, ge=1, description="tokenising processes; default: one per core")
    num_workers: int = Field(0, ge=0, description="data loader processes per rank")
    curriculum: list[CurriculumStage] = Field(
        default_factory=list,
        description="loss on short prefixes of rows first, as in [{length: 4, steps: 800}]; then whole rows",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_length(cls, data: Any) -> Any:
        """source.length of a synthetic task also sets sequence_length, so it need not be given twice."""
        source = data.get("source") if isinstance(data, dict) else None
        if isinstance(source, dict) and source.get("type") == "synthetic" and source.get("length"):
            return {"sequence_length": source["length"], **data}
        return data

    @field_validator("tokenizer", "cache_dir")
    @classmethod
    def _is_here(cls, path: str) -> str:
        return check_here(path, "tokenizers and prepared text are mapped into memory from a disk")

    @field_validator("sources")
    @classmethod
    def _in_order_of_name(cls, sources: list[MixtureSource]) -> list[MixtureSource]:
        """So that batches do not depend on the order in which the recipe lists them."""
        return sorted(sources, key=lambda source: source.name)

    @model_validator(mode="after")
    def _check(self) -> "DataSection":
        if self.source.length not in (None, self.sequence_length):
            raise ValueError(
                f"sequence_length {self.sequence_length} is not the task's length {self.source.length}; "
                "give one of them"
            )
        longest = max((stage.length for stage in self.curriculum), default=0)
        if longest > self.sequence_length:
            raise ValueError(
                f"curriculum has rows of {longest} tokens, sequence_length is {self.sequence_length}"
            )
        if self.min_document is not None and self.source.type == "synthetic":
            raise ValueError("min_document: a synthetic task has no documents; leave it out")
        self._check_mixture()
        return self

    def _check_mixture(self) -> None:
        if self.sources and (self.source != SourceSection() or self.validation_source):
            raise ValueError(
                "give either sources or source; held-out text is validation_source of each of the sources"
            )
        if self.stages and not self.sources:
            raise ValueError("stages need sources: a list of at least one source with a name")
        names = [source.name for source in self.sources]
        for k, source in enumerate(self.sources):
            if source.name in names[:k]:
                raise ValueError(f"sources: {source.name!r} is listed twice; give each source its own name")
            if twin := next((s for s in self.sources[:k] if s.place == source.place), None):
                what = source.path or source.type
                raise ValueError(
                    f"sources: {twin.name!r} and {source.name!r} both read {what}; list it once, with the "
                    "sum of their weights"
                )
        for k, stage in enumerate(self.stages):
            for name in stage.weights:
                if name not in names:
                    near = difflib.get_close_matches(name, names, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"
                    raise ValueError(f"stages.{k}: no source is named {name!r}; {hint}")
            if stage.tokens is None and k + 1 < len(self.stages):
                raise ValueError(f"stages.{k}: only the last stage may leave out its tokens")
        for k, weights in enumerate(self.stage_weights if self.sources else []):
            if not sum(weights):
                where = f"stages.{k}: the weights of all" if self.stages else "sources: the weights of all"
                raise ValueError(f"{where} sources are 0; give at least one a weight above 0")
        pairs = [(s, s.validation_source) for s in self.sources] or [(self.source, self.validation_source)]
        for source, held_out in pairs:
            if held_out and held_out.type in TOKEN_FILES and source.type not in TOKEN_FILES:
                raise ValueError(
                    f"validation_source of type {held_out.type!r} needs a source of token files, "
                    f"not {source.type!r}"
                )
        kinds = {source.type for source in self.sources or [self.source]}
        if kinds & set(TOKEN_FILES) and self.tokenizer.endswith((".yaml", ".yml")):
            raise ValueError(
                f"tokenizer {self.tokenizer} would be trained, and {' and '.join(kinds & set(TOKEN_FILES))} "
                "files hold the ids of a tokenizer that exists; give its folder or hub name"
            )

    def stages_until(self, tokens: int) -> list[tuple[int, dict[str, float]]]:
        """Where stages end and their weights, up to a number of tokens: what decides the rows until there."""
        found, end = [], 0
        names = [source.name for source in self.sources] or [""]
        for stage, weights in zip(self.stages or [StageSection()], self.stage_weights, strict=True):
            begin, end = end, tokens if stage.tokens is None else end + stage.tokens
            if begin < tokens:
                found.append((min(end, tokens), {n: w for n, w in zip(names, weights, strict=True) if w}))
        return found

    @property
    def stage_weights(self) -> list[tuple[float, ...]]:
        """Weights of each stage in the order of `sources`; one stage if none is given."""
        own = {source.name: source.weight for source in self.sources} or {"": 1.0}
        given = [stage.weights or own for stage in self.stages] or [own]
        return [tuple(weights.get(name, 0.0) for name in own) for weights in given]
