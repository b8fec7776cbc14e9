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


def test_no_window_reads_nan_of_the_document_before():
    padded, weight = torch.ones(1, 6, 2), torch.ones(3, 4, requires_grad=True)
    padded[:, 2] = torch.nan  # the second of five tokens; the third starts a document
    alive = _alive_taps(torch.tensor([[0, 0, 1, 0, 0]]).bool(), 2)
    y = _WindowProduct.apply(padded.requires_grad_(), weight, alive, 2)
    assert y[:, 2:].isfinite().all()
    assert y[:, 1].isnan().all()
    (gradient,) = torch.autograd.grad(
        y, padded, torch.full_like(y, torch.nan).index_fill(1, torch.arange(2), 1)
    )
    assert gradient[:, :3].isfinite().all()
    assert gradient[:, 3:].isnan().all()
