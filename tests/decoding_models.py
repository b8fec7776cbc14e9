"""Models with attention, and prompts, for the tests of their decoding steps and caches."""

import pytest
import torch
from small_models import close, small_model
from tolerances import TOLERANCE

from lrnn_lm.model.cache import tokens_seen
from lrnn_lm.model.states import tensors_of

SUMS = TOLERANCE["other order of sums"]
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
NAMES = ["hybrid", "attention", "attention-qk-norm", "attention-grouped"]
NOT_TURNED = [{"type": "lstm", "width": 9}, {"type": "attention", "num_heads": 2, "use_rope": False}]
TWO_BASES = [{"type": "attention", "num_heads": 2, "rope_theta": theta} for theta in (100.0, 1e4)]
MODELS = {
    **{name: (name, {}) for name in NAMES},
    "not turned": ("hybrid", {"layer_pattern": NOT_TURNED}),
    "two bases": ("hybrid", {"layer_pattern": [*TWO_BASES, {"type": "min_gru", "width": 9}]}),
    "repeated": ("hybrid", {"repeat": 2}),
    "initial states": ("hybrid", {"learn_initial_state": True}),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def build(name):
    base, changes = MODELS[name]
    return small_model(base, **changes)


def same(ours, theirs, tolerance=SUMS):
    """Two caches, tensor for tensor."""
    assert tokens_seen(ours) == tokens_seen(theirs)
    tables = tensors_of(ours), tensors_of(theirs)
    assert list(tables[0]) == list(tables[1])
    for name, want in tables[1].items():
        close(tables[0][name], want, tolerance)


def masked(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"attention_mask": mask}


def packed(ids):
    """Two documents in a row, of which the second goes on; in one row with a jump ahead."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 40]])
    return {"position_ids": positions, "attention_mask": torch.ones_like(ids)}


PROMPTS = {"plain": lambda ids: {}, "padded": masked, "packed": packed}
