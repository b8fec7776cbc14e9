"""Weights written in any way: the next step decodes with them. On a GPU through its CUDA graph."""

import copy
import os

import pytest
import torch
from small_models import close, plain, prefilled, small_model, tokens
from torch import nn

from lrnn_lm.model.decoding.decode import decode_step

DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def through_data(model):
    for p in model.parameters():
        p.data.mul_(1.5)


def other_data(model):
    for p in model.parameters():
        p.data = p.data * 1.5


def other_storage(model):
    with torch.no_grad():
        for p in model.parameters():
            p.set_((p * 1.5).detach())


def in_inference_mode(model):
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(1.5)


def foreach(model):
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.5)


def foreach_data(model):
    torch._foreach_mul_([p.data for p in model.parameters()], 1.5)


def an_optimizer(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), lr=0.2).step()


def scaled(model):
    return {name: 1.5 * tensor for name, tensor in model.state_dict().items()}


def loaded(model):
    model.load_state_dict(scaled(model))


def assigned(model):
    model.load_state_dict(scaled(model), assign=True)


def a_vector(model):
    weights = list(model.parameters())
    nn.utils.vector_to_parameters(1.5 * nn.utils.parameters_to_vector(weights), weights)


def modules_replaced(model):
    for block in model.model.layers:
        other = copy.deepcopy(block.mlp.up_proj)
        other.weight.data.mul_(1.5)
        block.mlp.up_proj = other


def one_projection_of_each(model):
    for block in model.model.layers:
        block.mixer.value_proj.weight.data.mul_(-1)


def biases(model):
    for block in model.model.layers:
        block.mixer.gate_proj.bias.data.add_(torch.randn_like(block.mixer.gate_proj.bias))


def another_gate(model):
    for block in model.model.layers:
        block.mixer.gate = "tanh"


def to_bf16(model):
    through_data(model)
    model.to(torch.bfloat16)


def merged(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["gate_proj", "value_proj"], init_lora_weights=False)
    assert peft.get_peft_model(model, config).merge_and_unload() is model


WRITES = [through_data, other_data, other_storage, in_inference_mode, foreach, foreach_data, an_optimizer,
          loaded, assigned, a_vector, modules_replaced, one_projection_of_each, biases, another_gate, to_bf16,
          merged]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_the_next_step_has_the_new_weights(write, device):
    pytest.importorskip("triton")
    model, ids = small_model("bd_lru", num_hidden_layers=1).to(device), tokens(rows=1, length=7).to(device)

    def by_step():
        cache = prefilled(model, ids[:, :6])
        return decode_step(model, cache, fused=True)(model, ids[:, 6:], cache).float().clone()

    def by_forward():
        return plain(model, ids[:, 6:], prefilled(model, ids[:, :6])).float()

    before = by_step()
    close(before, by_forward(), 1e-3)
    with torch.enable_grad():
        write(model)
    after = by_forward()
    assert (after - before).abs().max() > 0.05
    close(by_step(), after, 0.3 if write is to_bf16 else 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bd_lru", "h_lru", "lstm", "hybrid"])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("write", [through_data, other_data, in_inference_mode, one_projection_of_each])
def test_generate_on_a_gpu_has_the_new_weights(write, rows, name):
    """Fused for one row, the plain graph for nine in fp32."""
    if name in ("lstm", "hybrid") and write is one_projection_of_each:
        pytest.skip("not every layer has such a projection")
    model, ids = small_model(name).cuda(), tokens(rows=rows, length=6).cuda()
    texts = [model.generate(ids, **OPTIONS)]
    write(model)
    texts.append(model.generate(ids, **OPTIONS))
    assert torch.equal(texts[1], model.generate(ids, disable_compile=True, **OPTIONS))
    assert not torch.equal(*texts)
