"""The matrix-valued BD-LRU as a mixer: what the tests of every mixer (tests/model) do not ask."""

import pytest
import torch
from torch.nn import functional

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.mixers import SequenceContext, bd_matrix, build_mixer
from lrnn_lm.mixers.bd_matrix import HALF_LIFE

SPEC = {"type": "bd_matrix", "num_heads": 2, "head_dim": 8, "value_dim": 4, "block_size": 4}
ERASES = SPEC | {"keys": True, "erase": True}


def made(spec, hidden_size=16):
    """A mixer with the initial values of its own and gates that vary."""
    torch.manual_seed(0)
    mixer = build_mixer(spec, hidden_size)
    with torch.no_grad():
        for name, value in mixer.initial_values(0.02).items():
            mixer.get_parameter(name).copy_(value)
    return mixer


@pytest.mark.parametrize("gate", ["softmax", "tanh"])
@torch.no_grad()
def test_the_state_goes_through_the_reported_transitions(gate):
    """Without values, every column of S_T is A_T .. A_1 of that of S_0."""
    mixer = made(SPEC | {"gate": gate})
    mixer.value_proj.weight.zero_()
    x, S = torch.randn(3, 7, 16), torch.randn(3, 2, 8, 4)
    _, last = mixer(x, S, SequenceContext())
    blocks = S.flatten(1, 2).unflatten(1, (-1, 4))  # (B, H K / M, M, V)
    for A in mixer.transitions(x).unbind(1):
        blocks = A @ blocks
    torch.testing.assert_close(last, blocks.flatten(1, 2).unflatten(1, (2, 8)))


@pytest.mark.parametrize("gate", ["softmax", "silu", "tanh", "sigmoid"])
@torch.no_grad()
def test_the_state_is_bounded_by_the_values(gate):
    """Prop. 1: no number of a column of S exceeds the largest value that the column has seen."""
    mixer = made(SPEC | {"gate": gate, "half_life": None})
    mixer.gate_proj.weight.normal_(std=2.0)
    x = 3 * torch.randn(4, 200, 16)
    _, S = mixer(x, None, SequenceContext())
    most = mixer.value_proj(x).abs().amax(dim=1).unflatten(-1, (2, 4))  # (B, H, V)
    assert (S.abs().amax(dim=2) <= most * (1 + 1e-5)).all()
    assert (mixer.transitions(x).abs().sum(-1) <= 1 + 1e-5).all()


@pytest.mark.parametrize("block_size", [1, 2, 4])
@torch.no_grad()
def test_half_lives_at_the_start_span_the_range_in_every_head(block_size):
    mixer = made(SPEC | {"block_size": block_size})
    A = mixer.transitions(torch.zeros(1, 1, 16))[0, 0]  # (H K / M, M, M)
    lives = (-1 / A.diagonal(dim1=1, dim2=2).log2()).flatten().view(2, 8)
    torch.testing.assert_close(lives[0], lives[1])
    torch.testing.assert_close(lives[0, [0, -1]], torch.tensor(HALF_LIFE), rtol=1e-3, atol=0)
    mixed = A.sum(-1) - A.diagonal(dim1=1, dim2=2)
    assert (mixed <= 0.021 * (1 - A.diagonal(dim1=1, dim2=2))).all()


@torch.no_grad()
def test_a_probe_forces_its_transitions_to_their_diagonal():
    mixer, x = made(SPEC), torch.randn(2, 5, 16)
    A = mixer.transitions(x)
    mixer.diagonal_only = True
    torch.testing.assert_close(mixer.transitions(x), A * torch.eye(4))
    mixer.diagonal_only, gates = False, mixer.gate_proj(x)
    writes = mixer._coefficients(gates)[1]
    mixer.diagonal_only = True
    assert torch.equal(mixer._coefficients(gates)[1], writes)
    assert mixer.planes() == {"gate_proj.weight": 5}  # of block_size 4: its gates, and the write's


