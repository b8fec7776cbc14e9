"""A mixer is a layer of its own: no arguments but the input, and the start that a model gives it."""

import math

import pytest
import torch
from small_models import MIXER_ROWS, RECURRENT, small_config
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from lrnn_lm import LRNNForCausalLM
from lrnn_lm.kernels import written_out
from lrnn_lm.mixers import build_mixer
from lrnn_lm.mixers.base import SequenceContext, drawn_by_model

WIDTH = 16


@pytest.mark.parametrize("name", MIXER_ROWS)
def test_it_needs_no_state_and_no_context(name):
    """All tokens at once, and in three parts, each going on from the state before: the same."""
    torch.manual_seed(0)
    layer = build_mixer(MIXER_ROWS[name], WIDTH).double()
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        y, *_ = layer(x)
        kind = DYNAMIC_LAYER_TYPE_MAPPING[layer.layer_type]
        state = None if layer.layer_type == "linear_attention" else kind(sliding_window=4)
        parts = []
        for part in (x[:, :4], x[:, 4:5], x[:, 5:]):
            out, state = layer(part, state)
            parts.append(out)
    assert y.shape == x.shape
    torch.testing.assert_close(torch.cat(parts, dim=1), y, rtol=1e-4, atol=1e-6)  # some states are fp32


@pytest.mark.parametrize("name", MIXER_ROWS)
@torch.no_grad()
def test_documents_of_a_callers_own_context(name):
    """Told by `reset` alone, each document is as by itself; the last one goes on in the next part."""
    torch.manual_seed(0)
    layer = build_mixer(MIXER_ROWS[name], WIDTH).double()
    layer.reset_parameters(0.5)
    x, reset = torch.randn(2, 12, WIDTH, dtype=torch.float64), torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 3] = reset[1, 5] = True
    want = torch.stack([
        torch.cat([layer(row[None, :cut])[0], layer(row[None, cut:])[0]], dim=1)[0]
        for row, cut in zip(x, (3, 5), strict=True)
    ])  # fmt: skip
    kind = DYNAMIC_LAYER_TYPE_MAPPING[layer.layer_type]
    state = None if layer.layer_type == "linear_attention" else kind(sliding_window=4)
    first, state = layer(x[:, :7], state, SequenceContext(reset=reset[:, :7]))
    parts = torch.cat([first, layer(x[:, 7:8], state)[0]], dim=1)
    torch.testing.assert_close(parts, want[:, :8], rtol=1e-4, atol=1e-5)  # some states are fp32
    torch.testing.assert_close(layer(x, None, SequenceContext(reset=reset))[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RECURRENT)
def test_nan_ends_with_its_document(name):
    """In outputs, the state after and gradients: a start selects zeros, as NaN times zero is NaN."""
    torch.manual_seed(0)
    layer = build_mixer(MIXER_ROWS[name], WIDTH)
    x, reset = torch.randn(2, 12, WIDTH), torch.zeros(2, 12, dtype=torch.bool)
    x[0, 3:6] = x[1, 10] = math.nan
    reset[0, 6] = reset[1, 11] = True
    y, state = layer(x.requires_grad_(), None, SequenceContext(reset=reset))
    (gradient,) = torch.autograd.grad(y[0, 6:].square().sum() + y[1, 11].square().sum(), x)
    for each in (y, gradient):
        assert each[0, 6:].isfinite().all()
        assert each[1, 11].isfinite().all()
    assert state.isfinite().all()
    y, _ = layer(x[:, :1], torch.full_like(state, math.nan), SequenceContext(reset=reset[:, 6:7]))  # one step
    assert y[0].isfinite().all()
    assert gradient[0, 6:].abs().max() > 0


@pytest.mark.parametrize("name", MIXER_ROWS)
def test_an_input_without_rows_is_told(name):
    """(T, D), or an image's (B, H, W, D): torch's own words would be of axes inside of the layer."""
    layer = build_mixer(MIXER_ROWS[name], WIDTH)
    for shape in ((5, WIDTH), (WIDTH,), (2, 3, 5, WIDTH)):
        with pytest.raises(ValueError, match=r"x of shape \(.*\) must be \(rows, tokens, hidden_size\)"):
            layer(torch.randn(shape))


@pytest.mark.parametrize("name", MIXER_ROWS)
def test_no_tokens_and_no_context_are_told(name):
    """Not by torch, of a Boolean value of a Tensor or an index. As torch's LSTM, all refuse an empty row."""
    layer, reset = build_mixer(MIXER_ROWS[name], WIDTH), torch.zeros(2, 5, dtype=torch.bool)
    for context in (None, SequenceContext(), SequenceContext(reset=reset[:, :0])):
        with pytest.raises(ValueError, match=r"x of shape \(2, 0, 16\) must .* at least one token"):
            layer(torch.randn(2, 0, WIDTH), None, context)
    for mask, kind in ((reset, "Tensor"), (reset[:1, :1], "Tensor"), (reset.tolist(), "list"), ({}, "dict")):
        with pytest.raises(ValueError, match=f"context is a {kind}; pass a SequenceContext"):
            layer(torch.randn(2, 5, WIDTH), None, mask)


@pytest.mark.parametrize("name", MIXER_ROWS)
def test_resets_that_are_no_mask_of_the_tokens(name):
    layer, x = build_mixer(MIXER_ROWS[name], WIDTH), torch.randn(2, 8, WIDTH)
    for shape in ((2, 7), (2, 9), (1, 8), (8,)):
        with pytest.raises(ValueError, match="reset has shape"):
            layer(x, None, SequenceContext(reset=torch.ones(shape, dtype=torch.bool)))
    for dtype in (torch.long, torch.float32):
        with pytest.raises(ValueError, match="reset is a bool mask"):
            layer(x, None, SequenceContext(reset=torch.ones(2, 8, dtype=dtype)))


@pytest.mark.parametrize("name", [name for name in MIXER_ROWS if name != "pd_ssm"])
def test_gradients_of_a_layer_in_fp64(name):
    """Those of finite differences: a mixer that rounds its recurrence to fp32 is off by 1e-2 and more.

    Not of pd_ssm, which selects: a selection's gradient is made up.
    """
    torch.manual_seed(0)
    layer = build_mixer(MIXER_ROWS[name], WIDTH).double()
    layer.reset_parameters(0.5)
    x, along, weights = torch.randn(3, 1, 4, WIDTH, dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad((layer(x)[0] * weights).sum(), x)
    with torch.no_grad():
        ends = [(layer(x + step * along)[0] * weights).sum() for step in (1e-6, -1e-6)]
    torch.testing.assert_close((gradient * along).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MIXER_ROWS)
def test_several_gradients_at_once(name):
    """Each as by itself, where loops are written out."""
    torch.manual_seed(0)
    layer = build_mixer(MIXER_ROWS[name], WIDTH)
    layer.reset_parameters(0.5)
    x, given = torch.randn(1, 4, WIDTH, requires_grad=True), torch.randn(3, 1, 4, WIDTH)
    with written_out():
        y, *_ = layer(x)
    (got,) = torch.autograd.grad(y, x, given, is_grads_batched=True, retain_graph=True)
    want = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in given])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", RECURRENT)
