"""The recipe's schema: every key with its type, default and meaning. `load.py` reads YAML into these classes.

Unknown keys are errors. Almost every key has a default. Relations between keys are checked here too, so a
recipe that validates can be built.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_serializer, field_validator, model_validator

from ..files import user_path
from ..remote import url_of
from .data import DataSection
from .launch import LaunchSection
from .mixer import MixerSection, check_options
from .optim import OptimSection
from .quantities import Every, TokenCount, format_count
from .section import Section
from .train import RampSection, TrainSection


class ModelSection(Section):
    """The model, in Hugging Face's names. Hybrids: `layer_pattern`, mixers repeated over the depth."""

    # Below sizes whose product torch could not count in 64 bits.
    hidden_size: int = Field(768, ge=1, lt=2**24, description="width of the residual stream")
    num_hidden_layers: int = Field(12, ge=1, lt=2**16)
    intermediate_size: int = Field(2048, ge=1, lt=2**24, description="width of the SwiGLU")
    vocab_size: int | None = Field(
        None, ge=2, lt=2**31, description="a tokenizer that is trained gets this size; null: the tokenizer's"
    )
    tie_word_embeddings: bool = Field(False, description="one matrix for embedding and output head")
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    mixer: MixerSection = Field(default_factory=MixerSection)
    layer_pattern: list[MixerSection] | None = Field(None, min_length=1)
    repeat: int = Field(
        1, ge=1, lt=2**16, description="number of times all layers are applied, with the same weights"
    )
    learn_initial_state: bool = Field(
        False, description="recurrent layers begin each document with a learnt state instead of zeros"
    )
    init_from: str | None = Field(
        None,
        description="weights to start a new run from: a checkpoint, an exported folder, or a hub name; "
        "sizes, mixers and tokenizer must be the same",
    )
    parameters: int | None = Field(
        None, ge=1, description="expected number of parameters; any other number is an error"
    )

    @field_validator("layer_pattern", mode="before")
    @classmethod
    def _name_alone(cls, entries: Any) -> Any:
        """An entry of layer_pattern may be a type alone, as in `bd_lru`."""
        if not isinstance(entries, list):
            return entries
        return [{"type": entry} if isinstance(entry, str) else entry for entry in entries]

    @field_serializer("layer_pattern", when_used="json")
    def _as_written(self, entries: list[MixerSection] | None) -> list[dict[str, Any]] | None:
        """Store entries without options taken from `mixer`, so that overrides of `mixer` still reach them."""
        return None if entries is None else [entry.written(self.mixer) for entry in entries]

    @model_validator(mode="after")
    def _fill_pattern(self) -> "ModelSection":
        """An entry takes the options that it leaves out from `mixer`, as far as its type has them."""
        pattern = self.layer_pattern or []
        pattern[:] = [entry.filled(self.mixer) for entry in pattern]
        check_options("mixer", self.mixer, [self.mixer.type, *(entry.type for entry in pattern)])
        for number, entry in enumerate(pattern):
            check_options(f"layer_pattern.{number}", entry, [entry.type])
        return self

    @model_validator(mode="after")
    def _check(self) -> "ModelSection":
        """Widths split into heads and blocks. The mixer classes check this too, but they need torch, and a
        user should learn of a mistake before a job has waited in a queue."""
        if len(self.windows) > 1:
            windows = sorted(self.windows)
            raise ValueError(f"layer_pattern has windows of {windows} tokens; a model has one size")
        for mixer in self.layer_pattern or [self.mixer]:
            for what, width, part, parts in _splits(mixer, self.hidden_size):
                if width % part:
                    raise ValueError(f"{mixer.type}: {what} does not split into {parts}")
        return self

    @property
    def windows(self) -> set[int]:
        """Sizes of the attention layers' windows, in tokens."""
        mixers = self.layer_pattern or [self.mixer]
        return {m.window for m in mixers if m.type == "attention" and m.window is not None}


def _splits(m: MixerSection, width: int) -> list[tuple[str, float, int, str]]:
    """(what, its size, what divides that, in words) for all that a mixer of this width takes apart."""
    match m.type:
        case "attention":
            heads, shared = m.num_heads, m.num_kv_heads or 1
            return [
                (f"hidden_size {width}", width, 2 * heads, f"{heads} heads of even width"),
                (f"num_heads {heads}", heads, shared, f"num_kv_heads {shared} groups"),
            ]
        case "mamba2":
            inner = m.expand * width
            return [(f"width {m.expand} x {width}", inner, m.head_dim, f"heads of width {m.head_dim}")]
        case "bd_matrix":
            return [(f"head_dim {m.head_dim}", m.head_dim, m.block_size, f"blocks of {m.block_size}")]
        case "deltanet" | "gla":
            both, heads = {"expand_k": m.expand_k, "expand_v": m.expand_v}, m.num_heads
            return [(f"{k} {x:g} x {width}", x * width, heads, f"{heads} heads") for k, x in both.items()]
        case "hgrn2" | "rwkv7":
            return [(f"hidden_size {width}", width, m.head_dim, f"heads of width {m.head_dim}")]
        case "gated_deltanet" | "gated_deltaproduct" | "kda" | "gated_deltanet2":
            return [(f"expand_v {m.expand_v:g} x {m.head_dim}", m.expand_v * m.head_dim, 1, "whole columns")]
    return []


