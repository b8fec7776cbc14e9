"""The models of the synthetic study, with equal parameters by the recurrence's or the SwiGLU's width."""

from dataclasses import replace
from typing import Any

import torch

from lrnn_lm import LRNNForCausalLM

from .replicas import Job

MODELS: dict[str, dict[str, Any]] = {
    **{f"bd_lru-m{m}": {"type": "bd_lru", "block_size": m} for m in (1, 2, 4, 5, 8)},
    **{f"h_lru-m{m}": {"type": "h_lru", "order": m} for m in (2, 4, 8)},
    "lstm": {"type": "lstm"},
    "attention": {"type": "attention", "num_heads": 4},
    "mamba2": {"type": "mamba2", "expand": 2, "head_dim": 32, "state_size": 16, "chunk_size": 32},
    "deltanet": {"type": "deltanet", "num_heads": 4, "allow_neg_eigval": False},
    "deltanet-negative": {"type": "deltanet", "num_heads": 4, "allow_neg_eigval": True},
    "gated_deltanet": {"type": "gated_deltanet", "num_heads": 2, "head_dim": 32, "allow_neg_eigval": True},
    "gated_deltaproduct": {"type": "gated_deltaproduct", "num_heads": 2, "head_dim": 32},
    "kda": {"type": "kda", "allow_neg_eigval": True},
    "gated_deltanet2": {"type": "gated_deltanet2", "allow_neg_eigval": True},
    "gla": {"type": "gla", "num_heads": 4},
    "hgrn2": {"type": "hgrn2"},
    "rwkv7": {"type": "rwkv7"},
    "mlstm": {"type": "mlstm"},
    "min_lstm": {"type": "bd_lru", "block_size": 1, "gate": "sigmoid"},
    "min_gru": {"type": "min_gru"},
    "rg_lru": {"type": "rg_lru"},
    "complex_lru": {"type": "complex_lru"},
    "slice-m5": {"type": "slice", "block_size": 5, "scaled": True},
    "fixed_point": {"type": "fixed_point"},
    "pd_ssm": {"type": "pd_ssm"},
    **{f"bd_gru-m{m}": {"type": "bd_gru", "block_size": m} for m in (1, 5)},
    "bd_slstm-m5": {"type": "bd_slstm", "block_size": 5},
    "m2rnn": {"type": "m2rnn"},
}
GATED = ("bd_lru", "h_lru")
# Whose kernels train in half precision only, or are made for it.
HALF = ("deltanet", "gated_deltanet", "gated_deltaproduct", "kda", "gated_deltanet2", "rwkv7")
FITTED = {  # else the SwiGLU
    "bd_lru": "num_blocks", "h_lru": "num_blocks", "complex_lru": "num_blocks", "slice": "num_blocks",
    "bd_gru": "num_blocks", "bd_slstm": "num_blocks", "pd_ssm": "num_blocks",
    "kda": "num_heads", "gated_deltanet2": "num_heads", "mlstm": "num_heads", "m2rnn": "num_heads",
    "lstm": "width", "min_gru": "width", "rg_lru": "width", "fixed_point": "width",
}  # fmt: skip


def contender(job: Job, model: str, **options: Any) -> Job:
    """`job` with a model of the table; `options` are for the models that have gates.

    Raises:
        ValueError: a model that is not in the table.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(MODELS)}")
    kind = MODELS[model]["type"]
    mixer = {**(options if kind in GATED else {}), **MODELS[model]}
    return replace(job, model=model, mixer=mixer, precision="bf16" if kind in HALF else "fp32")


def count(job: Job) -> int:
    """Parameters of a job's language model (an auto-encoder's head is the same for all); none are made."""
    with torch.device("meta"):
        model = LRNNForCausalLM(job.config())
    return sum(p.numel() for p in model.parameters())


def with_width(job: Job, key: str | None, width: int) -> Job:
    """`job` with another width of its mixer, by name, or of its SwiGLU."""
    return replace(job, mixer={**job.mixer, key: width}) if key else replace(job, intermediate=width)


def fitted(job: Job, parameters: int, key: str | None, step: int = 1) -> Job:
    """`job` with the width (`key` of its mixer, or its SwiGLU's), a multiple of `step`, that is nearest to
    `parameters`."""
    low, high = step, 2 * step
    while count(with_width(job, key, high)) < parameters and high < 2**16:
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // (2 * step) * step
        below = count(with_width(job, key, middle)) < parameters
        low, high = (middle, high) if below else (low, middle)
    made = [with_width(job, key, width) for width in (low, high)]
    return min(made, key=lambda one: abs(count(one) - parameters))


class Fitting:
    """Widths found once for each model: a task's vocabulary adds the same to all, so one task's serve all."""

    def __init__(self, reference: Job, step: int = 1) -> None:
        """reference: the job whose parameters the others are brought to; step: of which all widths but heads
        are multiples. Products of widths that are no multiple of 8 are slow, so where speed is measured it is
        16."""
        self.reference, self.step, self.parameters = reference, step, count(reference)
        self._found: dict[str, tuple[dict[str, Any], int]] = {}

    def __call__(self, job: Job) -> Job:
        """`job`, whose mixer may hold options that change no size, at the reference's parameters."""
        if job.model not in self._found:
            sized = replace(job, task=self.reference.task, stages=self.reference.stages,
                            options=self.reference.options)  # fmt: skip
            key = FITTED.get(job.mixer["type"])
            try:
                coarse = 1 if key == "num_heads" else self.step
                made = fitted(sized, self.parameters, key, coarse) if key else sized
                # A block is a coarse step, a channel a fine one.
                made = fitted(made, self.parameters, None, self.step)
            except ValueError:  # it cannot be built here, which its run will say
                return job
            self._found[job.model] = ({key: made.mixer[key]} if key else {}, made.intermediate)
        widths, intermediate = self._found[job.model]
        return replace(job, mixer={**job.mixer, **widths}, intermediate=intermediate)
