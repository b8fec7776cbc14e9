"""silu(gate) * up and its gradient by our kernels against torch's operators in fp64, in the interpreter and
natively."""

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain(joint):
    gate, up = joint.chunk(2, dim=-1)
    return functional.silu(gate) * up


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 2), (1, 1, 26), (2, 64, 128), (130, 96)], ids=str)
def test_value_and_gradient(dtype, tolerance, shape):
    """One column, widths beside a tile's, whole tiles, rows of two axes."""
    from lrnn_lm.kernels.swiglu import swiglu

    generator = torch.Generator().manual_seed(shape[-1])
    joint = (4 * torch.randn(shape, generator=generator)).to(DEVICE, dtype).requires_grad_()
    d_h = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(DEVICE, dtype)
    exact = joint.detach().double().requires_grad_()
    ours, wanted = swiglu(joint), plain(exact)
    (gradient,) = torch.autograd.grad(ours, joint, d_h)
    (wanted_gradient,) = torch.autograd.grad(wanted, exact, d_h.double())
    assert ours.dtype == gradient.dtype == dtype
    assert (ours - wanted).norm() <= tolerance * wanted.norm()
    assert (gradient - wanted_gradient).norm() <= tolerance * wanted_gradient.norm()


def test_views_and_large_numbers():
    """Inputs that are not contiguous; exponentials that would overflow."""
    from lrnn_lm.kernels.swiglu import swiglu

    base = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4, 1.0], [1.0] * 6]).repeat(3, 1).to(DEVICE)
    joint = base.t().contiguous().t().requires_grad_()
    ours = swiglu(joint)
    assert torch.allclose(ours, plain(joint), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(ours.t().sum(), joint)
    (wanted,) = torch.autograd.grad(plain(joint).sum(), joint)
    assert torch.allclose(gradient, wanted, rtol=1e-6, atol=1e-30)


def test_second_derivatives_are_refused():
    from lrnn_lm.kernels.swiglu import swiglu

    joint = torch.ones(1, 4, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(swiglu(joint).sum(), joint, create_graph=True)
    with pytest.raises(RuntimeError, match="written_out"):
        gradient.sum().backward()


@pytest.mark.gpu
def test_a_compiled_block_takes_them():
    """Outputs and all gradients of a compiled SwiGLU against the plain one in fp64. Rows that end within
    a line of memory are not padded, as they would be copied for our kernels."""
    from torch._inductor.utils import run_and_get_code

    from lrnn_lm.model.layers import SwiGLU
    from lrnn_lm.train.build import compile_block

    torch.manual_seed(0)
    block = SwiGLU(64, 1240).cuda()
    x, d_y = torch.randn(2, 3, 100, 64, device="cuda").unbind()
    exact = SwiGLU(64, 1240).cuda().double()
    exact.load_state_dict(block.state_dict())
    wanted = exact(x.double())
    wanted.backward(d_y.double())
    compile_block(block)

    def run():
        y = block(x)
        y.backward(d_y)
        torch.cuda.synchronize()
        return y

    with torch.profiler.profile() as recorded:
        ours, codes = run_and_get_code(run)
    assert {"swiglu_forward_kernel", "swiglu_backward_kernel"} <= {event.name for event in recorded.events()}
    padded = ["2496" in code for code in codes]  # 2,480 numbers of a row, in whole lines
    assert padded
    assert not any(padded)
    assert (ours - wanted).norm() <= 1e-3 * wanted.norm()
    for mine, theirs in zip(block.parameters(), exact.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm()
