"""What both test files of flash-linear-attention's layers share: small ones, inputs, a measure of error."""

import importlib.util

import pytest
import torch
from torch import Tensor

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.mixers import SequenceContext, build_mixer
from lrnn_lm.mixers.fla_layer import FlaMixer

D = 32
SPECS = {
    "deltanet": {"type": "deltanet", "num_heads": 2, "expand_v": 2.0},
    "deltanet-negative": {"type": "deltanet", "num_heads": 2, "allow_neg_eigval": True},
    "gated_deltanet": {"type": "gated_deltanet", "num_heads": 2, "head_dim": 16, "expand_v": 2.0},
    "gated_deltanet-negative": {
        "type": "gated_deltanet", "num_heads": 1, "head_dim": 16, "allow_neg_eigval": True,
    },
    "gated_deltaproduct": {"type": "gated_deltaproduct", "num_heads": 2, "head_dim": 16},
    "gated_deltaproduct-3": {
        "type": "gated_deltaproduct", "num_heads": 1, "head_dim": 16, "expand_v": 2.0, "num_householder": 3,
        "allow_neg_eigval": False,
    },
    "gla": {"type": "gla", "num_heads": 2, "expand_v": 2.0},
    "kda": {"type": "kda", "num_heads": 2, "head_dim": 16, "expand_v": 2.0},
    "kda-negative": {"type": "kda", "num_heads": 1, "head_dim": 16, "allow_neg_eigval": True},
    "gated_deltanet2": {"type": "gated_deltanet2", "num_heads": 2, "head_dim": 16, "expand_v": 2.0},
    "gated_deltanet2-negative": {
        "type": "gated_deltanet2", "num_heads": 1, "head_dim": 16, "allow_neg_eigval": True,
    },
    "hgrn2": {"type": "hgrn2", "head_dim": 16},
    "rwkv7": {"type": "rwkv7", "head_dim": 16},
}  # fmt: skip
TYPES = tuple(dict.fromkeys(spec["type"] for spec in SPECS.values()))
HALF_CHUNKS = ("deltanet", "gated_deltaproduct")  # whose chunked kernels take half precision only
KEEP = SequenceContext()

installed = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed"
)


def make(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", std: float = 0.3) -> FlaMixer:
    """A mixer with weights large enough that every part of it matters."""
    torch.manual_seed(0)
    mixer = build_mixer(SPECS[name], D)
    with torch.no_grad():
        for key, value in mixer.initial_values(0.02).items():
            mixer.get_parameter(key).copy_(value)
        for linear in (m for m in mixer.modules() if isinstance(m, torch.nn.Linear)):
            torch.nn.init.normal_(linear.weight, std=std)
    return mixer.to(device, dtype).eval()


def off(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over that of what is right."""
    return float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-3))


def near(got: Tensor, want: Tensor, name: str) -> None:
    """In fp32. RWKV-7's chunks invert a matrix in fp16, whatever their inputs are."""
    assert off(got, want) < (1e-3 if name == "rwkv7" else 1e-5)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def model_of(name: str, layers: int = 2) -> LRNNForCausalLM:
    torch.manual_seed(0)
    config = LRNNConfig(
        vocab_size=41, hidden_size=D, num_hidden_layers=layers, intermediate_size=48, mixer=SPECS[name],
        initializer_range=0.2,
    )  # fmt: skip
    return LRNNForCausalLM(config).eval()