@pytest.mark.parametrize(
    "change", [{"output_gate": False}, {"head_norm": False}, {"value_dim": None}, {"keys": True}], ids=str
)
def test_options_change_the_output_and_their_parameters(change):
    plain, other, x = made(SPEC), made(SPEC | change), torch.randn(2, 5, 16)
    names = {name for name, _ in plain.named_parameters()} ^ {name for name, _ in other.named_parameters()}
    own = {"output_gate": "output_gate_proj.weight", "head_norm": "norm_weight", "keys": "key_proj.weight"}
    assert names == {own[option] for option in change if option in own}
    y, state = other(x, None, SequenceContext())
    assert state.shape == (2, 2, 8, 8 if "value_dim" in change else 4)
    assert other.state_elements(9) == state[0].numel()
    assert not torch.allclose(y, plain(x, None, SequenceContext())[0])


def test_work_by_hand():
    """2 heads of 8 x 4: a number takes 5 multiply-adds and one to be read, a gate 3 operations."""
    assert build_mixer(SPEC, 16).cost(100).scan == 2 * 8 * 4 * 6 * 2 + 2 * 8 * 5 * 3
    assert build_mixer(ERASES, 16).cost(100).scan == 2 * 8 * 4 * 7 * 2 + 2 * 8 * 5 * 3


def test_a_write_replaces_what_the_state_holds_at_its_key():
    """Without forgetting and at rate 1 a key gives the value last written under it, whatever was before."""
    mixer = made(ERASES | {"output_gate": False, "head_norm": False, "value_dim": 16})
    with torch.no_grad():
        mixer.gate_proj.weight.zero_()
        planes = mixer.gate_proj.bias.view(5, 2, 8)
        planes.fill_(-60.0)  # A_t = identity: each row keeps its own slot alone
        for slot in range(8):
            planes[slot % 4, :, slot] = 60.0
        mixer.rate_proj.weight.zero_()
        mixer.rate_proj.bias.fill_(60.0)
        mixer.query_proj.weight.copy_(mixer.key_proj.weight)
        mixer.out_proj.weight.copy_(torch.cat([torch.eye(16), torch.zeros(16, 16)], dim=1))  # of head 0
        a, b = torch.randn(2, 16)
        x = torch.stack([a, b, b, a, a])[None]
        y, _ = mixer(x, None, SequenceContext())
        size = mixer.key_proj(a)[:8].norm()
        torch.testing.assert_close(y[0, -1] / size, mixer.value_proj(a)[:16], rtol=1e-3, atol=1e-4)


def test_heads_convolve_their_streams():
    """A new convolution is the identity; keys that start shifted are the queries of the tokens before, in a
    second head those of one token in half of the slots, and of another in the rest."""
    mixer, x = made(ERASES | {"head_conv": 3, "shift_keys": 2}), torch.randn(2, 5, 16)
    with torch.device("meta"):  # whatever device is the default
        taps = mixer.initial_values(0.02)["head_conv.weight"]
    assert torch.equal(taps, mixer.head_conv.weight)
    y, state = mixer(x, None, SequenceContext())
    assert state.shape == (2, mixer.state_elements(9)) == (2, 2 * 8 * 4 + 2 * 2 * (4 + 8 + 8))
    projected = [p(x) for p in mixer.joint_projections()[1:]]
    torch.testing.assert_close(state[:, -40:], torch.cat(projected[:3], dim=-1)[:, -1])
    values, queries, keys, *rest = mixer._convolved(projected, None, None)[0]
    assert torch.equal(values, functional.silu(projected[0]))
    own = functional.silu(projected[1]).unflatten(-1, (2, 8))  # of two heads
    queries, keys = (stream.unflatten(-1, (2, 8)) for stream in (queries, keys))
    for head, slots, lag in ((0, slice(0, 8), 0), (1, slice(0, 4), 0), (1, slice(4, 8), 1)):
        of = own[:, :, head, slots]
        torch.testing.assert_close(queries[:, 2:, head, slots], of[:, 2 - lag : 5 - lag])
        torch.testing.assert_close(keys[:, 2:, head, slots], of[:, 1 - lag : 4 - lag])
    assert all(a is b for a, b in zip(rest, projected[3:], strict=True))
    with torch.no_grad():
        mixer.head_conv.weight.zero_()  # keys are those of their own token again
    assert not torch.allclose(mixer(x, None, SequenceContext())[0], y)


def test_one_convolution_at_most():
    with pytest.raises(ValueError, match="set one of them"):
        build_mixer(SPEC | {"short_conv": 3, "head_conv": 3}, 16)


