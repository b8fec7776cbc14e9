"""The recipe's optim section: the optimizer, its schedule, groups of parameters with their own rates."""

import ast
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from .quantities import Span
from .section import Section


class GroupSection(Section):
    """Parameters with a learning rate or weight decay of their own."""

    match: str = Field(min_length=1, description="pattern of parameter names, as in *gate_proj*")
    lr_scale: float = Field(1.0, ge=0, description="factor on the learning rate; 0 freezes")
    weight_decay: float | None = Field(
        None, ge=0, description="default: optim.weight_decay, where they have any"
    )


class OptimSection(Section):
    """The optimizer and its schedule."""

    name: str = Field(
        "adamw",
        description="a name in OPTIMIZERS of train/optim.py: adamw; muon (Muon for the layers' matrices, "
        "AdamW for the rest); adamw8bit (torchao; not under FSDP2)",
    )
    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="beta1 and beta2 of AdamW")
    eps: float = Field(1e-8, gt=0, description="epsilon of AdamW")
    weight_decay: float = Field(
        0.1, ge=0, description="of matrices and embeddings; norms, biases and recurrent matrices have none"
    )
    groups: list[GroupSection] = Field(
        default_factory=list,
        description="parameters with their own rate or decay; the first group that matches counts",
    )
    base_width: int | None = Field(
        None,
        ge=1,
        description="hidden_size at which lr and model.initializer_range were tuned; muP scales both to this "
        "recipe's width (AdamW, untied head)",
    )
    grad_clip: float | None = Field(1.0, gt=0, description="maximum global gradient norm; null: no clipping")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up; wsd: constant, then a linear decay"
    )
    warmup: Span = Field(
        Span(amount=0.1, unit="fraction"), description="length of the warm-up: 10%, 2M (tokens) or 200 steps"
    )
    decay: Span = Field(Span(amount=0.2, unit="fraction"), description="length of wsd's final decay")
    final_lr: float = Field(1e-5, ge=0, description="learning rate at the end of cosine and wsd")

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"each beta lies in [0, 1), not {list(betas)}")
        return betas

    def check_spans(self, total: int, step: int) -> None:
        """Raise ValueError unless warm-up and decay fit, one after the other, into `total` steps."""
        spans = {"warmup": self.warmup}
        if self.schedule == "wsd":
            spans["decay"] = self.decay
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
                f"optim.warmup {self.warmup} and optim.decay {self.decay} overlap: together they "
                f"take more than the {total} steps of the run; shorten one"
            )


def check_optimizer(name: str, known: Iterable[str] | None = None) -> None:
    """Raise ValueError, with the nearest name, for an `optim.name` that is not registered.

    known: the registry's names; None: read them from its source, where torch cannot be imported.
    """
    known = _registered() if known is None else list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        raise ValueError(f"optim.name: {name!r} is not known; {hint}")


def _registered() -> list[str]:
    """Keys that train/optim.py gives to OPTIMIZERS, in the table or in a line of their own."""
    source = (Path(__file__).parents[1] / "train" / "optim.py").read_text(encoding="utf-8")
    keys: list[ast.expr] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "OPTIMIZERS":
            keys += node.value.keys
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("OPTIMIZERS["):
            keys.append(node.targets[0].slice)
    return [ast.literal_eval(key) for key in keys]
