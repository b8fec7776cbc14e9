"""The block-diagonal GRU and sLSTM as mixers: their start, its solvers, and what they refuse."""

import pytest
import torch
from small_models import small_model, tokens

from lrnn_lm.mixers import build_mixer

SPEC = {"type": "bd_gru", "num_blocks": 3, "block_size": 4}


def test_start():
    mixer = build_mixer(SPEC, 8)
    blocks = mixer.recurrent_weight.view(9, 4, 4)
    torch.testing.assert_close(blocks @ blocks.mT, torch.eye(4).expand(9, 4, 4), rtol=0, atol=1e-6)
    assert mixer.bias.view(4, 12).sum(dim=1).tolist() == [0, 12, 0, 0]
    y, state = mixer(10 * torch.randn(2, 300, 8))
    assert y.shape == (2, 300, 8)
    assert state.abs().max() <= 1


def test_newton_in_a_model_is_the_walk():
    models = [
        small_model("bd_gru", mixer={**SPEC, "solver": solver}, num_hidden_layers=1)
        for solver in ("walk", "newton")
    ]
    ids, grads = tokens(2, 40), []
    for model in models:
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, rtol=0, atol=1e-5 * max(1, float(want.abs().max())))
    iterations, residual = models[1].model.layers[0].mixer.solve.tolist()
    assert iterations > 1
    assert residual <= 1e-5
    assert models[0].model.layers[0].mixer.solve is None
    compiled = torch.compile(models[1], backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, models[1](ids).logits, rtol=0, atol=1e-5)


def test_newton_decodes_by_the_walk():
    mixer = build_mixer({**SPEC, "solver": "newton"}, 8)
    _, state = mixer(torch.randn(2, 9, 8))
    _, after = mixer(torch.randn(2, 1, 8), state)
    assert after.shape == state.shape == (2, 3, 4)
    assert mixer.solve.tolist() == [0, 0]


def test_slstm_starts_without_recurrence():
    torch.manual_seed(0)
    mixer = build_mixer({"type": "bd_slstm", "num_blocks": 3}, 8)
    assert not mixer.recurrent_weight.any()
    assert mixer.bias.view(4, 3, 4)[:, :, 0].tolist() == [[0, 0, 0], [0, 0, 0], [1, 3.5, 6], [0, 0, 0]]
    _, state = mixer(10 * torch.randn(2, 300, 8))
    assert state[:, :2].abs().max() <= 1


@pytest.mark.parametrize(("change", "message"), [
    ({"block_size": 17}, "block_size of bd_gru must be at most 16, not 17"),
    ({"type": "bd_slstm", "block_size": 17}, "block_size of bd_slstm must be at most 16, not 17"),
    ({"block_size": 0}, "block_size must be at least 1"),
    ({"solver": "jacobi"}, "unknown solver 'jacobi'; known: walk, newton"),
])  # fmt: skip
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        build_mixer({**SPEC, **change}, 8)
