"""The Hugging Face shell: inputs, outputs, embeddings, initialisation, saving, loading, checkpointing."""

import math
import warnings
from functools import partial

import pytest
import torch
from small_models import (
    MIXER_ROWS,
    NAMES,
    OF_EACH_KIND,
    RECURRENT,
    VOCAB,
    close,
    in_turn,
    small_config,
    small_model,
    states,
    tokens,
)
from tolerances import TOLERANCE
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lrnn_lm import LRNNConfig, LRNNForCausalLM, LRNNModel
from lrnn_lm.mixers.base import ResidualOutput, initialise
from lrnn_lm.model.autoencoder import LRNNForReconstruction
from lrnn_lm.model.layers import RMSNorm

SAME = TOLERANCE["same numbers"]


def gradients(model, ids):
    """Without a cache, as in training: checkpointing drops it, and with one Mamba-2 sums in another order."""
    model.zero_grad()
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_gradients(name):
    model, ids = small_model(name), tokens()
    plain = gradients(model, ids)
    with warnings.catch_warnings():  # newer releases of transformers give it another name
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients(model, ids)
    for key, gradient in plain.items():
        assert gradient.abs().max() > 0, f"{key} has no gradient"
        close(checkpointed[key], gradient, SAME)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_pass_through_a_cache(name):
    model, ids = small_model(name).train(), tokens()
    whole = model(ids, use_cache=False).logits
    whole.square().mean().backward()
    want = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    first = model(ids[:, :9], use_cache=True)
    second = model(ids[:, 9:], past_key_values=first.past_key_values, use_cache=True)
    torch.cat([first.logits, second.logits], dim=1).square().mean().backward()
    for key, parameter in model.named_parameters():
        close(parameter.grad, want[key], TOLERANCE["gradient"] * want[key].abs().max().item())


@pytest.mark.parametrize(("name", "tied"), in_turn([False, True]))
def test_saved_and_loaded_model_is_the_same(name, tied, tmp_path):
    model, ids = small_model(name, tie_word_embeddings=tied), tokens()
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, LRNNForCausalLM)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(loaded.eval()(ids).logits, model(ids).logits, SAME)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.config.to_dict()["mixer"] == model.config.mixer
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LRNNConfig)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, LRNNModel)
    close(base.eval()(ids).last_hidden_state, model.model(ids).last_hidden_state, SAME)


@pytest.mark.parametrize("name", ["bd_lru-tanh", "bd_matrix", "bd_matrix-conv", "h_lru", "m2rnn", "bd_gru"])
def test_in_bf16_the_scan_adds_no_error_to_that_of_its_inputs(name):
    """Gradients are off by up to twice their norm, as layers amplify what bf16 rounds. The specification's,
    in the same layers, are off by the same."""

    def gradients(model, backend, ids):
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        model(ids, labels=ids).loss.backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])

    for seed in range(3):
        ids = tokens(seed=seed)
        exact = gradients(small_model(name).bfloat16().double(), "reference", ids)
        plain, fast = (gradients(small_model(name).bfloat16(), each, ids) for each in ("reference", "torch"))
        assert (fast - exact).norm() <= 1.1 * (plain - exact).norm() + 2e-3 * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_computes_in_bf16(name, tmp_path):
    """Loaded so, or one that is cast."""
    loaded, ids = small_model(name), tokens()
    want = loaded(ids).logits
    if name in OF_EACH_KIND:
        loaded.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    else:
        loaded.bfloat16()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert (loaded(ids).logits.float() - want).norm() < TOLERANCE["bf16"] * want.norm()
    assert loaded.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 23)
    if name in RECURRENT:
        cache = loaded(ids, use_cache=True).past_key_values
        assert {state.dtype for state in states(cache)} == {torch.float32}


def test_tied_embeddings_are_one_parameter():
    tied, untied = small_model("bd_lru", tie_word_embeddings=True), small_model("bd_lru")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == VOCAB * 16
    encoders = LRNNForReconstruction(tied.config), LRNNForReconstruction(untied.config)
    assert [each.lm_head.weight is each.model.embed_tokens.weight for each in encoders] == [True, False]


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_embeddings(tied):
    model, ids = small_model("bd_lru", tie_word_embeddings=tied), tokens()
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 11)
    assert model.config.vocab_size == VOCAB + 11
    after = model(ids).logits
    assert after.shape[-1] == VOCAB + 11
    close(after[..., :VOCAB], before, TOLERANCE["other order of sums"])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model(ids, labels=ids).loss.isfinite()


def test_embeddings_instead_of_ids():
    model, ids = small_model("hybrid"), tokens()
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits, SAME)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_logits_to_keep():
    model, ids = small_model("bd_lru"), tokens()
    full = model(ids).logits
    close(model(ids, logits_to_keep=3).logits, full[:, -3:], TOLERANCE["other order of sums"])
    chosen = torch.tensor([0, 7])
    close(model(ids, logits_to_keep=chosen).logits, full[:, chosen], TOLERANCE["other order of sums"])


def test_hidden_states():
    model, ids = small_model("hybrid"), tokens()
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    close(out.hidden_states[0], model.model.embed_tokens(ids), SAME)
    assert all(h.shape == (2, 21, 16) for h in out.hidden_states)
    assert model(ids).hidden_states is None


