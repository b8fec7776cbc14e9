"""Code that was put in the place of a module's own is run by `generate`, for every token."""

import types
from itertools import product

import pytest
import torch
import torch.nn.utils.prune
from small_models import small_model, tokens
from torch import nn
from transformers import GenerationMixin

from lrnn_lm import LRNNForCausalLM
from lrnn_lm.model.decoding.built import as_written
from lrnn_lm.model.decoding.decode import can_decode

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
PLACES = {
    "model": "",
    "body": "model",
    "block": "model.layers.1",
    "mixer": "model.layers.1.mixer",
    "mlp": "model.layers.0.mlp",
    "norm": "model.layers.2.mixer_norm",
    "projection": "model.layers.2.mlp.down_proj",
    "embedding": "model.embed_tokens",
    "head": "lm_head",
}


def counting(calls, forward):
    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    return counted


def on_the_instance(module, calls, monkeypatch):
    monkeypatch.setattr(module, "forward", counting(calls, module.forward), raising=False)


def bound_to_the_instance(module, calls, monkeypatch):
    own = type(module).forward
    module.forward = types.MethodType(counting(calls, own), module)


def on_the_class(module, calls, monkeypatch):
    own = type(module).forward
    counted = counting(calls, lambda self, *args, **kwargs: own(self, *args, **kwargs))
    monkeypatch.setattr(type(module), "forward", lambda self, *args, **kwargs: counted(self, *args, **kwargs))


def of_a_subclass(module, calls, monkeypatch):
    own = type(module).forward
    namespace = {"forward": lambda self, *args, **kwargs: counting(calls, own)(self, *args, **kwargs)}
    module.__class__ = type(type(module).__name__, (type(module),), namespace)


def by_a_hook(module, calls, monkeypatch):
    module.register_forward_hook(lambda *_: calls.append(1))


def by_a_hook_before(module, calls, monkeypatch):
    module.register_forward_pre_hook(lambda *_: calls.append(1))


def by_compiling(module, calls, monkeypatch):
    def backend(graph, example_inputs):
        return counting(calls, graph.forward)

    torch.compiler.reset()
    module.compile(backend=backend)


def by_compiling_forward(module, calls, monkeypatch):
    def backend(graph, example_inputs):
        return counting(calls, graph.forward)

    torch.compiler.reset()
    module.forward = torch.compile(module.forward, backend=backend)


# A place is found in the same way whatever was put there; compiling takes seconds.
ELSEWHERE = ["model", "mixer", "projection"]
WAYS = {
    on_the_instance: PLACES,
    on_the_class: PLACES,
    **dict.fromkeys((bound_to_the_instance, of_a_subclass, by_a_hook, by_a_hook_before), ELSEWHERE),
    by_compiling: ["mixer", "projection"],
    by_compiling_forward: ["norm"],
}


@pytest.mark.parametrize(("way", "place"), [(way, place) for way, places in WAYS.items() for place in places])
def test_a_replaced_forward_is_called_for_every_token(way, place, monkeypatch):
    model, ids, calls = small_model("bd_lru"), tokens(length=5), []
    want = model.generate(ids, **OPTIONS)
    assert can_decode(model)
    way(model.get_submodule(PLACES[place]), calls, monkeypatch)
    assert not can_decode(model)
    assert torch.equal(model.generate(ids, **OPTIONS), want)
    if way is not by_compiling or place not in ("projection", "embedding", "head"):  # torch skips its own
        assert len(calls) >= 6


STEP = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


@pytest.mark.parametrize(
    ("owner", "name"), [*product((LRNNForCausalLM, GenerationMixin), STEP), (nn.Module, "_call_impl")]
)
def test_what_else_a_token_runs(owner, name, monkeypatch):
    """Replaced on a class: what transformers' loop calls beside the model, and what a module's call runs."""
    model, ids, calls, own = small_model("bd_lru"), tokens(length=5), [], getattr(owner, name)
    want = model.generate(ids, **OPTIONS)

    def counted(self, *args, **kwargs):
        calls.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    assert not can_decode(model)
    assert torch.equal(model.generate(ids, **OPTIONS), want)
    assert calls.count(model) == 6
    monkeypatch.undo()
    assert can_decode(model)


def by_pruning(module, calls, monkeypatch):
    nn.utils.prune.identity(module, "weight")  # the hook makes the weight of this and a mask


