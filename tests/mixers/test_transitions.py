"""The transition matrices that a mixer reports are those that its state goes through."""

import math

import pytest
import torch

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.mixers import SequenceContext, build_mixer

MIXERS = [
    {"type": "bd_lru", "num_blocks": 5, "block_size": 3},
    {"type": "bd_lru", "num_blocks": 4, "block_size": 4, "gate": "tanh"},
    {"type": "h_lru", "num_blocks": 6, "order": 1},
    {"type": "h_lru", "num_blocks": 6, "order": 4, "gate": "identity"},
]


@pytest.mark.parametrize("spec", MIXERS, ids=str)
@torch.no_grad()
def test_the_state_is_their_product(spec):
    """Without values, h_T = A_T .. A_1 h_0."""
    torch.manual_seed(0)
    mixer = build_mixer(spec, hidden_size=16)
    mixer.value_proj.weight.zero_()
    x = torch.randn(2, 7, 16)
    M = spec.get("block_size", spec.get("order"))
    h = torch.randn(2, spec["num_blocks"], M)
    _, last = mixer(x, h, SequenceContext())
    for A in mixer.transitions(x).unbind(1):
        h = (A @ h.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(last, h)


@pytest.mark.parametrize("spec", [*MIXERS, {"type": "bd_lru", "num_blocks": 16, "block_size": 4}], ids=str)
def test_packed_projections_change_nothing(spec):
    """One product into planes for the fused scan, against two projections and the plain one."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    mixer = build_mixer(spec, 8)
    x, reset = torch.randn(2, 9, 8, requires_grad=True), torch.rand(2, 9) < 0.2
    results = []
    for backend in ("torch", "triton"):
        mixer.backend = backend
        y, state = mixer(x, None, SequenceContext(reset=reset))
        loss = y.square().sum() + state.sum()
        results.append([y, state, *torch.autograd.grad(loss, [x, *mixer.parameters()])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec", [{"type": "bd_lru", "block_size": 3}, {"type": "h_lru", "order": 2}], ids=str
)
def test_gate_std_is_the_spread_of_the_logits_at_the_start(spec):
    """Of the logits, whose input is normalised; without it they spread as any matrix makes them."""
    for gate_std in (None, 1.5):
        torch.manual_seed(0)
        model = LRNNForCausalLM(LRNNConfig(
            vocab_size=11, hidden_size=64, num_hidden_layers=1, intermediate_size=8,
            mixer={**spec, "gate_std": gate_std},
        ))  # fmt: skip
        mixer = model.model.layers[0].mixer
        logits = mixer.gate_proj(torch.nn.functional.rms_norm(torch.randn(4, 50, 64), (64,)))
        assert abs(logits.std().item() / (gate_std or 0.02 * 64**0.5) - 1) < 0.1
        assert abs(mixer.value_proj.weight.std().item() / 0.02 - 1) < 0.1
    for wrong in (0.0, -1, "wide", math.nan, math.inf):
        with pytest.raises(ValueError, match="gate_std must be above 0"):
            LRNNForCausalLM(LRNNConfig(vocab_size=11, hidden_size=8, mixer={**spec, "gate_std": wrong}))
        with pytest.raises(ValueError, match="gate_std must be above 0"):
            build_mixer({**spec, "gate_std": wrong}, 8)


@pytest.mark.parametrize("gate_std", [0.25, 1, 3.0])
@pytest.mark.parametrize(
    "spec", [{"type": "bd_lru", "block_size": 3}, {"type": "h_lru", "order": 2}], ids=str
)
def test_gate_std_of_a_mixer_alone(spec, gate_std):
    """A mixer that no model initialises starts with that spread too, and takes no other draws for it."""
    torch.manual_seed(0)
    mixer = build_mixer({**spec, "gate_std": gate_std}, 64)
    logits = mixer.gate_proj(torch.nn.functional.rms_norm(torch.randn(4, 50, 64), (64,)))
    assert abs(logits.std().item() / gate_std - 1) < 0.1
    torch.manual_seed(0)
    plain = build_mixer(spec, 64)
    assert torch.equal(mixer.value_proj.weight, plain.value_proj.weight)
    assert not torch.equal(mixer.gate_proj.weight, plain.gate_proj.weight)
