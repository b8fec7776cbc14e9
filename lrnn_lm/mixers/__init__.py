"""Sequence mixers, one file each, and the registry that a config's `mixer.type` names."""

import difflib
from typing import Any

from .attention import Attention
from .base import Mixer, SequenceContext
from .bd_gru import BlockDiagonalGRU
from .bd_lru import BlockDiagonalLRU
from .bd_matrix import BlockDiagonalMatrixLRU
from .bd_slstm import BlockDiagonalSLSTM
from .complex_lru import ComplexLRU
from .fixed_point import FixedPoint
from .fla import (
    HGRN2,
    RWKV7,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaNet2,
    GatedDeltaProduct,
    GatedLinearAttention,
    KimiDeltaAttention,
)
from .h_lru import HigherOrderLRU
from .lstm import LSTM
from .m2rnn import MatrixRNN
from .mamba2 import Mamba2
from .min_gru import MinGRU
from .mlstm import MatrixLSTM
from .pd_ssm import PermutationDiagonal
from .rg_lru import RealGatedLRU
from .slice import SLiCE

MIXERS: dict[str, type[Mixer]] = {
    "bd_lru": BlockDiagonalLRU,
    "bd_matrix": BlockDiagonalMatrixLRU,
    "h_lru": HigherOrderLRU,
    "attention": Attention,
    "lstm": LSTM,
    "mamba2": Mamba2,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "gated_deltaproduct": GatedDeltaProduct,
    "gla": GatedLinearAttention,
    "kda": KimiDeltaAttention,
    "gated_deltanet2": GatedDeltaNet2,
    "hgrn2": HGRN2,
    "rwkv7": RWKV7,
    "mlstm": MatrixLSTM,
    "min_gru": MinGRU,
    "rg_lru": RealGatedLRU,
    "complex_lru": ComplexLRU,
    "slice": SLiCE,
    "bd_gru": BlockDiagonalGRU,
    "bd_slstm": BlockDiagonalSLSTM,
    "m2rnn": MatrixRNN,
    "fixed_point": FixedPoint,
    "pd_ssm": PermutationDiagonal,
}
OTHERS = ""  # what to do for another type: the code beside a checkpoint, which holds few, has it filled in


def mixer_class(name: str) -> type[Mixer]:
    """The class that `mixer.type` names; ValueError with the nearest name if there is none."""
    if not isinstance(name, str) or name not in MIXERS:
        near = difflib.get_close_matches(str(name), MIXERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(MIXERS)}"
        raise ValueError(f"unknown mixer type {name!r}; {hint}{OTHERS}")
    return MIXERS[name]


def mixer_options(spec: dict[str, Any]) -> dict[str, Any]:
    """A mixer's `type` and its options, from a table that may also hold options of other types.

    Raises:
        ValueError: an unknown type, or an option of no type; the message names the nearest.
    """
    cls = mixer_class(spec.get("type", "bd_lru"))
    known = {option: None for mixer in MIXERS.values() for option in mixer.options}
    for key in spec:
        if key != "type" and key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown mixer option {key!r}; {hint}")
    return {"type": spec.get("type", "bd_lru"), **{key: spec[key] for key in cls.options if key in spec}}


def build_mixer(spec: dict[str, Any], hidden_size: int) -> Mixer:
    """A mixer from `{"type": .., option: ..}`."""
    options = mixer_options(spec)
    return mixer_class(options.pop("type"))(hidden_size, **options)


__all__ = [
    "MIXERS", "BlockDiagonalLRU", "HigherOrderLRU", "Mixer", "SequenceContext", "build_mixer", "mixer_class",
    "mixer_options",
]  # fmt: skip