def test_cache_only_where_asked_for():
    model, ids = small_model("bd_lru"), tokens()
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    as_tuple = model(ids, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    close(as_tuple[0], model(ids).logits, SAME)


@pytest.mark.parametrize("name", MIXER_ROWS)
def test_initialisation_is_a_function_of_the_seed(name):
    first, second, other = [], [], []
    for seed, weights in ((3, first), (3, second), (4, other)):
        torch.manual_seed(seed)
        weights.extend(p.detach() for p in LRNNForCausalLM(small_config(name)).parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("name", MIXER_ROWS)
def test_initialisation_has_the_right_spread(name):
    torch.manual_seed(0)
    spec = {**MIXER_ROWS[name]} | ({"num_blocks": 40} if "num_blocks" in MIXER_ROWS[name] else {})
    model = LRNNForCausalLM(LRNNConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=8, intermediate_size=192,
        mixer=spec | ({"width": 64} if "width" in spec else {}),
    ))  # fmt: skip
    narrow = 0.02 / math.sqrt(2 * 8)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    own = {
        id(mixer.get_parameter(name))
        for mixer in (layer.mixer for layer in model.model.layers)
        for name in mixer.initial_values(0.02)
    }
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            if module.weight.numel() < 1000:  # too few to have a spread: the rates of bd_matrix
                continue
            expected = narrow if isinstance(module, ResidualOutput) else 0.02
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1), path
            assert isinstance(module, ResidualOutput) == path.endswith(("out_proj", "down_proj")), path
            assert module.bias is None or id(module.bias) in own or not module.bias.any(), path
        elif isinstance(module, torch.nn.RMSNorm):
            assert (module.weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MIXER_ROWS)
def test_initial_values_are_those_of_fp32_rounded(name, dtype):
    """As `from_config(dtype=..)` builds a model; computed in bf16, gates of long half-lives were infinite."""
    spec = dict(MIXER_ROWS[name])
    if spec["type"] in ("bd_lru", "bd_matrix") and "gate" not in spec:  # softmax
        spec["half_life"] = [2, 8192]

    def drawn(default: torch.dtype) -> list[torch.Tensor]:
        model = AutoModelForCausalLM.from_config(small_config(name, mixer=spec), dtype=default)
        assert {parameter.dtype for parameter in model.parameters()} == {default}
        model.to(torch.float32)
        mixer = model.model.layers[1].mixer.to(default)
        torch.manual_seed(1)
        torch.set_default_dtype(default)
        try:
            initialise(mixer)
        finally:
            torch.set_default_dtype(torch.float32)
        return [mixer.get_parameter(key) for key in mixer.initial_values(0.02)]

    for found, exact in zip(drawn(dtype), drawn(torch.float32), strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, exact.to(dtype))


def test_lstm_starts_with_an_open_forget_gate_and_orthogonal_recurrence():
    cell = LRNNForCausalLM(small_config("lstm")).model.layers[0].mixer.cell
    forget = slice(9, 18)
    assert (cell.bias_ih_l0[forget] == 1).all()
    assert cell.bias_ih_l0.sum() == 9
    assert not cell.bias_hh_l0.any()
    block = cell.weight_hh_l0[forget].detach()
    close(block @ block.t(), torch.eye(9), 1e-5)


def test_mamba2_starts_with_its_authors_step_sizes():
    mixer = LRNNForCausalLM(small_config("mamba2")).model.layers[0].mixer.inner
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert ((steps >= 0.0009) & (steps <= 0.11)).all()
    close(mixer.A_log.exp().detach(), torch.arange(1.0, 5.0), 1e-5)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", NAMES)
def test_builds_where_it_is_told(name, device):
    with torch.device(device):
        model = LRNNForCausalLM(small_config(name))
    assert all(p.device.type == device for p in model.parameters())


@pytest.mark.parametrize("without_numbers", [partial(torch.device, "meta"), FakeTensorMode])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_training_without_numbers(name, without_numbers):
    """For whoever counts its operations or its memory."""
    with without_numbers():
        model, ids = LRNNForCausalLM(small_config(name)), torch.zeros(2, 7, dtype=torch.long)
        assert model(ids).logits.shape == (2, 7, VOCAB)
        model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("stream", "weight", "result"), [
    (torch.bfloat16, torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32, torch.float32), (torch.float16, torch.float16, torch.float16),
])  # fmt: skip
def test_norms_of_another_dtype_than_the_stream(stream, weight, result):
    """What comes after a norm computes in the narrower of the two."""
    norm, x = RMSNorm(16).to(weight), torch.randn(3, 16).to(stream)
    assert norm(x).dtype == result
    want = torch.nn.functional.rms_norm(x.float(), (16,))
    torch.testing.assert_close(norm(x).float(), want, rtol=1e-2, atol=1e-2)


def test_norms_in_fp32_beside_a_model_in_bf16():
    model = small_model("bd_lru").to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.float()
    assert model(tokens()).logits.dtype == torch.bfloat16


def test_a_window_can_be_set_as_in_transformers():
    """Of all attention layers, and of none else; what no window can be is refused."""
    config = small_config("hybrid")
    config.sliding_window = 2
    assert [spec.get("window") for spec in config.layer_mixers] == [None, 2, None]
    assert config.layer_types[1] == "sliding_attention"
    assert LRNNForCausalLM(config).model.layers[1].mixer.window == 2
    config.sliding_window = None
    assert config.sliding_window is None
    recurrent = small_config("bd_lru")
    recurrent.sliding_window = 2
    assert recurrent.sliding_window is None
