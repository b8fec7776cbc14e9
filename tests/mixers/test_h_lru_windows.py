"""H-LRU's output filter, whose backward pass is written by hand: first and second derivatives."""

import pytest
import torch

from lrnn_lm.mixers.h_lru import _alive_taps, _WindowProduct


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_derivatives_of_the_window_product(order, documents):
    generator = torch.Generator().manual_seed(0)
    padded = torch.randn(2, order - 1 + 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, order * 3, generator=generator, dtype=torch.float64, requires_grad=True)
    alive = _alive_taps(torch.tensor([[0, 0, 1, 0, 0], [0, 1, 1, 0, 1]]).bool(), order) if documents else None

    def product(padded, weight):
        return _WindowProduct.apply(padded, weight, alive, order)

    assert torch.autograd.gradcheck(product, (padded, weight))
    assert torch.autograd.gradgradcheck(product, (padded, weight))
