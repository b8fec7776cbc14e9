"""What a recipe may say: pure data, checked strictly. `load.py` reads YAML into these classes.

Every section forbids keys that it does not know; every field has a default except the few that no default
could serve. Relations between fields are checked here too, so that a recipe that validates can be built.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_serializer, field_validator, model_validator

from .launch import LaunchSection
from .mixer import MixerSection, check_options
from .quantities import Every, Span, TokenCount
from .section import Section


class ModelSection(Section):
    """The model, in Hugging Face's names. `layer_pattern` (mixers, repeated over depth) makes hybrids."""

    hidden_size: int = Field(768, ge=1)
    num_hidden_layers: int = Field(12, ge=1)
    intermediate_size: int = Field(2048, ge=1)
    vocab_size: int | None = Field(None, ge=2, description="none: the tokenizer's")
    tie_word_embeddings: bool = False
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.02, gt=0)
    mixer: MixerSection = Field(default_factory=MixerSection)
    layer_pattern: list[MixerSection] | None = Field(None, min_length=1)
    parameters: int | None = Field(
        None, ge=1, description="the expected parameter count; checked where it is given"
    )

    @field_validator("layer_pattern", mode="before")
    @classmethod
    def _name_alone(cls, entries: Any) -> Any:
        """An entry of layer_pattern is a mixer's name or its keys."""
        if not isinstance(entries, list):
            return entries
        return [{"type": entry} if isinstance(entry, str) else entry for entry in entries]

    @field_serializer("layer_pattern", when_used="json")
    def _as_written(self, entries: list[MixerSection] | None) -> list[dict[str, Any]] | None:
        """Without what `mixer` lends them: a stored recipe takes overrides of `mixer` as the first did."""
        return None if entries is None else [entry.written() for entry in entries]

    @model_validator(mode="after")
    def _fill_pattern(self) -> "ModelSection":
        """What an entry leaves out comes from `mixer`, which may hold options for any of them."""
        pattern = self.layer_pattern or []
        pattern[:] = [entry.filled(self.mixer) for entry in pattern]
        check_options("mixer", self.mixer, [self.mixer.type, *(entry.type for entry in pattern)])
        for number, entry in enumerate(pattern):
            check_options(f"layer_pattern.{number}", entry, [entry.type])
        return self

    @model_validator(mode="after")
    def _check(self) -> "ModelSection":
        """The widths that the mixers split, which their classes check too: a person should hear of a mistake
        before a job has waited in a queue, and where torch is not imported."""
        for mixer in self.layer_pattern or [self.mixer]:
            if mixer.type == "attention" and self.hidden_size % (2 * mixer.num_heads):
                raise ValueError(
                    f"hidden_size {self.hidden_size} does not split into "
                    f"{mixer.num_heads} heads of even width"
                )
            if mixer.type == "mamba2" and mixer.expand * self.hidden_size % mixer.head_dim:
                raise ValueError(
                    f"mamba2's width {mixer.expand} x {self.hidden_size} does not split into "
                    f"heads of width {mixer.head_dim}"
                )
            if mixer.type == "bd_matrix" and mixer.head_dim % mixer.block_size:
                raise ValueError(
                    f"bd_matrix: head_dim {mixer.head_dim} does not split into blocks of {mixer.block_size}"
                )
            for key, base, parts in _expansions(mixer, self.hidden_size):
                if (width := base * getattr(mixer, key)) % parts:
                    raise ValueError(
                        f"{mixer.type}: {key} {getattr(mixer, key):g} x {base} = {width:g} "
                        f"does not split into {parts} heads"
                    )
        return self


def _expansions(mixer: MixerSection, hidden_size: int) -> list[tuple[str, int, int]]:
    """Fractional expansions of a mixer: the key, the width that it multiplies, what it then splits into."""
    if mixer.type in ("deltanet", "gla"):
        return [(key, hidden_size, mixer.num_heads) for key in ("expand_k", "expand_v")]
    if mixer.type in ("gated_deltanet", "gated_deltaproduct"):
        return [("expand_v", mixer.head_dim, 1)]
    return []


