"""Muon: each plane of a packed projection is orthogonalised alone, and what is no matrix gets AdamW."""

import pytest
import torch
from small_models import small_model

from lrnn_lm.recipe.optim import OptimSection
from lrnn_lm.train.muon import MOMENTUM, orthogonalised
from lrnn_lm.train.optim import layer_matrices, make_optimizer

CPU = torch.device("cpu")


def settings(**changes) -> OptimSection:
    return OptimSection(name="muon", lr=0.02, weight_decay=0.1, **changes)


def with_gradients(model, seed: int = 3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 24, 8), (1, 8, 24)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = orthogonalised(x)
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.5
    assert values.max() < 1.35
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    aligned = u.mT @ y @ vh.mT  # diagonal where the vectors are the same
    off = aligned - torch.diag_embed(aligned.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-4


@pytest.mark.parametrize("name", ["bd_lru", "h_lru", "attention", "hybrid", "mamba2"])
def test_a_step_is_that_of_each_plane_alone(name: str) -> None:
    model = with_gradients(small_model(name))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    make_optimizer(model, settings(), CPU).step()
    planes = dict(layer_matrices(model))
    matrices = 0
    for n, p in model.named_parameters():
        if p not in planes:
            continue
        matrices += 1
        ahead = p.grad * (1 + MOMENTUM)
        pieces = [
            max(piece.shape) ** 0.5 * orthogonalised(piece[None])[0] for piece in ahead.split(planes[p])
        ]
        want = before[n] * (1 - 0.02 * 0.1) - 0.02 * 0.2 * torch.cat(pieces)
        torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-5)
    assert matrices >= 3 * 4  # of three layers: the SwiGLU's three and the mixer's
    if name == "bd_lru":
        gates = model.model.layers[0].mixer.gate_proj.weight
        assert len(planes[gates]) == model.model.layers[0].mixer.block_size + 1
    if name == "mamba2":  # z, x, B, C and dt
        assert planes[model.model.layers[0].mixer.inner.in_proj.weight] == [32, 32, 3, 3, 4]


def test_planes_of_one_shape_that_are_no_neighbours(monkeypatch) -> None:
    """Heads of width 1 make as many steps as values. A batch writes to no tensor twice: on a GPU, one of two
    such writes would be lost."""
    mixer = {"type": "mamba2", "expand": 1, "head_dim": 1, "state_size": 3}
    model = with_gradients(small_model("mamba2", mixer=mixer, num_hidden_layers=1))
    weight = model.model.layers[0].mixer.inner.in_proj.weight
    assert dict(layer_matrices(model))[weight] == [16, 16, 3, 3, 16]
    before, add = weight.detach().clone(), torch._foreach_add_

    def once(targets, *rest, **options) -> None:
        assert len({id(target) for target in targets}) == len(targets)
        add(targets, *rest, **options)

    monkeypatch.setattr(torch, "_foreach_add_", once)
    make_optimizer(model, settings(), CPU).step()
    pieces = (weight.grad * (1 + MOMENTUM)).split([16, 16, 3, 3, 16])
    want = torch.cat([orthogonalised(piece[None])[0] for piece in pieces])  # each 16 wide
    torch.testing.assert_close(weight.detach(), before * (1 - 0.02 * 0.1) - 0.02 * 0.2 * 4 * want)


def test_the_second_step_goes_by_both_gradients() -> None:
    """Nesterov: the second gradient, and the momentum after it a step ahead."""
    model = with_gradients(small_model("h_lru"))
    optimizer = make_optimizer(model, settings(), CPU)
    weight = model.model.layers[0].mlp.up_proj.weight
    first = weight.grad.clone()
    optimizer.step()
    before = weight.detach().clone()
    with_gradients(model, seed=4)
    optimizer.step()
    ahead = weight.grad + MOMENTUM * (MOMENTUM * first + weight.grad)
    update = 0.02 * 0.2 * max(weight.shape) ** 0.5 * orthogonalised(ahead[None])[0]
    torch.testing.assert_close(weight.detach(), before * (1 - 0.02 * 0.1) - update, rtol=0, atol=1e-5)


def test_what_is_no_layer_matrix_moves_as_under_adamw() -> None:
    ours, theirs = with_gradients(small_model("hybrid")), with_gradients(small_model("hybrid"))
    make_optimizer(ours, settings(), CPU).step()
    make_optimizer(theirs, OptimSection(lr=0.02, weight_decay=0.1), CPU).step()
    taken = {p for p, _ in layer_matrices(ours)}
    same = [
        torch.equal(p, q)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
        if p not in taken
    ]
    assert len(same) > 4  # embedding, head, norms, biases
    assert all(same)
