"""What transformers' common tests ask of a model, where tests/model does not hold it yet."""

import pytest
import torch
from small_models import NAMES, close, shallow_model, small_model, tokens
from tolerances import TOLERANCE
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SUMS = TOLERANCE["other order of sums"]


def test_outputs_as_tuples():
    model, ids = small_model("bd_lru"), tokens()
    want = model(ids, labels=ids, output_hidden_states=True, use_cache=False)
    got = model(ids, labels=ids, output_hidden_states=True, use_cache=False, return_dict=False)
    assert [type(part) for part in got] == [torch.Tensor, torch.Tensor, tuple]
    close(got[0], want.loss, 0)
    close(got[1], want.logits, 0)
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


def test_the_class_is_known_by_name():
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["lrnn"] == "LRNNForCausalLM"


@pytest.mark.parametrize("name", ["attention", "hybrid", "hybrid-attention-first"])
def test_attention_weights(name):
    """Eager attention gives the same logits as SDPA's, and one matrix of weights an attention layer."""
    model, ids = small_model(name), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[1, 9] = True
    want = model(ids, attention_mask=mask, reset=reset).logits
    assert not model(ids, output_attentions=True).attentions
    model.set_attn_implementation("eager")
    got = model(ids, attention_mask=mask, reset=reset, output_attentions=True)
    close(got.logits[mask.bool()], want[mask.bool()], SUMS)
    heads = [spec["num_heads"] for spec in model.config.layer_mixers if spec["type"] == "attention"]
    assert [weights.shape for weights in got.attentions] == [(2, number, 21, 21) for number in heads]
    for weights in got.attentions:
        close(weights[1].sum(-1), torch.ones(weights.shape[1], 21), SUMS)
        assert weights[1, :, 9:, :9].max() == 0
        assert weights[0, :, 5:, :5].max() == 0


def test_attention_weights_while_generating():
    model, ids = small_model("hybrid"), tokens(length=6)
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("eager")
    got = model.generate(
        ids, max_new_tokens=4, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    assert torch.equal(got.sequences, want)
    assert [step[0].shape[-2:] for step in got.attentions] == [(6, 6), (1, 7), (1, 8), (1, 9)]


def test_one_graph():
    """torch.compile(fullgraph=True) of a step from a cache; without one it is in test_model_padding.py.

    A layer each of bd_lru, attention and h_lru; torch.compile does not trace torch.nn.LSTM.
    """
    torch.compiler.reset()
    model, ids = shallow_model("hybrid"), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        longer = torch.cat([ids, ids[:, :1]], dim=1)
        close(compiled(ids[:, :1], past_key_values=cache).logits, model(longer).logits[:, -1:], SUMS)


@pytest.mark.parametrize("name", ["bd_lru", "h_lru", "lstm", "hybrid", "mamba2"])
def test_shards_precisions_and_offload(name, tmp_path):
    model, ids = small_model(name), tokens()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    close(again(ids).logits, model(ids).logits, 0)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers.0": "cpu"}
    parts |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=parts, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        close(offloaded(ids).logits, model(ids).logits, SUMS)
        close(offloaded(ids, labels=ids).loss, model(ids, labels=ids).loss, SUMS)
        want = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(offloaded.generate(ids, max_new_tokens=3, do_sample=False), want)


@pytest.mark.parametrize("name", NAMES)
def test_every_module_with_weights_is_called(name):
    """None has its weights read past it: what offloads or adapts it acts when it is called."""
    model, called = small_model(name).train(), set()
    holders = {key for key, each in model.named_modules() if [*each.parameters(recurse=False)]}
    for key in holders:
        model.get_submodule(key).register_forward_hook(lambda *_, key=key: called.add(key))
    model(tokens(length=3), labels=tokens(length=3))
    assert holders == called


@pytest.mark.parametrize("name", ["bd_lru", "h_lru", "lstm", "hybrid"])
def test_missing_weights_start_as_a_seed_says(name, tmp_path):
    """What a checkpoint lacks is initialised when it is loaded: a function of the seed, as in a new model."""
    from safetensors.torch import load_file, save_file

    small_model(name).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in weights.items() if ".layers.1." not in key}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = []
    for _ in range(2):
        torch.manual_seed(3)
        loaded.append(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())
    for key, value in loaded[0].items():
        assert value.isfinite().all()
        assert torch.equal(value, loaded[1][key]), key
        if key in kept:
            assert torch.equal(value, kept[key])
