"""The recipe's train section: the token budget, the size of a step, and how it runs on the devices."""

from typing import Literal

from pydantic import Field, field_validator

from ..files import user_path
from ..remote import check_here
from .quantities import Span, TokenCount
from .section import Section


class AverageSection(Section):
    """A moving average of the weights, kept beside them."""

    decay: float = Field(0.999, gt=0, lt=1, description="average = decay * average + (1 - decay) * weights")
    every: int = Field(1, ge=1, description="steps between updates")
    start: Span = Field(
        Span(amount=0, unit="steps"), description="when averaging begins: 10%, 2M (tokens) or 200 steps"
    )


class GuardSection(Section):
    """When a step is too far above the last ones to be trusted."""

    deviations: float = Field(
        6.0, gt=0, description="skip a step that is this many standard deviations above the mean"
    )
    window: int = Field(128, ge=2, description="number of last good steps for mean and deviation")


class RampSection(Section):
    """A batch that grows: steps of `start` tokens, then of twice as many, and so on up to tokens_per_step."""

    start: TokenCount = Field(
        ge=1, description="tokens per step at first; tokens_per_step is a multiple of it"
    )
    tokens: TokenCount = Field(ge=1, description="length of the ramp, an equal part for each size of step")


class ProfileSection(Section):
    """Steps that torch's profiler records."""

    at: int = Field(ge=1, description="the first step to record, counted from 1")
    steps: int = Field(3, ge=1, description="number of steps to record")


class TrainSection(Section):
    """The training budget, the step size, and how a step runs on the devices."""

    tokens: TokenCount = Field(
        10_000_000,
        ge=1,
        description="the budget: steps times tokens_per_step; a remainder below one step is not trained",
    )
    tokens_per_step: TokenCount = Field(
        524_288,
        ge=1,
        description="batch size in tokens, over all ranks; gradients are accumulated over micro-batches",
    )
    ramp: RampSection | None = Field(
        None, description="grow the batch at first, as in {start: 65536, tokens: 500M}; null: no"
    )
    micro_batch: int = Field(8, ge=1, description="rows per rank in one forward pass")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 if the device supports it, else fp32"
    )
    parallel: Literal["auto", "ddp", "fsdp2"] = Field(
        "auto", description="how ranks share the model; auto: what Accelerate's config file says, else ddp"
    )
    shard_size: int | None = Field(
        None,
        ge=2,
        description="number of ranks that share one copy of the model under FSDP2 (HSDP), as in 8, the GPUs "
        "of a node; null: all ranks",
    )
    segment: int | None = Field(
        None,
        ge=1,
        description="read a row in passes of this many tokens, with the gradient of the whole row "
        "(docs/long.md); null: in one pass",
    )
    sequence_parallel: int = Field(
        1, ge=1, description="number of ranks that share each row, a part each (docs/long.md)"
    )
    start_from_other: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability that a row begins with the final state of another row instead of zeros",
    )
    compile: bool = Field(False, description="torch.compile each block")
    cuda_graphs: bool = Field(
        False,
        description="on one GPU, launch a micro-batch's pass as one CUDA graph: faster where Python limits "
        "the speed (docs/training.md)",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute each block in the backward pass: less memory, more time"
    )
    loss_chunk: int = Field(
        1024,
        ge=1,
        description="tokens whose logits are computed at once: fewer need less memory, more are faster",
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description="adds this times the mean of softmax's log^2 Z to the training loss; as in 1e-4",
    )
    residual_in_fp32: bool = Field(
        True,
        description="keep the residual stream in fp32 under bf16 autocast (under FSDP2 it is always bf16)",
    )
    profile: ProfileSection | None = Field(
        None, description="run torch's profiler, as in {at: 20, steps: 3}; null: no"
    )
    average: AverageSection | None = Field(
        None, description="keep a moving average of the weights, as in {decay: 0.999}; null: no"
    )
    guard: GuardSection | None = Field(
        None,
        description="skip steps whose loss or gradient norm is far above the last ones, as in "
        "{deviations: 6, window: 128}; null: only those that are not finite",
    )
    max_bad_steps: int = Field(10, ge=1, description="skipped steps in a row after which the run ends")
    timeout_minutes: float = Field(
        10, gt=0, le=1e6, description="time a rank waits for the others before the run ends with an error"
    )
    stall_minutes: float = Field(5, gt=0, le=1e6, description="a step that takes longer prints stack traces")
    log_every: int = Field(
        1,
        ge=1,
        description="steps between lines of metrics.jsonl; skipped and inspected steps always have one",
    )
    inspect_every: int | None = Field(
        100, ge=1, description="steps between measurements of each layer's state and gates; null: never"
    )
    runs_dir: str = Field("runs", description="folder of all runs; a run's own is runs_dir/name")

    @field_validator("runs_dir")
    @classmethod
    def _is_here(cls, path: str) -> str:
        here = check_here(path, "a run is locked and renamed there; checkpoint.copy_to copies it to a URL")
        return str(user_path(here))
