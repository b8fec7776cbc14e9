"""The baselines through flash-linear-attention: fla's kernels against plain loops, state, documents, recipes.

Without fla only the messages can be tested. With it but without a GPU, Triton's interpreter runs fla's
kernels on tiny shapes. `test_fla_native.py` runs them on a GPU.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fla_cases import HALF_CHUNKS, KEEP, SPECS, TYPES, D, installed, make, model_of, near, noise, off
from fla_reference import interpreted_kernels, reference

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.mixers import MIXERS, SequenceContext, build_mixer, fla_layer, mixer_class
from lrnn_lm.mixers.fla_layer import FlaMixer
from lrnn_lm.model.accounting import account, check_parameters, training_memory
from lrnn_lm.recipe import load_recipe
from lrnn_lm.recipe.schema import ModelSection
from lrnn_lm.train.build import model_config

RECIPES = Path(__file__).parents[2] / "recipes" / "paper"
interpreted = pytest.fixture(interpreted_kernels)


# What can be said anywhere.


@pytest.mark.parametrize("kind", TYPES)
def test_without_fla_the_message_names_the_extra(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.layers", None)
    with pytest.raises(ValueError, match=r"flash-linear-attention.*pip install 'lrnn-lm\[baselines\]'"):
        build_mixer({"type": kind}, 64)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("deltanet", {"num_heads": 3}, "do not split into 3 heads"),
        ("deltanet", {"expand_k": 0.3}, "not a whole width"),
        ("deltanet", {"num_heads": 1, "expand_k": 16.0}, "at most, not 512"),
        ("gated_deltanet", {"head_dim": 5, "expand_v": 1.5}, "not a whole width"),
        ("gated_deltanet", {"head_dim": 512}, "at most, not 512"),
        ("gated_deltaproduct", {"num_householder": 0}, "num_householder must be at least 1"),
        ("gla", {"num_heads": 0}, "num_heads must be at least 1"),
        ("kda", {"head_dim": 512}, "at most, not 512"),
        ("hgrn2", {"head_dim": 12}, "hidden_size 32 does not split into heads of width 12"),
    ],
)
def test_sizes_that_do_not_fit(kind, options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer({"type": kind, **options}, D)


@pytest.mark.parametrize(
    "mixer",
    [
        {"type": "deltanet", "num_heads": 33},
        {"type": "gla", "expand_v": 0.3},
        {"type": "gated_deltanet", "head_dim": 5, "expand_v": 1.5},
        {"type": "gated_deltanet2", "head_dim": 5, "expand_v": 1.5},
        {"type": "rwkv7", "head_dim": 100},
    ],
)
def test_a_recipe_of_such_sizes_is_refused(mixer):
    with pytest.raises(ValueError, match="does not split"):
        ModelSection(mixer=mixer)


# What needs fla, but none of its kernels.


@installed
@pytest.mark.parametrize("kind", TYPES)
def test_recipes_build_on_meta_with_the_parameters_they_say(kind):
    recipe = load_recipe(RECIPES / f"{kind.replace('_', '-')}.yaml")
    config = model_config(recipe, recipe.model.vocab_size)
    assert recipe.model.parameters == pytest.approx(211_875_360, rel=0.005)
    check_parameters(config, recipe.model.parameters)


@installed
@pytest.mark.parametrize("name", SPECS)
def test_costs_and_estimates_need_no_gpu(name):
    config = LRNNConfig(hidden_size=D, num_hidden_layers=2, vocab_size=50, mixer=SPECS[name])
    costs = account(config, 128)
    H, K, V = make(name).head_shape
    assert costs.work.scan >= 2 * 5 * H * K * V
    assert costs.recurrent_state_bytes >= 2 * 4 * H * K * V
    short, long = (training_memory(config, 2, T).activations for T in (64, 128))
    assert long == pytest.approx(2 * short, rel=0.01)


@installed
@pytest.mark.parametrize("name", SPECS)
def test_initial_values(name):
    model = model_of(name)
    assert all(p.isfinite().all() for p in model.parameters())
    mixer = model.model.layers[0].mixer
    first = mixer.inner.get_submodule(f"{mixer.streams[0]}_proj")
    narrow = mixer.inner.o_proj.weight.std() / first.weight.std()
    assert narrow.item() == pytest.approx((2 * 2) ** -0.5, rel=0.2)
    matrices = {f"{n}.{k}" for n, m in mixer.named_modules() if isinstance(m, torch.nn.Linear)
                for k in ("weight", "bias")}  # fmt: skip
    drawn = mixer.initial_values(0.02)
    assert {n for n, _ in mixer.named_parameters()} - matrices <= set(drawn)
    assert all(value.shape == mixer.get_parameter(key).shape for key, value in drawn.items())


@installed
def test_rwkv7_starts_as_flas_first_layer():
    """But for its matrices, and for a scale of the norm that depends on the number of layers."""
    from fla.layers import RWKV7Attention

    fresh = RWKV7Attention(hidden_size=D, head_dim=16, layer_idx=0, num_hidden_layers=2)
    drawn = make("rwkv7").initial_values(0.02)
    for key in set(drawn) - {"inner.g_norm.weight"}:
        torch.testing.assert_close(drawn[key], fresh.get_parameter(key.removeprefix("inner.")))


@installed
@pytest.mark.parametrize("kind", TYPES)
def test_a_saved_model_loads(kind, tmp_path):
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    loaded = LRNNForCausalLM.from_pretrained(tmp_path)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


@installed
@pytest.mark.parametrize("kind", TYPES)
def test_on_a_cpu_the_message_is_plain(kind):
    with pytest.raises(ValueError, match=r"need a GPU .* 'cpu'"):
        make(kind)(noise(1, 3, D), None, KEEP)


@installed
@pytest.mark.parametrize("kind", HALF_CHUNKS)
def test_training_in_fp32_is_refused_where_the_kernels_cannot(kind, monkeypatch):
    monkeypatch.setattr(FlaMixer, "check_device", lambda self, device: None)
    with pytest.raises(ValueError, match=r"train\.precision=bf16"):
        make(kind).train()(noise(1, 3, D), None, KEEP)


@installed
def test_an_output_projection_that_is_never_called_is_refused(monkeypatch):
    """An adapter there would learn nothing and change nothing, without a word."""
    monkeypatch.setattr(FlaMixer, "check_device", lambda self, device: None)
    mixer = make("hgrn2")
    mixer.inner.o_proj.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="does not call the output projection"):
        mixer(noise(1, 3, D), None, KEEP)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("version", ["12.8", "13.0", "13.1", "14.0"])
@pytest.mark.parametrize("other", ["13.1", None])
def test_old_assemblers_are_refused_on_hopper(kind, version, other, monkeypatch):
    """Where they were wrong, and nowhere else; with the path of a newer one that Triton brings."""

    class Tools:
        ptxas = SimpleNamespace(version=version, path="/old")

        @property
        def ptxas_blackwell(self):
            if other is None:
                raise RuntimeError("Cannot find ptxas-blackwell")
            return SimpleNamespace(version=other, path="/new")

    found = {"device_name": "cuda", "IS_NVIDIA_HOPPER": True, "TRITON_ABOVE_3_4_0": True}
    utils = SimpleNamespace(**found, TRITON_ABOVE_3_7_1=True)
    monkeypatch.setitem(sys.modules, "fla.utils", utils)
    monkeypatch.setitem(sys.modules, "triton.knobs", SimpleNamespace(nvidia=Tools()))
    monkeypatch.setattr(fla_layer, "_newer_ptxas", fla_layer._newer_ptxas.__wrapped__)
    mixer = object.__new__(mixer_class(kind))  # without fla's layer
    torch.nn.Module.__init__(mixer)
    if kind in ("deltanet", "gated_deltanet", "gated_deltaproduct") and version in ("12.8", "13.0"):
        path = "/new" if other == "13.1" else "PATH/TO/ptxas"
        with pytest.raises(ValueError, match=f"{mixer.layer} .*ptxas {version} .*TRITON_PTXAS_PATH={path}$"):
            mixer.check_device(torch.device("cuda"))
        utils.IS_NVIDIA_HOPPER = False
    mixer.check_device(torch.device("cuda"))


@installed
@pytest.mark.parametrize(("std", "least", "most"), [(0.3, 0.15, 0.5), (0.1, 0.0, 0.08)])
def test_how_far_bf16_alone_moves_gradients_of_rwkv7(std, least, most):
    """Of plain loops: why the native test of its gradients has smaller weights than the others'."""
    found = []
    for mixed in (False, True):
        mixer, x = make("rwkv7", std=std), noise(2, 150, D).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y = torch.cat([reference(mixer, part) for part in x.split([90, 60], dim=1)], dim=1)
        (y.float() * noise(2, 150, D).flip(1)).sum().backward()
        found.append([x.grad, *(p.grad for p in mixer.parameters())])
    exact, rounded = found
    assert least < max(off(b, a) for a, b in zip(exact, rounded, strict=True)) < most


