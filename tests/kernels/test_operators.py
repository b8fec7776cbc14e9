"""torch.compile plans with an operator's fake. Its shapes, dtypes and strides are those of the result."""

from typing import Any

import pytest
import torch
from small_models import MIXER_ROWS, RECURRENT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from lrnn_lm.mixers import build_mixer
from lrnn_lm.mixers.base import SequenceContext

WIDTH = 16
TRITON = ["bd_lru", "bd_matrix-conv", "bd_matrix-erase", "h_lru"]  # rows whose backend can be asked for


class Compared(TorchDispatchMode):
    """Runs each of our operators on fake tensors too; both results must be alike, strides included."""

    def __init__(self):
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None) -> Any:
        results = operator(*args, **(kwargs or {}))
        if operator.namespace == "lrnn_lm":
            with FakeTensorMode() as mode:
                told = operator(*tree_map_only(torch.Tensor, mode.from_tensor, args), **(kwargs or {}))
            for result, fake in zip(tree_leaves(results), tree_leaves(told), strict=True):
                assert _layout(result) == _layout(fake), operator
            self.operators.add(str(operator))
        return results


def _layout(x: torch.Tensor) -> tuple:
    """Strides of axes of one number, and of no numbers at all, say nothing."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    return x.dtype, x.device, tuple(x.shape), strides if x.numel() else []


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "auto") for name in RECURRENT), *((name, "triton") for name in TRITON)]
)
def test_fakes_have_the_layout_of_results(name, backend):
    """A compiled backward pass of another layout fails, or reads numbers in another order."""
    if backend == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    for rows, T, dtype in ((2, 9, torch.float32), (1, 9, torch.bfloat16), (2, 1, torch.float32)):
        layer = build_mixer(MIXER_ROWS[name], WIDTH).to(dtype)
        if backend != "auto":
            layer.backend = backend
        x = torch.randn(T, rows, WIDTH).to(dtype).transpose(0, 1).requires_grad_()
        reset = torch.zeros(rows, T, dtype=torch.bool)
        reset[0, T // 2] = True
        state = layer(x)[1].detach().requires_grad_()
        with Compared() as seen:
            y, state = layer(x, state, SequenceContext(reset=reset))
            (y.float().square().sum() + state.float().square().sum()).backward()
        assert seen.operators or T == 1 or name == "lstm"


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "auto") for name in RECURRENT), *((name, "triton") for name in TRITON)]
)
def test_saved_tensors_are_read_once(name, backend):
    """Activation checkpointing computes them again when they are first read, and refuses a second time."""
    if backend == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    layer = build_mixer(MIXER_ROWS[name], WIDTH)
    if backend != "auto":
        layer.backend = backend
    x = torch.randn(1, 9, WIDTH, requires_grad=True)
    given = torch.randn_like(layer(x)[1], requires_grad=True)
    want = torch.autograd.grad([layer(x, given)[0].square().sum()], [x, given])
    y = checkpoint(lambda x, given: layer(x, given)[0], x, given, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad([y.square().sum()], [x, given]), want)