class CheckpointSection(Section):
    """When to save a checkpoint, and which checkpoints to keep."""

    every: Every = Field(Every(amount=1000, unit="steps"), description="time between checkpoints")
    keep_last: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    keep_best: bool = Field(
        True, description="also keep the checkpoint with the lowest validation loss, if validated at its step"
    )
    background: bool = Field(True, description="write in the background while training continues")
    copy_to: str | None = Field(
        None,
        description="keep a copy of the run there, as in s3://bucket/runs or a folder on another disk; a "
        "machine without the run folder resumes from it",
    )

    @field_validator("copy_to")
    @classmethod
    def _lasts(cls, place: str | None) -> str | None:
        if place is not None and place.startswith("memory:"):
            raise ValueError(f"{place} is the memory of one process: give a place that outlives it")
        return place if place is None or url_of(place) else str(user_path(place))


class DuringSection(Section):
    """lm-eval tasks scored on the live model while it trains."""

    tasks: list[str] = Field(min_length=1, description="names of the tasks")
    every: Every = Field(Every(amount=1000, unit="steps"), description="time between scorings")
    limit: int | None = Field(200, ge=1, description="maximum number of documents per task; null: all")


class EvalSection(Section):
    """Validation and scores during training, and lm-eval tasks at the end."""

    every: Every = Field(Every(amount=500, unit="steps"), description="time between validations")
    tokens: TokenCount = Field(500_000, ge=1, description="tokens per validation")
    tasks: list[str] = Field(default_factory=list, description="lm-eval tasks scored at the end of training")
    limit: int | None = Field(None, ge=1, description="maximum number of documents per task; null: all")
    during: DuringSection | None = Field(
        None,
        description="tasks scored during training, as in {tasks: [heldout_cloze], every: 1000 steps}",
    )


class TrackingSection(Section):
    """Experiment trackers, in addition to metrics.jsonl, which is always written."""

    trackers: list[
        Literal[
            "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
        ]  # Accelerate's
    ] = Field(default_factory=list)  # fmt: skip
    project: str = Field("lrnn-lm", description="name of the project in the trackers")