# fla's kernels in Triton's interpreter.


@pytest.mark.parametrize("T", [1, 5, 70])
@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_output_is_what_plain_loops_say(interpreted, name, T):
    mixer, x = make(name), noise(1 if T > 5 else 2, T, D)  # interpreted chunks take a second each
    near(mixer(x, None, KEEP)[0], reference(mixer, x), name)


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_plain_loops(interpreted, name):
    """Chunked kernels, in fp16 where they take no fp32: the interpreter's bf16 is no arithmetic."""
    whole = SPECS[name]["type"] not in HALF_CHUNKS
    dtype, tolerance = (torch.float32, 1e-3 if name == "rwkv7" else 1e-4) if whole else (torch.float16, 0.03)
    mixer, plain = make(name, dtype), make(name)
    x, weights = noise(1, 70, D), noise(1, 70, D).flip(1)
    ours, theirs = x.to(dtype, copy=True).requires_grad_(), x.clone().requires_grad_()
    (mixer(ours, None, KEEP)[0].float() * weights).sum().backward()
    (reference(plain, theirs) * weights).sum().backward()
    expected = {"x": theirs.grad, **{n: p.grad for n, p in plain.named_parameters()}}
    actual = {"x": ours.grad, **{n: p.grad for n, p in mixer.named_parameters()}}
    apart = {key: off(actual[key], value) for key, value in expected.items()}
    assert max(apart.values()) < tolerance, apart


