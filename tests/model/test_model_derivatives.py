"""Derivatives other than the first in reverse mode: right, or refused in a line. None is silently wrong."""

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from lrnn_lm import block_diagonal_scan
from lrnn_lm.kernels import gru_scan, written_out
from tests.small_models import HYBRIDS, close, small_model, tokens

# One of each scan, of fixed_point's iterations and of torch's own operators. Not pd_ssm: a selection's
# gradient is made up, so that its second derivative is not its finite difference.
ONE_LAYER = ["bd_lru-all", "h_lru", "bd_matrix-erase", "mlstm", "fixed_point", "bd_gru", "bd_slstm", "m2rnn",
             "lstm"]  # fmt: skip
SMOOTH = [*ONE_LAYER, "hybrid", "attention"]
STEP = 1e-6


def shallow(name, **changes):
    """A layer of each mixer in fp64; attention without fused kernels, which have no such derivatives."""
    model = small_model(name, num_hidden_layers=len(HYBRIDS.get(name, "1")), **changes).double()
    model.set_attn_implementation("eager")
    return model.train()


def loss_of(model, ids, name):
    """The loss as a function of one parameter."""
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(value):
        arguments = {"input_ids": ids, "labels": ids, "use_cache": False, "z_loss": 1e-2}
        return func.functional_call(model, {**parameters, name: value}, (), arguments).loss

    return loss, parameters[name]


def a_parameter_of_the_mixer(model):
    """Of the values, if it has some: they go through the scan."""
    names = [name for name, _ in model.named_parameters() if ".mixer." in name]
    return next((name for name in names if "value_proj" in name), names[0])


def case(name, **changes):
    model, ids = shallow(name, **changes), tokens(length=5)
    loss, value = loss_of(model, ids, a_parameter_of_the_mixer(model))
    direction = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(0))
    return loss, value, direction


def gradient(loss, value):
    """In reverse mode through the fast scans."""
    value = value.clone().requires_grad_()
    return torch.autograd.grad(loss(value), value)[0]


@pytest.mark.parametrize("name", SMOOTH)
def test_transforms_of_the_loss(name):
    """torch.func's gradient, both forward modes, and a second derivative forward over reverse."""
    loss, value, direction = case(name)
    first = gradient(loss, value)
    close(func.grad(loss)(value), first, 1e-10)
    along = (first * direction).sum()
    close(func.jvp(loss, (value,), (direction,))[1], along, 1e-9)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(value, direction))
        close(forward_ad.unpack_dual(dual).tangent, along, 1e-9)
    ends = [gradient(loss, value + step * direction) for step in (STEP, -STEP)]
    want = (ends[0] - ends[1]) / (2 * STEP)
    close(func.jvp(func.grad(loss), (value,), (direction,))[1], want, 1e-6)


@pytest.mark.parametrize("name", [name for name in ONE_LAYER if name != "lstm"])
def test_a_second_derivative_is_refused_or_right(name):
    """Refused by the fast scans; a mixer of torch's operators alone has it."""
    model, ids = shallow(name), tokens(length=5)
    weight = model.get_parameter(a_parameter_of_the_mixer(model))
    with pytest.raises(RuntimeError, match="chunked loss has no second derivatives: run the forward"):
        torch.autograd.grad(model(ids, labels=ids).loss, weight, create_graph=True)

    def second():
        out = model(ids, use_cache=False).logits.square().mean()
        first = torch.autograd.grad(out, weight, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), weight)[0]

    refusal = None
    try:
        got = second()
    except RuntimeError as error:
        refusal = str(error)
    if refusal is not None:
        assert "the fast scans have no second derivatives: run the forward" in refusal
        return
    with written_out():
        close(got, second(), 1e-9)


@pytest.mark.parametrize("name", SMOOTH)
def test_what_the_error_advises(name):
    loss, value, direction = case(name)
    value.requires_grad_()
    with written_out():
        first = torch.autograd.grad(loss(value), value, create_graph=True)[0]
    got = torch.autograd.grad((first * direction).sum(), value)[0]
    ends = [gradient(loss, value.detach() + step * direction) for step in (STEP, -STEP)]
    close(got, (ends[0] - ends[1]) / (2 * STEP), 1e-6)


@pytest.mark.parametrize("name", [name for name in SMOOTH if name != "lstm"])
def test_gradients_of_each_example(name):
    """vmap; torch's own LSTM has no rule for it."""
    model, ids = shallow(name), tokens(rows=3, length=5)
    parameter = a_parameter_of_the_mixer(model)
    value = loss_of(model, ids, parameter)[1]

    def of_one(value, row):
        return loss_of(model, row[None], parameter)[0](value)

    got = func.vmap(func.grad(of_one), in_dims=(None, 0))(value, ids)
    want = [gradient(loss_of(model, row[None], parameter)[0], value) for row in ids]
    close(got, torch.stack(want), 1e-10)


def test_a_learnt_initial_state():
    loss, value, direction = case("bd_lru", learn_initial_state=True)
    close(func.jvp(loss, (value,), (direction,))[1], (gradient(loss, value) * direction).sum(), 1e-9)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_backend_asked_for_by_name_is_refused(backend):
    gates, values = torch.randn(1, 3, 2, 2, 3), torch.randn(1, 3, 2, 2)
    with pytest.raises(ValueError, match=rf"backend '{backend}' cannot run inside torch.func's transforms"):
        func.jvp(lambda v: block_diagonal_scan(gates, v, backend=backend)[0], (values,), (values,))
    inputs, weight, bias = torch.randn(1, 3, 3, 2, 2), torch.randn(3, 2, 2, 2), torch.randn(4, 2, 2)
    with pytest.raises(ValueError, match=rf"backend '{backend}' cannot run inside torch.func's transforms"):
        func.vmap(lambda x: gru_scan(x[None], weight, bias, backend=backend)[0])(inputs)