@pytest.mark.parametrize(
    "way", [on_the_instance, bound_to_the_instance, of_a_subclass, by_a_hook, by_a_hook_before, by_pruning]
)
@pytest.mark.parametrize("name", ["bd_lru", "h_lru"])
def test_every_projection_that_was_changed_is_called_for_a_loss(name, way, monkeypatch):
    """In training too, where the head's loss is in chunks and H-LRU has a product of its own."""
    model, same, ids = small_model(name).train(), small_model(name).train(), tokens()
    projections = [m for m in model.modules() if isinstance(m, nn.Linear)]
    calls = []
    for module in projections:
        way(module, calls, monkeypatch)
    with torch.no_grad():  # a weight that was kept from before is another one now
        for module in projections:
            (module.weight_orig if way is by_pruning else module.weight).mul_(1.5)
        for module in (m for m in same.modules() if isinstance(m, nn.Linear)):
            module.weight.mul_(1.5)
    loss, want = (m(ids, labels=ids).loss for m in (model, same))
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    assert way is by_pruning or len(calls) == len(projections)
    loss.backward()


def test_another_result_shows_in_the_text():
    model, ids = small_model("bd_lru"), tokens(length=5)
    forward = model.forward

    def always_five(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits[..., 5] = 1e4
        return out

    model.forward = always_five
    assert (model.generate(ids, **OPTIONS)[:, 5:] == 5).all()
    model.forward = forward  # the class's own again, though it lies on the instance
    assert can_decode(model)
    assert not (model.generate(ids, **OPTIONS)[:, 5:] == 5).all()


def test_hooks_of_all_modules():
    model, ids, calls = small_model("bd_lru"), tokens(length=5), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        model.generate(ids, **OPTIONS)
    finally:
        handle.remove()
    assert calls.count(model) == 6
    assert as_written(model)


@pytest.mark.parametrize("wrap", [nn.Sequential, torch.compile])
def test_a_module_in_the_place_of_another(wrap):
    ids = tokens(length=5)
    for place in ("model.norm", "lm_head", "model.embed_tokens", "model.layers.1.mlp"):
        model = small_model("bd_lru")
        want = model.generate(ids, **OPTIONS)
        parent, _, name = place.rpartition(".")
        options = {"backend": "eager"} if wrap is torch.compile else {}
        setattr(model.get_submodule(parent), name, wrap(model.get_submodule(place), **options))
        assert torch.equal(model.generate(ids, **OPTIONS), want)


@pytest.mark.parametrize("name", ["bd_gru", "attention-grouped", "attention-window", "hybrid"])
def test_a_mixer_inside_of_another_module(name):
    """Masks and documents reach attention by its kind: a wrapper, as torch.compile's, is of another class."""
    torch.compiler.reset()
    model, ids = small_model(name), tokens(length=9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    documents = {"seq_idx": (torch.arange(9) >= 5).long().expand(2, 9)}

    def found() -> list[torch.Tensor]:
        text = model.generate(ids, attention_mask=mask, **OPTIONS)
        return [model(ids, attention_mask=mask).logits[mask.bool()], model(ids, **documents).logits, text]

    with torch.no_grad():
        want = found()
        for block in model.model.layers:
            block.mixer = torch.compile(block.mixer, backend="eager")
        for got, its in zip(found(), want, strict=True):
            torch.testing.assert_close(got, its, rtol=0, atol=1e-5)


def test_a_compiled_model_writes_the_same():
    torch.compiler.reset()
    model, ids = small_model("bd_lru"), tokens(length=5)
    want = model.generate(ids, **OPTIONS)
    assert torch.equal(torch.compile(model, backend="eager").generate(ids, **OPTIONS), want)


def test_inputs_of_every_token_are_seen_by_who_exports():
    """transformers exports generation from the inputs that `forward` gets, of the prefill and of a token."""
    exporters = pytest.importorskip("transformers.exporters.utils")
    model, ids = small_model("bd_lru"), tokens(length=5)
    parts = exporters.decompose_for_generation(model, {"input_ids": ids})
    assert any("decode" in name for name in parts)


@pytest.mark.parametrize("training", [False, True])
def test_a_head_with_a_bias(training):
    """As of a converted model: the loss in chunks is that of the logits."""
    model, ids = small_model("bd_lru").train(training), tokens()
    model.lm_head.bias = nn.Parameter(torch.randn(model.config.vocab_size))
    out = model(ids, labels=ids, use_cache=False, return_logits=True)
    want = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-5)
