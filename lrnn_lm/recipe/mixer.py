"""A sequence mixer as a recipe says it, and which options belong to which type."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from .section import Section

_GATED_DELTA = ("num_heads", "head_dim", "expand_v", "conv_kernel", "allow_neg_eigval")
MIXER_OPTIONS: dict[str, tuple[str, ...]] = {  # as the classes in lrnn_lm.mixers have them
    "bd_lru": (
        "num_blocks", "block_size", "gate", "gate_std", "half_life", "short_conv", "output_gate",
        "norm_groups",
    ),
    "bd_matrix": (
        "num_heads", "head_dim", "value_dim", "block_size", "gate", "gate_std", "half_life", "short_conv",
        "output_gate", "head_norm",
    ),
    "h_lru": ("num_blocks", "order", "gate", "gate_std"),
    "attention": ("num_heads", "rope_theta", "qk_norm"),
    "lstm": ("width",),
    "mamba2": ("expand", "head_dim", "state_size", "n_groups", "conv_kernel", "chunk_size"),
    "deltanet": ("num_heads", "expand_k", "expand_v", "conv_kernel", "allow_neg_eigval"),
    "gated_deltanet": _GATED_DELTA,
    "gated_deltaproduct": (*_GATED_DELTA, "num_householder"),
    "gla": ("num_heads", "expand_k", "expand_v"),
}  # fmt: skip
DEFAULT_TYPE = "bd_lru"
MixerType = Literal[tuple(MIXER_OPTIONS)]
GateName = Literal["softmax", "sigmoid", "relu", "silu", "tanh", "identity", "none"]


class MixerSection(Section):
    """A sequence mixer. What is written out of it is the options of its type, and those given beside them
    for the other mixers of a pattern."""

    type: MixerType = DEFAULT_TYPE
    num_blocks: int | None = Field(
        None, ge=1, description="blocks (bd_lru) or channels (h_lru); none: width = hidden_size"
    )
    block_size: int = Field(4, ge=1, le=64, description="M of bd_lru and bd_matrix")
    order: int = Field(4, ge=1, le=64, description="M of h_lru: how many past states a step reads")
    gate: GateName = "softmax"
    gate_std: float | None = Field(
        None, gt=0, description="spread of the gates' logits at the start; none: as of any other matrix"
    )
    half_life: tuple[float, float] | None = Field(
        None,
        description="[shortest, longest] in tokens of the states at the start; none: equal gates in bd_lru, "
        "[2, 512] in bd_matrix",
    )
    short_conv: int | None = Field(
        None, ge=2, description="tokens that a convolution before bd_*'s projections reaches; none: no such"
    )
    output_gate: bool | None = Field(
        None, description="what is read out of the states times silu(W x); none: in bd_matrix only"
    )
    norm_groups: int | None = Field(
        None, ge=1, description="bd_lru: RMS norm of the states before the read-out, in so many groups"
    )
    num_heads: int = Field(8, ge=1, description="heads of attention, bd_matrix, the delta rules and gla")
    value_dim: int | None = Field(None, ge=1, description="columns of a head of bd_matrix; none: head_dim")
    head_norm: bool = Field(True, description="bd_matrix: RMS norm of each head's output")
    qk_norm: bool = Field(False, description="attention: RMS norm of each head's queries and keys")
    rope_theta: float = Field(10_000.0, gt=0, description="rotary base of attention")
    width: int | None = Field(None, ge=1, description="state width of lstm; none: hidden_size")
    expand: int = Field(2, ge=1, description="inner width of mamba2, over hidden_size")
    head_dim: int = Field(
        64,
        ge=1,
        description="head width of mamba2; key width of a head of gated_delta*, slots of bd_matrix's",
    )
    state_size: int = Field(128, ge=1, description="state of mamba2, numbers a channel")
    n_groups: int = Field(1, ge=1, description="groups of mamba2's heads that share input and output maps")
    conv_kernel: int = Field(4, ge=1, description="reach of the convolution of mamba2 and the delta rules")
    chunk_size: int = Field(256, ge=1, description="steps that mamba2's scan takes at once")
    expand_k: float = Field(1.0, gt=0, description="keys of deltanet and gla, over hidden_size")
    expand_v: float = Field(
        1.0, gt=0, description="values: of deltanet and gla over hidden_size, of gated_delta* over head_dim"
    )
    allow_neg_eigval: bool | None = Field(
        None, description="delta rules with eigenvalues down to -1; none: gated_deltaproduct only"
    )
    num_householder: int = Field(2, ge=1, description="updates a token in gated_deltaproduct")

    @model_serializer(mode="wrap")
    def _write(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        shown = {"type", *MIXER_OPTIONS[self.type], *self.model_fields_set}
        return {key: value for key, value in write(self).items() if key in shown}

    def filled(self, base: "MixerSection") -> "MixerSection":
        """An entry of a pattern with what it leaves out taken from `mixer`, as far as its type reads it.

        `model_fields_set` stays what the entry itself says.
        """
        kind = self.type if "type" in self.model_fields_set else base.type
        inherited = base.model_fields_set & {*MIXER_OPTIONS[kind]}
        values = {"type": kind}
        for name, field in MixerSection.model_fields.items():
            if name in self.model_fields_set:
                values[name] = getattr(self, name)
            elif name != "type":
                values[name] = getattr(base, name) if name in inherited else field.default
        return MixerSection.model_construct(_fields_set=set(self.model_fields_set), **values)

    def written(self) -> dict[str, Any]:
        """What was said of it, without what was filled in."""
        return self.model_dump(mode="json", include=set(self.model_fields_set))


def check_options(where: str, mixer: MixerSection, types: Iterable[str]) -> None:
    """Raise ValueError, naming its owners, for a written option that none of `types` reads."""
    types = list(dict.fromkeys(types))
    known = {option for kind in types for option in MIXER_OPTIONS[kind]}
    for option in sorted(mixer.model_fields_set - known - {"type"}):
        owners = [kind for kind, options in MIXER_OPTIONS.items() if option in options]
        raise ValueError(
            f"{where}.{option} is an option of {', '.join(owners)}, not of {' or '.join(types)}; take it "
            f"out, or change the type (known here: {', '.join(sorted(known))})"
        )
