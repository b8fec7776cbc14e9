"""Mixers of others: each against its paper's equations, step by step, with all gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lrnn_lm.mixers import SequenceContext, build_mixer
from lrnn_lm.mixers.slice import SLiCE

D, T = 6, 11
RESET = torch.zeros(2, T, dtype=torch.bool)
RESET[1, 4] = True


def states(h: Tensor, steps, resets: Tensor) -> Tensor:
    """(B, T, ..) states of h <- steps[t](h), which count as zero where a document starts."""
    found = []
    for t, step in enumerate(steps):
        h = step(h.masked_fill(resets[:, t].view(-1, *[1] * (h.ndim - 1)), 0))
        found.append(h)
    return torch.stack(found, dim=1)


def min_gru(m, x, reset):
    z, v = m.gate_proj(x).sigmoid(), m.value_proj(x)
    h = states(
        x.new_zeros(2, 5), [lambda h, t=t: (1 - z[:, t]) * h + z[:, t] * v[:, t] for t in range(T)], reset
    )
    return m.out_proj(h)


def min_lstm(m, x, reset):
    """Of a bd_lru of M = 1 with the gate sigmoid."""
    logits = m.gate_proj(x)
    f, i = logits[..., :5].sigmoid(), logits[..., 5:].sigmoid()
    f, i, v = f / (f + i), i / (f + i), m.value_proj(x)
    h = states(x.new_zeros(2, 5), [lambda h, t=t: f[:, t] * h + i[:, t] * v[:, t] for t in range(T)], reset)
    return m.out_proj(h)


def convolved(conv, u, reset):
    """Each token with the three before it in its document, and itself once more."""
    weight = conv.weight.clone()
    weight[0] += 1
    parts = [torch.zeros_like(u[:, 0])] * T
    for t in range(T):
        for lag in range(min(3, t) + 1):
            crossed = reset[:, t - lag + 1 : t + 1].any(dim=1, keepdim=True)
            parts[t] = parts[t] + (weight[lag] * u[:, t - lag]).masked_fill(crossed, 0)
    return torch.stack(parts, dim=1)


def rg_lru(m, x, reset):
    u = convolved(m.conv, m.value_proj(x), reset)
    r, i = m.gate_proj(u).sigmoid().chunk(2, dim=-1)
    a = torch.exp(-8 * functional.softplus(m.decay) * r)
    b = (1 - a.square()).sqrt() * i * u
    h = states(x.new_zeros(2, 5), [lambda h, t=t: a[:, t] * h + b[:, t] for t in range(T)], reset)
    return m.out_proj(h * functional.gelu(m.output_gate_proj(x), approximate="tanh"))


def complex_lru(m, x, reset):
    decay = torch.exp(torch.complex(-m.nu.exp(), m.theta))
    gamma = (1 - decay.abs().square()).sqrt()
    b = gamma * torch.view_as_complex(m.value_proj(x).unflatten(-1, (5, 2)).contiguous())
    h = states(b.new_zeros(2, 5), [lambda h, t=t: decay * h + b[:, t] for t in range(T)], reset)
    C = torch.view_as_complex(m.out_proj.weight.unflatten(-1, (5, 2)).contiguous()).conj()
    return (h @ C.T).real + m.skip * x


def cde(m, x, reset):
    A = torch.eye(2).double() + m.transition_proj(x).view(2, T, 5, 2, 2)
    if m.scaled:
        A = A / A.abs().sum(dim=-1, keepdim=True).clamp(min=1)
    v = m.value_proj(x).view(2, T, 5, 2, 1)
    h = states(x.new_zeros(2, 5, 2, 1), [lambda h, t=t: A[:, t] @ h + v[:, t] for t in range(T)], reset)
    return m.out_proj(h.flatten(2))


def fixed_point(m, x, reset):
    """All iterations of a token before the next token, as in decoding."""
    v, a = m.value_proj(x) * functional.silu(m.input_gate_proj(x)), m.decay_proj(x).sigmoid()
    old, outputs = [x.new_zeros(2, 5)] * 4, []  # h^0 .. h^3 at the token before
    for t in range(T):
        old, new = [h.masked_fill(reset[:, t, None], 0) for h in old], [x.new_zeros(2, 5)]
        for step in range(3):
            mix = m.mix_proj(x[:, t]) + m.feedback_proj(old[step])
            u = functional.normalize(functional.silu(mix[:, :5]), dim=-1)
            Q = torch.eye(5).double() - 2 * mix[:, 5:, None].sigmoid() * u[:, :, None] * u[:, None]
            mixed = (Q @ (v[:, t] - new[step])[..., None])[..., 0] + new[step]
            new.append(a[:, t] * old[step + 1] + (1 - a[:, t]) * mixed)
        old = new
        outputs.append(new[3])
    return m.out_proj(torch.stack(outputs, dim=1) * functional.silu(m.output_gate_proj(x)))


def pd_ssm(m, x, reset):
    shares = m.select_proj(x).view(2, T, 3, 4).softmax(-1)
    logits = (shares[..., None] * m.matrices.view(3, 4, 4)).sum(3).view(2, T, 3, 2, 2)
    soft = logits.softmax(3)
    P = torch.nn.functional.one_hot(soft.argmax(3), 2).mT - soft.detach() + soft
    phase = 2 * torch.pi * (m.phase_proj(x).sigmoid() - 0.5)
    d = (m.magnitude_proj(x).sigmoid() * torch.exp(1j * phase)).view(2, T, 3, 2)
    b = m.value_proj(x).view(2, T, 3, 2, 2)
    b = torch.complex(b[..., 0, :], b[..., 1, :])
    A, b = P.to(d.dtype) * d[..., None, :], b[..., None]
    h = states(b.new_zeros(2, 3, 2, 1), [lambda h, t=t: A[:, t] @ h + b[:, t] for t in range(T)], reset)
    return m.out_proj(torch.cat([h.real, h.imag], dim=-2).flatten(2))


def mlstm(m, x, reset):
    """With the paper's stabiliser: C and n count in units of e^m, m the largest logarithm so far."""
    H, K, V = m.head_shape
    q, k = (p(x).view(2, T, H, K) for p in (m.query_proj, m.key_proj))
    v, out = m.value_proj(x).view(2, T, H, V), m.output_gate_proj(x).sigmoid()
    i, f = (15 * torch.tanh(p(x) / 15) for p in (m.input_gate_proj, m.forget_gate_proj))
    C, n, top, outputs = x.new_zeros(2, H, K, V), x.new_zeros(2, H, K), x.new_zeros(2, H), []
    for t in range(T):
        fresh = reset[:, t, None]
        C, n = C.masked_fill(fresh[..., None, None], 0), n.masked_fill(fresh[..., None], 0)
        before = functional.logsigmoid(f[:, t]) + top.masked_fill(fresh, 0)
        top = torch.maximum(before, i[:, t]).detach()
        keep, write = (before - top).exp()[..., None], (i[:, t] - top).exp()[..., None] * k[:, t]
        C = keep[..., None] * C + write[..., None] * v[:, t, :, None]
        n = keep * n + write
        read = q[:, t] * K**-0.5
        size = torch.maximum((n * read).sum(-1).abs(), (-top).exp())
        h = (C * read[..., None]).sum(2) / size[..., None]
        outputs.append(functional.layer_norm(h, (V,), eps=1e-6))
    return m.out_proj(torch.stack(outputs, dim=1).flatten(2) * m.norm_weight * out)


