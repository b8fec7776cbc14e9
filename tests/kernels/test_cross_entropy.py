"""The fused cross-entropy against torch's in fp64, in the interpreter and natively."""

import pytest
import torch
from torch.nn import functional
from triton_cases import inside  # noqa: F401  (a fixture)

pytest.importorskip("triton")

IGNORE = -100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)]


def both(logits, labels):
    """(nats, gradient) of ours and of torch's in fp64."""
    from lrnn_lm.kernels.cross_entropy import nats_and_squares_in_place

    exact = logits.double().requires_grad_()
    nats = functional.cross_entropy(exact, labels, ignore_index=IGNORE, reduction="sum")
    (gradient,) = torch.autograd.grad(nats, exact)
    logits, labels = logits.clone().to(DEVICE), labels.to(DEVICE)
    ours = nats_and_squares_in_place(logits, labels, IGNORE, 0.0)[0]
    return (ours.cpu().double(), logits.cpu().double()), (nats.detach(), gradient)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("columns", [19, 256, 700])
def test_value_and_gradient(dtype, tolerance, columns):
    generator = torch.Generator().manual_seed(columns)
    logits = (4 * torch.randn(7, columns, generator=generator)).to(dtype)
    labels = torch.randint(0, columns, (7,), generator=generator)
    labels[2] = IGNORE
    (nats, gradient), (wanted_nats, wanted) = both(logits, labels)
    assert abs(nats - wanted_nats) <= 2e-6 * wanted_nats
    assert (gradient - wanted).norm() <= tolerance * wanted.norm()
    assert not gradient[2].any()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_z_loss(dtype, tolerance):
    from lrnn_lm.kernels.cross_entropy import nats_and_squares_in_place

    generator = torch.Generator().manual_seed(1)
    logits = (2 * torch.randn(6, 300, generator=generator)).to(dtype)
    labels = torch.tensor([4, IGNORE, 0, 299, 7, 7])
    exact = logits.double().requires_grad_()
    wanted = exact.logsumexp(1)[labels != IGNORE].square().sum()
    total = functional.cross_entropy(exact, labels, ignore_index=IGNORE, reduction="sum") + 0.02 * wanted
    (gradient,) = torch.autograd.grad(total, exact)
    ours = logits.clone().to(DEVICE)
    nats, squares = nats_and_squares_in_place(ours, labels.to(DEVICE), IGNORE, 0.02)
    assert squares.item() == pytest.approx(wanted.item(), rel=2e-6)
    assert (nats + 0.02 * squares).item() == pytest.approx(total.item(), rel=2e-6)
    assert (ours.cpu().double() - gradient).norm() <= tolerance * gradient.norm()


@pytest.mark.parametrize("scale", [0.0, 80.0, 1e4])
def test_extreme_logits(scale):
    """All equal, far apart, and so far that most exponentials are zero."""
    logits = scale * torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    (nats, gradient), (wanted_nats, wanted) = both(logits, torch.arange(5))
    assert abs(nats - wanted_nats) <= 2e-6 * wanted_nats
    assert (gradient - wanted).norm() <= 2e-3 * wanted.norm()


def test_rows_that_are_not_adjacent_and_labels_that_are_no_column():
    from lrnn_lm.kernels.cross_entropy import nats_and_squares_in_place

    wide = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    (nats, gradient), _ = both(wide[:, :17], torch.arange(3))
    rows = wide.clone().to(DEVICE)
    ours = nats_and_squares_in_place(rows[:, :17], torch.arange(3, device=DEVICE), IGNORE, 0.0)[0]
    assert ours.item() == pytest.approx(nats.item())
    torch.testing.assert_close(rows[:, :17].cpu().double(), gradient)
    assert torch.equal(rows[:, 17:].cpu(), wide[:, 17:])
    assert nats_and_squares_in_place(rows, torch.full((3,), 40, device=DEVICE), IGNORE, 0.0)[0].isnan()


def test_labels_that_are_not_adjacent():
    """A column of a batch's labels, and one label for all rows."""
    logits = torch.randn(3, 17, generator=torch.Generator().manual_seed(0))
    for labels in (torch.tensor([[1, 9], [2, 8], [IGNORE, 7]])[:, :1].reshape(-1), torch.tensor(4).expand(3)):
        (nats, gradient), (wanted_nats, wanted) = both(logits, labels)
        assert abs(nats - wanted_nats) <= 2e-6 * wanted_nats
        assert (gradient - wanted).norm() <= 2e-6 * wanted.norm()