class SourceSection(Section):
    """Where text comes from, or which synthetic task makes the rows."""

    type: Literal["python-docs", "text", "jsonl", "parquet", "hf", "synthetic"] = "python-docs"
    path: str | None = Field(
        None,
        description="a file, a folder or a glob (text, jsonl, parquet), or a dataset (hf); a text file is a "
        "document, one alone is cut into many",
    )
    name: str | None = Field(None, description="configuration of an hf dataset")
    split: str = Field("train", description="split of an hf dataset")
    text_field: str = "text"
    limit: int | None = Field(None, ge=1, description="read at most this many documents")
    task: str | None = Field(None, description="synthetic: s5, parity, in_context_recall, ..")
    length: int | None = Field(None, ge=2, description="synthetic: T; none: data.sequence_length")
    examples: TokenCount | None = Field(
        None, ge=1, description="synthetic: rows to train on; none: as published, or without end"
    )
    validation_examples: TokenCount = Field(1280, ge=1, description="synthetic: held-out rows")
    options: dict[str, int | float] = Field(
        default_factory=dict, description="synthetic: what the task lets vary, as in {vocab_size: 32}"
    )

    @model_validator(mode="after")
    def _check(self) -> "SourceSection":
        synthetic = self.type == "synthetic"
        if synthetic and not self.task:
            raise ValueError("source type 'synthetic' needs a task, as in task: s5")
        if not synthetic and (self.task or self.length or self.examples or self.options):
            raise ValueError(
                f"task, length, examples and options belong to type 'synthetic', not {self.type!r}"
            )
        if not synthetic and self.type != "python-docs" and not self.path:
            raise ValueError(f"source type {self.type!r} needs a path")
        return self


class CurriculumStage(Section):
    """Steps in which only the beginning of each row is learnt from."""

    length: int = Field(ge=1, description="tokens of a row that have targets")
    steps: int = Field(ge=1)


class DataSection(Section):
    """Text to token shards, and shards to rows of sequence_length + 1 tokens."""

    source: SourceSection = Field(default_factory=SourceSection)
    validation_source: SourceSection | None = Field(
        None, description="held-out text; none: a share of `source`"
    )
    validation_fraction: float = Field(
        0.02, gt=0, lt=1, description="share of `source`'s documents held out, by hash"
    )
    tokenizer: str = Field(
        "tokenizers/bpe-4k.yaml", description="a folder, a hub name or a SentencePiece recipe"
    )
    sequence_length: int = Field(2048, ge=2)
    cache_dir: str = Field(
        "cache", description="where tokenizers and shards are kept, named by what made them"
    )
    shard_tokens: TokenCount = Field(100_000_000, ge=1)
    num_proc: int | None = Field(None, ge=1, description="tokenising processes; none: one a core")
    num_workers: int = Field(0, ge=0, description="loader processes a rank")
    curriculum: list[CurriculumStage] = Field(
        default_factory=list,
        description="shorter rows first, as in [{length: 4, steps: 800}]; after these steps, whole rows",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_length(cls, data: Any) -> Any:
        """A synthetic row's length may be said once, at the task; rows of T tokens are what is trained on."""
        source = data.get("source") if isinstance(data, dict) else None
        if isinstance(source, dict) and source.get("type") == "synthetic" and source.get("length"):
            return {"sequence_length": source["length"], **data}
        return data

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
        return self


class OptimSection(Section):
    """The optimizer and its schedule."""

    name: str = Field(
        "adamw",
        description="muon: Muon for the layers' matrices, AdamW for the rest; not under FSDP2. A name in "
        "OPTIMIZERS of train/optim.py: the trainer looks it up before it prepares or writes anything",
    )
    lr: float = Field(3e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(
        0.1, ge=0, description="matrices only: none on norms, biases and embeddings' scales"
    )
    grad_clip: float | None = Field(1.0, gt=0, description="largest global gradient norm; null: no clipping")
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Span = Field(Span(amount=0.1, unit="fraction"), description="10%, 2M (tokens) or 200 steps")
    decay: Span = Field(Span(amount=0.2, unit="fraction"), description="length of the final decay of wsd")
    final_lr: float = Field(1e-5, ge=0)

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"each beta lies in [0, 1), not {list(betas)}")
        return betas


class TrainSection(Section):
    """The budget and how a step is cut into micro-batches."""

    tokens: TokenCount = Field(10_000_000, ge=1)
    tokens_per_step: TokenCount = Field(524_288, ge=1)
    micro_batch: int = Field(8, ge=1, description="rows a rank takes through the model at once")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where the device has it, else fp32"
    )
    parallel: Literal["auto", "ddp", "fsdp2"] = Field(
        "auto", description="how ranks share the model; auto: as Accelerate's config file says, else ddp"
    )
    compile: bool = False
    activation_checkpointing: bool = False
    loss_chunk: int = Field(1024, ge=1, description="tokens whose logits exist at once in the loss")
    residual_in_fp32: bool = Field(
        True,
        description="the residual stream in fp32 beside bf16 products (FSDP2's is in bf16 anyway)",
    )
    max_bad_steps: int = Field(10, ge=1, description="non-finite steps in a row after which the run ends")
    timeout_minutes: float = Field(
        10, gt=0, description="how long a rank waits for the others before the run ends"
    )
    stall_minutes: float = Field(5, gt=0, description="a step that takes longer has its stacks printed")
    log_every: int = Field(1, ge=1, description="steps between lines of metrics.jsonl")
    inspect_every: int | None = Field(
        100, ge=1, description="steps between looks at each layer's state and gates; null: never"
    )
    runs_dir: str = Field("runs", description="the run lives in runs_dir/name")


