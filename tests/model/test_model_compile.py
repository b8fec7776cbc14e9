"""Blocks under torch.compile: one graph for all layers, without a break, that computes the same."""

import pytest
import torch
from small_models import MIXER_ROWS, close, small_model, tokens
from tolerances import TOLERANCE
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from lrnn_lm.mixers import SequenceContext
from lrnn_lm.mixers.base import is_exported
from lrnn_lm.model import modeling

SUMS, GRADIENT = TOLERANCE["other order of sums"], TOLERANCE["gradient"]
WHOLE = ["bd_lru", "bd_matrix-erase", "h_lru", "attention"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def losses_and_gradients(model, ids, reset):
    model.zero_grad()
    loss = model(ids, shift_labels=ids, reset=reset, return_logits=False, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "documents"), [*((name, True) for name in WHOLE), ("attention", False)])
def test_one_graph_for_all_blocks(name, documents):
    torch.compiler.reset()
    model, ids = small_model(name, num_hidden_layers=2).train(), tokens(length=17)
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[0, 5] = True
    reset = reset if documents else None
    want, expected = losses_and_gradients(model, ids, reset)
    graphs = CompileCounterWithBackend("aot_eager")
    for block in model.model.layers:
        block.compile(backend=graphs, fullgraph=True, dynamic=False)
    got, gradients = losses_and_gradients(model, ids, reset)
    assert graphs.frame_count == 1
    close(got, want, SUMS)
    for key, gradient in gradients.items():
        assert (gradient - expected[key]).abs().max() <= GRADIENT * expected[key].abs().max(), key


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_attention_by_blocks_is_one_graph(monkeypatch):
    """As on a GPU, where packed rows of any documents take the same graph; and the numbers are a mask's."""
    torch.compiler.reset()
    model, ids = small_model("attention-window", num_hidden_layers=1).train(), tokens(length=150)
    resets = [torch.rand(ids.shape, generator=torch.Generator().manual_seed(i)) < 0.1 * i for i in (0, 2)]
    want = [losses_and_gradients(model, ids, reset) for reset in resets]
    monkeypatch.setattr(modeling, "takes_blocks", lambda x, head_dim: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *inputs: None)  # no gradients on a CPU
    graphs = CompileCounterWithBackend("aot_eager")
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[1]))
        block.compile(backend=graphs, fullgraph=True, dynamic=False)
    for reset, (loss, expected) in zip(resets, want, strict=True):
        contexts: list[SequenceContext] = []
        got, gradients = losses_and_gradients(model, ids, reset)
        assert isinstance(contexts[0].window_mask, flex_attention.BlockMask)
        close(got, loss, SUMS)
        for key, gradient in gradients.items():
            assert (gradient - expected[key]).abs().max() <= GRADIENT * expected[key].abs().max(), key
    assert graphs.frame_count == 1
    with torch.no_grad():  # a prompt is no reason to compile
        model(ids, use_cache=True)
    assert not isinstance(contexts[-1].window_mask, flex_attention.BlockMask)


def test_compiled_training_is_no_export():
    """torch 2.11's own `is_exporting` says yes in all compiled code: training ran as exported graphs do."""

    class Told(torch.nn.Module):
        def forward(self, x):
            return x * 2 if is_exported() else x + 1

    assert torch.compile(Told(), backend="eager")(torch.zeros(1)) == 1 == Told()(torch.zeros(1))
    for strict in (True, False):
        assert torch.export.export(Told(), (torch.ones(1),), strict=strict).module()(torch.zeros(1)) == 0


def test_a_swiglu_is_one_product_when_compiled():
    """Forward one product for gate and up; the same numbers, and gradients for the weights by name."""
    torch.compiler.reset()
    mlp = small_model("bd_lru").model.layers[0].mlp.train()
    graphs: list[torch.fx.GraphModule] = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(2, 3, 16)
    got = torch.compile(mlp, backend=look, fullgraph=True)(x)
    close(got, mlp(x), SUMS)
    (graph,) = graphs
    products = [node for node in graph.graph.nodes if node.target is torch._C._nn.linear]
    assert len(products) == 2
    got.sum().backward()
    assert set(dict(mlp.named_parameters())) == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    assert all(p.grad is not None for p in mlp.parameters())


@pytest.mark.parametrize("name", ["bd_lru", "h_lru"])
def test_the_triton_scans_compile_whole(name):
    pytest.importorskip("triton")
    model, ids = small_model(name, num_hidden_layers=1).train().to(DEVICE), tokens(length=9).to(DEVICE)
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[1, 4] = True
    want = float(model(ids, labels=ids, reset=reset, use_cache=False).loss.detach())
    for block in model.model.layers:
        block.mixer.backend = "triton"
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    loss = model(ids, labels=ids, reset=reset, use_cache=False).loss
    loss.backward()
    assert abs(float(loss.detach()) - want) < 1e-4


def test_attention_without_documents_has_no_mask():
    """One document a row is SDPA's causal case, which flash attention takes; packed documents have a mask."""
    model, ids = small_model("attention").train(), tokens()
    seen: list[SequenceContext] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model(ids, use_cache=False)
    assert all(context.attention_mask is None for context in seen)
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[0, 3] = True
    model(ids, reset=reset, use_cache=False)
    assert seen[-1].attention_mask is not None
    assert set(MIXER_ROWS) >= set(WHOLE)