def test_gradients_that_it_is_given_are_not_written_to(name, rows):
    """Autograd hands the same gradient to all that were added up, here the state and `also`."""
    torch.manual_seed(0)
    layer = build_mixer(MIXER_ROWS[name], WIDTH)
    layer.reset_parameters(0.5)
    x = torch.randn(rows, 5, WIDTH)
    with torch.no_grad():
        shape = layer(x)[1].shape
    also = torch.randn(shape, requires_grad=True)
    made = also * 2  # before the layer runs, so that its gradient comes after the layer's
    y, state = layer(x)
    given = torch.randn_like(y), torch.randn_like(state)
    kept = [g.clone() for g in given]
    torch.autograd.backward([y, state.to(also.dtype) + made], given)
    assert all(torch.equal(*pair) for pair in zip(given, kept, strict=True))
    torch.testing.assert_close(also.grad, 2 * kept[1])


@pytest.mark.parametrize("name", MIXER_ROWS)
def test_on_meta(name):
    """Shapes without numbers, for whoever counts memory or operations."""
    with torch.device("meta"):
        layer, x = build_mixer(MIXER_ROWS[name], WIDTH), torch.empty(2, 5, WIDTH)
    y, *_ = layer(x)
    assert y.is_meta
    assert y.shape == x.shape


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", MIXER_ROWS)
def test_no_rows_at_all(name, device):
    """An expert that no token was sent to, the last part of a batch: empty outputs, gradients of zero."""
    layer = build_mixer(MIXER_ROWS[name], WIDTH).to(device)
    y, *_ = layer(torch.empty(0, 5, WIDTH, device=device))
    y.sum().backward()
    assert y.shape == (0, 5, WIDTH)
    assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["bd_lru", "h_lru"])
def test_no_rows_for_a_backend_that_was_asked_for(name):
    pytest.importorskip("triton")
    layer = build_mixer(MIXER_ROWS[name], WIDTH)
    layer.backend = "triton"
    layer(torch.empty(0, 5, WIDTH))[0].sum().backward()
    assert not layer.gate_proj.weight.grad.any()


@pytest.mark.parametrize("name", MIXER_ROWS)
def test_it_starts_as_in_a_model(name):
    """The same draws, bit for bit, where the random state is the same."""
    model = LRNNForCausalLM(small_config(name, initializer_range=0.05))
    mixer = model.model.layers[0].mixer
    torch.manual_seed(1)
    mixer.apply(model._init_weights)
    modelled = {key: value.clone() for key, value in mixer.state_dict().items()}
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(7.0)
            parameter._is_hf_initialized = False
    torch.manual_seed(1)
    mixer.reset_parameters(0.05, 0.05 / math.sqrt(2 * 3))
    assert all(torch.equal(value, modelled[key]) for key, value in mixer.state_dict().items())


@pytest.mark.parametrize(
    "name", ["bd_lru", "bd_lru-all", "bd_matrix", "h_lru", "lstm", "attention", "mamba2"]
)
def test_a_new_one_is_drawn_by_these_rules(name):
    torch.manual_seed(2)
    with drawn_by_model():
        plain = build_mixer(MIXER_ROWS[name], WIDTH)
    plain.reset_parameters()
    torch.manual_seed(2)
    layer = build_mixer(MIXER_ROWS[name], WIDTH)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), plain.parameters(), strict=True))