class Recipe(Section):
    """The whole recipe of one run."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # `name=12` is a name

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,  # a folder's name, with room for suffixes
        description="name of the run, and of its folder; lrnn train resumes a run of that name",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of initial weights, order of the data, synthetic rows")
    license: str = Field(
        "unknown", min_length=1, description="licence named in the model card, as in apache-2.0"
    )
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
        if (window := max(self.model.windows, default=0)) > row:
            raise ValueError(
                f"model.mixer.window {window} is above data.sequence_length {row}, so no token is outside "
                "it; make it smaller, or null for attention to all tokens"
            )
        if self.train.ramp is not None:
            self._check_ramp(self.train.ramp)
        if (segment := self.train.segment) is not None and (segment > row or row % segment):
            what = "is above" if segment > row else "does not divide"
            raise ValueError(f"train.segment {segment} {what} data.sequence_length {row}")
        if row % ((k := self.train.sequence_parallel) * (segment or 1)):
            each = "" if segment is None else f" in segments of {segment} tokens"
            raise ValueError(f"train.sequence_parallel {k} does not divide data.sequence_length {row}{each}")
        if self.train.tokens < self.train.tokens_per_step:
            raise ValueError(
                f"train.tokens {self.train.tokens} is less than one step "
                f"(train.tokens_per_step {self.train.tokens_per_step}); raise it, or take smaller steps"
            )
        if (short := sum(stage.steps for stage in self.data.curriculum)) >= self.total_steps:
            raise ValueError(
                f"data.curriculum takes {short} steps and train.tokens pays for {self.total_steps}: no step "
                "would train on whole rows; shorten it, or pass data.curriculum=[]"
            )
        self._check_stages()
        if self.optim.schedule != "constant" and self.optim.final_lr > self.optim.lr:
            raise ValueError(f"optim.final_lr {self.optim.final_lr} is above optim.lr {self.optim.lr}")
        self.optim.check_spans(self.total_steps, self.train.tokens_per_step)
        if (profile := self.train.profile) and profile.at + profile.steps - 1 > self.total_steps:
            raise ValueError(
                f"train.profile ends after step {profile.at + profile.steps - 1} and train.tokens pays for "
                f"{self.total_steps}; profile earlier steps"
            )
        if (average := self.train.average) is not None:
            steps = average.start.steps(self.total_steps, self.train.tokens_per_step)
            if steps >= self.total_steps:
                raise ValueError(
                    f"train.average.start takes {steps} steps and train.tokens pays for {self.total_steps}; "
                    "shorten it"
                )
        return self

    def _check_stages(self) -> None:
        """Check that the stages of a mixture take exactly the budget."""
        stages = self.data.stages
        given = sum(stage.tokens or 0 for stage in stages)
        is_open = bool(stages) and stages[-1].tokens is None
        if stages and (given >= self.train.tokens if is_open else given != self.train.tokens):
            rest = "so the last one gets none" if is_open else "make them equal, or leave out the last one's"
            raise ValueError(
                f"data.stages take {format_count(given)} tokens and train.tokens is "
                f"{format_count(self.train.tokens)}; {rest}"
            )
        for k, stage in enumerate(stages):
            if stage.tokens is not None and stage.tokens < self.data.sequence_length:
                raise ValueError(
                    f"data.stages.{k} takes {stage.tokens} tokens, less than one row of "
                    f"{self.data.sequence_length}"
                )

    def _check_ramp(self, ramp: RampSection) -> None:
        full, row = self.train.tokens_per_step, self.data.sequence_length
        if full % ramp.start or ramp.start == full or ramp.start % row:
            raise ValueError(
                f"train.ramp.start {ramp.start} must divide train.tokens_per_step {full}, be less, and be a "
                f"multiple of data.sequence_length {row}"
            )
        if self._ramp_tokens + full > self.train.tokens:
            raise ValueError(
                f"train.ramp takes {self._ramp_tokens} tokens and train.tokens pays for {self.train.tokens}: "
                "no full step is left; shorten it"
            )
        if self.data.curriculum:
            raise ValueError("train.ramp and data.curriculum do not go together: leave one out")
        average = self.train.average
        spans = {"optim.warmup": self.optim.warmup, "train.average.start": average.start if average else None}
        for key, span in spans.items():
            if span is not None and span.unit == "tokens":
                raise ValueError(f"{key}: with train.ramp, write a number of steps or a share, not tokens")

    def check_ranks(self, ranks: int, parallel: str) -> None:
        """Raise ValueError if so many ranks cannot share a step's rows and the model, by ddp or fsdp2."""
        k, rows, size = self.train.sequence_parallel, self.rows_at(0), self.train.shard_size
        if ranks % k:
            raise ValueError(
                f"train.sequence_parallel {k} does not divide {ranks} rank{'s' if ranks > 1 else ''}: start "
                f"a multiple of {k} processes, or leave it out"
            )
        if size is not None and ranks > 1 and parallel == "ddp":
            raise ValueError(
                "train.shard_size is for FSDP2, DDP shards nothing: set train.parallel=fsdp2, or leave it out"
            )
        if size is not None and ranks > 1 and ranks % size:
            raise ValueError(
                f"train.shard_size {size} does not divide {ranks} ranks: set it to the number of GPUs of a "
                "node, or leave it out"
            )
        if rows % (groups := ranks // k):
            key = "tokens_per_step" if self.train.ramp is None else "ramp.start"
            among = f"{ranks} ranks" if k == 1 else f"{groups} groups of {k} ranks"
            raise ValueError(
                f"a step of {rows} rows does not split over {among}; make train.{key} a multiple of "
                f"{groups * self.data.sequence_length}"
            )

    @property
    def rows_per_step(self) -> int:
        """Rows per full optimizer step, over all ranks."""
        return self.train.tokens_per_step // self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the token budget; a remainder of less than one step is not trained."""
        left = self.train.tokens - self._ramp_tokens
        return sum(steps for _, steps in self._ramp) + left // self.train.tokens_per_step

    def notes(self) -> list[str]:
        """What a recipe says and its writer may not have meant: intervals in tokens that are below a step, a
        pattern that is longer than the model."""
        intervals = {"checkpoint.every": self.checkpoint.every, "eval.every": self.eval.every}
        if self.eval.during is not None:
            intervals["eval.during.every"] = self.eval.during.every
        step = self.rows_at(0) * self.data.sequence_length
        pattern, layers = self.model.layer_pattern or [], self.model.num_hidden_layers
        unused = ", ".join(entry.type for entry in pattern[layers:])
        return [
            f"model.layer_pattern has {len(pattern)} entries, the model {layers} layers: not used: {unused}"
        ] * bool(unused) + [
            f"{key} is {every} tokens, less than a step's {step:,}: it comes after every step; "
            f"write '{every} steps' if steps were meant"
            for key, every in intervals.items()
            if every.unit == "tokens" and every.amount < step
        ]

    @property
    def _ramp(self) -> list[tuple[int, int]]:
        """(tokens a step, number of steps) of each size below the full one, in order."""
        ramp = self.train.ramp
        if ramp is None:
            return []
        sizes = range(ramp.start, self.train.tokens_per_step, ramp.start)
        return [(size, max(1, round(ramp.tokens / len(sizes) / size))) for size in sizes]

    @property
    def _ramp_tokens(self) -> int:
        return sum(size * steps for size, steps in self._ramp)

    def tokens_at(self, step: int) -> int:
        """Tokens of the first `step` steps."""
        tokens = 0
        for size, steps in self._ramp:
            tokens += size * min(steps, step)
            step -= min(steps, step)
        return tokens + step * self.train.tokens_per_step

    def rows_at(self, step: int) -> int:
        """Rows of step `step`, counted from 0, over all ranks."""
        return (self.tokens_at(step + 1) - self.tokens_at(step)) // self.data.sequence_length