class CheckpointSection(Section):
    """When to save, and how much to keep."""

    every: Every = Every(amount=1000, unit="steps")
    keep_last: int = Field(2, ge=1)
    keep_best: bool = Field(
        True, description="keep the one of lowest validation loss too, among those validated at their step"
    )
    background: bool = Field(True, description="write while training goes on")


class EvalSection(Section):
    """What is measured during and after training."""

    every: Every = Every(amount=500, unit="steps")
    tokens: TokenCount = Field(500_000, ge=1, description="validation tokens read each time")
    tasks: list[str] = Field(default_factory=list, description="lm-eval tasks scored at the end")
    limit: int | None = Field(None, ge=1, description="documents a task")


class TrackingSection(Section):
    """metrics.jsonl is always written; these come beside it."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    project: str = "lrnn-lm"


class Recipe(Section):
    """One run, whole."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # `name=12` is a name

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)  # a folder's, with room beside
    seed: int = Field(0, ge=0, lt=2**63)
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    train: TrainSection = Field(default_factory=TrainSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    launch: LaunchSection = Field(default_factory=LaunchSection)

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        row = self.data.sequence_length
        if extra := self.train.tokens_per_step % row:
            near = max(row, self.train.tokens_per_step - extra)
            raise ValueError(
                f"train.tokens_per_step {self.train.tokens_per_step} is not a multiple of "
                f"data.sequence_length {row}; the nearest below is {near}"
            )
        if self.train.tokens < self.train.tokens_per_step:
            raise ValueError(
                f"train.tokens {self.train.tokens} is less than one step "
                f"(train.tokens_per_step {self.train.tokens_per_step})"
            )
        if (short := sum(stage.steps for stage in self.data.curriculum)) >= self.total_steps:
            raise ValueError(
                f"data.curriculum takes {short} steps and train.tokens pays for {self.total_steps}: no whole "
                "row would be learnt from; shorten it, or pass data.curriculum=[]"
            )
        if self.optim.final_lr > self.optim.lr:
            raise ValueError(f"optim.final_lr {self.optim.final_lr} is above optim.lr {self.optim.lr}")
        self._check_schedule()
        return self

    def _check_schedule(self) -> None:
        """Warm-up and decay fit in the run, one after the other."""
        total, step = self.total_steps, self.train.tokens_per_step
        spans = {"warmup": self.optim.warmup}
        if self.optim.schedule == "wsd":
            spans["decay"] = self.optim.decay
        for key, span in spans.items():
            if span.unit == "tokens" and 0 < span.amount < step:
                raise ValueError(
                    f"optim.{key} {span} is a number of tokens, less than one step of {step}; write "
                    f"'{span} steps' or a share such as 10%"
                )
            if span.steps(total, step) > total:
                raise ValueError(
                    f"optim.{key} takes {span.steps(total, step)} steps and train.tokens pays for {total}; "
                    f"shorten it, as in optim.{key}=10%, or raise train.tokens"
                )
        if sum(span.share(total, step) for span in spans.values()) > 1 + 1e-9:
            raise ValueError(
                f"optim.warmup {self.optim.warmup} and optim.decay {self.optim.decay} overlap: together they "
                f"take more than the {total} steps of the run; shorten one"
            )

    @property
    def rows_per_step(self) -> int:
        """Rows of sequence_length tokens in one optimiser step, over all ranks."""
        return self.train.tokens_per_step // self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimiser steps that the token budget pays for (a remainder of less than a step is not trained)."""
        return self.train.tokens // self.train.tokens_per_step