def m2rnn(m, x, reset):
    H, K, V = m.head_shape
    u = torch.cat([p(x) for p in (m.query_proj, m.key_proj, m.value_proj)], dim=-1)
    q, k, v = functional.silu(convolved(m.conv, u, reset)).split([H * K, H * K, H * V], dim=-1)
    q, k, v = q.view(2, T, H, K, 1), k.view(2, T, H, K, 1), v.view(2, T, H, 1, V)
    f = torch.exp(-m.log_rate.exp() * functional.softplus(m.forget_gate_proj(x)))[..., None, None]
    W = m.recurrent_weight.view(H, V, V)

    def step(t):
        return lambda S: f[:, t] * S + (1 - f[:, t]) * torch.tanh(S @ W + k[:, t] * v[:, t])

    S = states(x.new_zeros(2, H, K, V), [step(t) for t in range(T)], reset)
    y = ((S.mT @ q).mT + m.skip.view(H, 1, V) * v).flatten(2) * functional.silu(m.output_gate_proj(x))
    return m.out_proj(functional.rms_norm(y, (H * V,), eps=1e-6) * m.norm_weight)


CASES = {
    "m2rnn": ({"type": "m2rnn", "num_heads": 2, "head_dim": 3, "value_dim": 4}, m2rnn),
    "mlstm": ({"type": "mlstm", "num_heads": 2, "head_dim": 3}, mlstm),
    "fixed_point": ({"type": "fixed_point", "width": 5, "iterations": 3}, fixed_point),
    "pd_ssm": ({"type": "pd_ssm", "num_blocks": 3, "states": 2, "dictionary": 4}, pd_ssm),
    "min_gru": ({"type": "min_gru", "width": 5}, min_gru),
    "min_lstm": ({"type": "bd_lru", "num_blocks": 5, "block_size": 1, "gate": "sigmoid"}, min_lstm),
    "rg_lru": ({"type": "rg_lru", "width": 5}, rg_lru),
    "complex_lru": ({"type": "complex_lru", "num_blocks": 5}, complex_lru),
    "slice": ({"type": "slice", "num_blocks": 5, "block_size": 2}, cde),
    "slice-scaled": ({"type": "slice", "num_blocks": 5, "block_size": 2, "scaled": True}, cde),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("resets", [False, True])
def test_the_papers_equations(name, resets):
    spec, plain = CASES[name]
    torch.manual_seed(0)
    mixer = build_mixer(spec, D).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    reset = RESET if resets else torch.zeros_like(RESET)
    y, _ = mixer(x, None, SequenceContext(reset=reset if resets else None))
    want = plain(mixer, x, reset)
    # minLSTM has no eps beside f + i, the scan's gate functions have 1e-6.
    close = {"rtol": 0, "atol": 1e-5 if name == "min_lstm" else 1e-10}
    torch.testing.assert_close(y, want, **close)
    weight = torch.randn_like(y)
    wanted = [x, *mixer.parameters()]
    got = torch.autograd.grad((y * weight).sum(), wanted)
    for left, right in zip(got, torch.autograd.grad((want * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(left, right, **close)


@torch.no_grad()
def test_mlstm_is_that_of_transformers():
    """With its weights and states, over more than one of its chunks and some tokens more."""
    from transformers import xLSTMConfig
    from transformers.models.xlstm import modeling_xlstm

    if modeling_xlstm.external_xlstm:
        pytest.skip("with the package xlstm, transformers has no layer of its own")
    torch.manual_seed(0)
    config = xLSTMConfig(hidden_size=32, num_heads=2, chunk_size=16)
    theirs = modeling_xlstm.xLSTMLayer(config)
    ours = build_mixer({"type": "mlstm", "num_heads": 2, "head_dim": 8, "value_dim": 16}, 32)
    names = {"query": "q", "key": "k", "value": "v", "out": "out_proj"}
    names |= {f"{gate}_gate": f"{gate[0]}gate_preact" for gate in ("output", "input", "forget")}
    for own, other in names.items():
        ours.get_submodule(f"{own}_proj").load_state_dict(theirs.get_submodule(other).state_dict())
    torch.nn.init.normal_(ours.norm_weight)
    theirs.multihead_norm.weight.copy_(ours.norm_weight)
    x = 2 * torch.randn(2, 47, 32)
    want, (C, n, top) = theirs(x)
    y, state = ours(x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)  # they add 1e-6 to |n q|, in units of e^m
    scale = top.exp()
    torch.testing.assert_close(state[..., :-1], C * scale[..., None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state[..., -1], n * scale, rtol=1e-4, atol=1e-4)


def test_published_initial_values():
    torch.manual_seed(0)
    mixer = build_mixer({"type": "m2rnn", "num_heads": 4000, "head_dim": 1, "value_dim": 2}, D)
    step = functional.softplus(mixer.forget_gate_proj.bias)
    assert 0.001 <= step.min() < 0.00101
    assert 0.099 < step.max() <= 0.1
    assert (mixer.recurrent_weight.view(4000, 2, 2) == torch.eye(2)).all()
    mixer = build_mixer({"type": "rg_lru", "width": 4000}, D)
    decay = torch.exp(-8 * functional.softplus(mixer.decay))
    assert 0.9 <= decay.min() < 0.901
    assert 0.998 < decay.max() <= 0.999
    mixer = build_mixer({"type": "complex_lru", "num_blocks": 4000}, D)
    size = torch.exp(-mixer.nu.exp())
    assert 2**-0.25 <= size.min() < 0.85
    assert 0.998 < size.max() <= 2 ** (-1 / 512) + 1e-6
    assert abs(size.square().mean() - (2**-0.5 + 2 ** (-1 / 256)) / 2) < 0.005  # uniform on the ring


def test_a_bf16_model_keeps_its_decays():
    """1 - 2^-9 would be 1 in bf16, and the state would never forget."""
    mixer = build_mixer({"type": "complex_lru", "num_blocks": 4, "shortest": 500.0, "longest": 512.0}, D)
    A = mixer.bfloat16().transitions(torch.zeros(1, 1, D, dtype=torch.bfloat16))
    assert A.dtype == torch.float32
    assert (torch.linalg.eigvals(A).abs() < 0.9999).all()


def test_pd_ssm_permutes():
    """Each column of A_t has one entry of size |d| < 1, at most; so columns of products do."""
    torch.manual_seed(0)
    mixer = build_mixer({"type": "pd_ssm", "num_blocks": 2, "states": 3}, D)
    torch.nn.init.normal_(mixer.select_proj.weight)
    A = mixer.transitions(torch.randn(1, 9, D))  # (1, 9, 2, 6, 6) of complex entries
    size = torch.complex(A[..., :3, :3], A[..., 3:, :3]).abs()
    assert ((size > 0).sum(dim=-2) == 1).all()
    assert (size.sum(dim=-2) < 1).all()
    assert size.argmax(dim=-2).flatten(0, 2).unique(dim=0).shape[0] > 3  # inputs choose
    torch.testing.assert_close(A[..., :3, :3], A[..., 3:, 3:])


def test_scaled_slice_is_bounded_and_plain_is_not():
    torch.manual_seed(0)
    x = 5 * torch.randn(1, 400, D)
    for scaled in (True, False):
        mixer = SLiCE(D, block_size=2, scaled=scaled)
        torch.nn.init.normal_(mixer.transition_proj.weight, std=0.3)
        _, state = mixer(x)
        assert (state.abs().max() < 1e3) == scaled


@pytest.mark.parametrize(
    ("type_", "name"), [("rg_lru", "gate_proj.bias"), ("rg_lru", "decay"), ("complex_lru", "nu")]
)
def test_a_decay_of_1_has_gradients(type_, name):
    """A gate that is closed, or a rate that rounds to 0: the slope of sqrt(1 - a^2) is infinite there."""
    mixer = build_mixer({"type": type_}, D)
    torch.nn.init.constant_(mixer.get_parameter(name), -120.0)
    mixer(torch.randn(1, 5, D))[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


@pytest.mark.parametrize(("spec", "message"), [
    ({"type": "complex_lru", "shortest": 8.0, "longest": 2.0}, "no range above 0"),
    ({"type": "rg_lru", "width": 0}, "width must be at least 1"),
    ({"type": "mlstm", "value_dim": 0}, "value_dim must be at least 1"),
    ({"type": "fixed_point", "iterations": 0}, "iterations must be at least 1"),
    ({"type": "slice", "block_size": 0}, "block_size must be at least 1"),
    ({"type": "m2rnn", "head_conv": 1}, "must reach at least 2 tokens"),
])  # fmt: skip
def test_mistakes(spec, message):
    with pytest.raises(ValueError, match=message):
        build_mixer(spec, D)
