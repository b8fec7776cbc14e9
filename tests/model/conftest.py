"""What several tests of decoding watch and shorten."""

import pytest

from lrnn_lm.model.decoding import memory, step


@pytest.fixture
def steps(monkeypatch):
    """The columns and the graph of each step of our own."""
    calls, one_step = [], step.DecodeStep.__call__

    def noted(self, *args):
        logits, token = one_step(self, *args), self.memory.token
        calls.append((token.mask.shape[-1], self.memory.graph is not None))
        return logits

    monkeypatch.setattr(step.DecodeStep, "__call__", noted)
    return calls


@pytest.fixture
def small_buffers(monkeypatch):
    """Of 8 columns, then 16, 24, ..: a few tokens fill them."""
    monkeypatch.setattr(memory, "LEAST", 8)