def test_shifted_keys_need_keys_and_their_convolution():
    for missing in ({"head_conv": 3}, {"keys": True}, {"head_conv": 2, "keys": True}):
        with pytest.raises(ValueError, match="set keys: true and head_conv above 2"):
            build_mixer(SPEC | {"shift_keys": 2} | missing, 16)


def test_erasing_needs_keys():
    with pytest.raises(ValueError, match="erase needs keys"):
        build_mixer(SPEC | {"erase": True}, 16)


def test_triton_erases_as_the_reference():
    """Outputs, states and all gradients, from a state and with documents; and nothing is left of padding."""
    pytest.importorskip("triton")
    x, reset = torch.randn(2, 19, 16), torch.rand(2, 19) < 0.2
    got = {}
    for backend in ("triton", "reference"):
        mixer = made(ERASES)
        mixer.backend = backend
        given, state = x.clone().requires_grad_(), torch.ones(2, 2, 8, 4).requires_grad_()
        y, last = mixer(given, state, SequenceContext(reset=reset))
        inputs = [given, state, *mixer.parameters()]
        got[backend] = [y, last, *torch.autograd.grad(y.square().sum() + last.square().sum(), inputs)]
    for a, b in zip(got["triton"], got["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("documents", [False, True])
def test_a_step_after_a_state_is_a_step_of_the_pass(documents):
    """Token by token, with the Triton scan before and without."""
    pytest.importorskip("triton")
    mixer, x = made(SPEC), torch.randn(2, 19, 16)
    reset = (torch.rand(2, 19) < 0.2) if documents else None
    mixer.backend = "triton"
    whole, _ = mixer(x, None, SequenceContext(reset=reset))
    state, parts = None, []
    for start, stop in ((0, 17), (17, 18), (18, 19)):
        part = None if reset is None else reset[:, start:stop]
        y, state = mixer(x[:, start:stop], state, SequenceContext(reset=part))
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_outputs_below_the_norms_epsilon_stay_small(monkeypatch):
    mixer, x = made(SPEC | {"output_gate": False}), torch.randn(2, 5, 16)
    mixer.value_proj.weight.mul_(1e-3)
    scan, got = bd_matrix.matrix_scan, []
    monkeypatch.setattr(bd_matrix, "matrix_scan", lambda *args: got.append(scan(*args)) or got[0])
    y, _ = mixer(x, None, SequenceContext())
    size = (got[0][0].square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(y, mixer.out_proj((got[0][0] / size * mixer.norm_weight).flatten(2)))


@pytest.mark.parametrize("spec", [SPEC, ERASES], ids=["adds", "erases"])
def test_gates_and_keys_stay_in_fp32_under_autocast(spec, monkeypatch):
    """A half-life of 512 is a rate of 0.9986, which bf16 does not have."""
    mixer, x = made(spec), torch.randn(2, 5, 16)
    scan, given = bd_matrix.matrix_scan, []
    monkeypatch.setattr(bd_matrix, "matrix_scan", lambda *args: given.extend(args) or scan(*args))
    with torch.autocast("cpu", torch.bfloat16):
        A, k = mixer._coefficients(mixer.gate_proj(x))
        projected = mixer.key_proj(x) if spec is ERASES else None
        y, state = mixer(x, None, SequenceContext())
    assert A.dtype == k.dtype == state.dtype == torch.float32
    assert all(given[i].dtype == torch.float32 for i in (0, 1, -1) if given[i] is not None)
    if spec is ERASES:  # normalised in fp32: bf16 misses this by 1e-3
        keys = projected.float().unflatten(-1, (2, 8))
        close = functional.rms_norm(keys, (8,), eps=1e-6) * 8**-0.5
        torch.testing.assert_close(given[-1], close, rtol=0, atol=1e-5)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(("change", "message"), [
    ({"block_size": 3}, "head_dim 8 does not split into blocks of block_size 3"),
    ({"half_life": [4, 2]}, "half_life is"),
    ({"half_life": [2, 4], "gate": "tanh"}, "half_life needs a gate"),
    ({"value_dim": 0}, "value_dim must be at least 1"),
    ({"gate": "softmaxx"}, "unknown gate"),
])  # fmt: skip
def test_mistakes_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        LRNNForCausalLM(LRNNConfig(vocab_size=11, hidden_size=16, num_hidden_layers=1, mixer=SPEC | change))