@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_cached_continuation_is_the_full_pass(interpreted, name):
    mixer, x = make(name), noise(2, 72, D)
    full, last = mixer(x, None, KEEP)
    assert last.shape == (2, mixer.state_elements(72))
    assert last.dtype == torch.float32
    state, outputs = None, []
    for begin, end in ((0, 66), (66, 67), (67, 70), (70, 72)):
        before = None if state is None else state.clone()
        y, after = mixer(x[:, begin:end], state, KEEP)
        assert before is None or torch.equal(state, before), "a given state is not written to"
        outputs, state = [*outputs, y], after
    near(torch.cat(outputs, dim=1), full, name)
    near(state, last, name)


@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_packed_documents_are_separate_ones(interpreted, name):
    """Three rows: one goes on from a state and then starts a document, one starts anew, one only goes on."""
    mixer, T = make(name), 8
    x, (_, state) = noise(3, T, D), mixer(noise(3, 5, D), None, KEEP)
    reset = torch.zeros(3, T, dtype=torch.bool)
    reset[0, [3, 7]] = True
    reset[1, [0, 5]] = True
    y, last = mixer(x, state, SequenceContext(reset=reset))
    segments = [(0, 0, 3, True), (0, 3, 7, False), (0, 7, 8, False), (1, 0, 5, False), (1, 5, 8, False),
                (2, 0, 8, True)]  # fmt: skip
    for row, begin, end, goes_on in segments:
        given = state[row : row + 1] if goes_on else None
        alone, after = mixer(x[row : row + 1, begin:end], given, KEEP)
        torch.testing.assert_close(y[row : row + 1, begin:end], alone, atol=1e-5, rtol=1e-4)
        if end == T:
            torch.testing.assert_close(last[row : row + 1], after, atol=1e-5, rtol=1e-4)
    y_new, _ = mixer(x, None, SequenceContext(reset=reset, keep_state=False))
    torch.testing.assert_close(y_new[1], y[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TYPES)
def test_mixed_precision_with_documents(interpreted, name):
    """As in training: fp32 weights under autocast, packed documents, all gradients."""
    mixer, plain, x = make(name).train(), make(name), noise(1, 90, D)
    reset = torch.zeros(1, 90, dtype=torch.bool)
    reset[0, 65] = True
    with torch.autocast("cpu", torch.float16):
        y, last = mixer(x, None, SequenceContext(reset=reset))
        tail, alone = mixer(x[:, 65:], None, KEEP)
    expected = torch.cat([reference(plain, x[:, :65]), reference(plain, x[:, 65:])], dim=1)
    assert (y.float() - expected).norm() < 0.01 * expected.norm()
    assert (tail.float() - expected[:, 65:]).norm() < 0.01 * expected[:, 65:].norm()
    assert (last - alone).norm() < 0.01 * alone.norm()
    y.float().square().sum().backward()
    expected.square().sum().backward()
    for (key, ours), (_, theirs) in zip(mixer.named_parameters(), plain.named_parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 0.05 * theirs.grad.norm(), key


@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_mixed_precision_goes_on_from_a_state(interpreted, name):
    """Chunked kernels from a state, whose convolutions' part is kept in fp32 and given in half precision."""
    mixer, plain, x = make(name), make(name), noise(1, 140, D)
    with torch.autocast("cpu", torch.float16):
        _, state = mixer(x[:, :70], None, KEEP)
        y, _ = mixer(x[:, 70:], state, KEEP)
    expected = reference(plain, x)[:, 70:]
    assert state.dtype == torch.float32
    assert (y.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("kind", TYPES)
@torch.no_grad()
def test_left_padding_does_not_show(interpreted, kind):
    model = model_of(kind)
    ids = torch.arange(1, 9).view(2, 4)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(7) >= 3).long().expand(2, -1)
    out = model(padded, attention_mask=mask, use_cache=True)
    expected = model(ids, use_cache=True)
    torch.testing.assert_close(out.logits[:, 3:], expected.logits, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.recurrent_states[0], theirs.recurrent_states[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_generation_with_a_cache_is_that_without(interpreted, kind):
    model, ids = model_of(kind, layers=1), torch.arange(1, 4).view(1, 3)
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    assert torch.equal(
        model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options)
    )


@pytest.mark.parametrize("kind", TYPES)
@torch.no_grad()
def test_padding_and_documents_in_a_row_do_not_show(interpreted, kind):
    """On the right and inside, with positions that begin again: outputs and the state after."""
    model, ids = model_of(kind, layers=1), torch.arange(1, 9).view(1, 8)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 0]])
    positions = torch.tensor([[0, 1, 0, 2, 0, 0, 1, 0]])
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    before, after = model(ids[:, [0, 1, 3]]), model(ids[:, [4, 6]], use_cache=True)
    want = torch.cat([before.logits, after.logits], dim=1)
    torch.testing.assert_close(out.logits[mask.bool()], want[0], atol=1e-4, rtol=1e-4)
    state = out.past_key_values.layers[0].recurrent_states[0]
    expected = after.past_key_values.layers[0].recurrent_states[0]
    torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)


def test_the_table_names_every_type():
    assert set(TYPES) == {name for name, cls in MIXERS.items() if issubclass(cls, FlaMixer)}
    assert {spec["type"] for spec in SPECS.values()} == set(TYPES)
