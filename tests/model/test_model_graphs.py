"""What is made of a model beside running it: exported and traced graphs, a step on a static cache."""

import pytest
import torch
from small_models import HYBRIDS, OF_EACH_KIND, close, shallow_model, small_model, tokens
from tolerances import TOLERANCE
from torch import Tensor
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig, StaticCache

# One of each code that a graph is made of, exported or, in a third of the time, traced: that of complex_lru,
# slice, min_gru and rg_lru is bd_lru-all's.
EXPORTED = ["bd_lru-all", "bd_matrix-erase", "h_lru", "attention-window", "lstm", "mamba2", "m2rnn", "hybrid"]
TRACED = [
    "mlstm",
    "fixed_point",
    "pd_ssm",
    "bd_gru",
    "bd_slstm",
    "attention-qk-norm",
    "hybrid-attention-first",
]
ROUNDING = TOLERANCE["other order of sums"]


def left_padded(rows: int, length: int) -> Tensor:
    """(rows, length) with more padding in each further row."""
    return (torch.arange(length) >= torch.arange(rows).unsqueeze(1)).long()


def padded(rows: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(rows, length), "attention_mask": left_padded(rows, length)}


def compare(graph, model, inputs: dict[str, Tensor]) -> None:
    """The graph's logits are the model's, but on padding."""
    want, got = model(**inputs, use_cache=False).logits, graph(**inputs)
    got = got if isinstance(got, Tensor) else got["logits"]
    inside = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
    close(got[inside], want[inside], ROUNDING)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "masked"),
    [*((name, True) for name in EXPORTED), *((name, False) for name in OF_EACH_KIND)],
)
def test_export(name, masked):
    """A graph made of one mask is right for another: with other padding, in the middle too, or without."""
    model = shallow_model(name)
    inputs = padded(2, 6)
    if not masked:
        del inputs["attention_mask"]
    graph = export(model, (), kwargs={**inputs, "use_cache": False}, strict=False).module()
    graph = lambda run=graph, **given: run(**given, use_cache=False)  # noqa: E731
    compare(graph, model, inputs)
    if masked:
        for mask in (torch.ones(2, 6), torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1]])):
            compare(graph, model, {**inputs, "attention_mask": mask.long()})


@torch.no_grad()
@pytest.mark.parametrize(("name", "masked"), [("attention-window", False), ("hybrid", True)])
def test_export_for_any_length(name, masked):
    """The hybrid is of bd_lru, attention and h_lru."""
    model = shallow_model(name)
    inputs = padded(2, 9) if masked else {"input_ids": tokens(2, 9)}
    sizes = {0: Dim("B", min=2, max=64), 1: Dim("T", min=2, max=4096)}
    shapes = {**dict.fromkeys(inputs, sizes), "use_cache": None}
    exported = export(model, (), kwargs={**inputs, "use_cache": False}, dynamic_shapes=shapes, strict=False)
    graph = lambda **given: exported.module()(**given, use_cache=False)  # noqa: E731
    for rows, length in ((2, 9), (3, 14), (5, 2)):
        other = padded(rows, length)
        compare(graph, model, other if masked else {"input_ids": other["input_ids"]})


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRACED)
def test_trace(name):
    """Traced without padding, used with it."""
    model = shallow_model(name)
    inputs = padded(2, 6)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits

    nothing = torch.ones_like(inputs["input_ids"])
    graph = torch.jit.trace(Logits(), (inputs["input_ids"], nothing), check_trace=False)
    compare(graph, model, inputs)


@pytest.mark.parametrize(("name", "dynamic"), [("attention", False), ("hybrid", None)])
def test_a_step_on_a_static_cache_is_one_graph(name, dynamic):
    """Of one shape at every token, with padding and without; the text is that of a growing cache."""
    torch.compiler.reset()
    model, inputs = shallow_model(name), padded(3, 7)
    shapes, graphs = set(), []

    def backend(graph, examples, **options):
        graphs.append(graph)

        def call(*given):
            shapes.add(tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in given))
            return graph(*given)

        return call

    config = CompileConfig(backend=backend, dynamic=dynamic, fullgraph=True)
    config._compile_all_devices = True
    options = {"max_new_tokens": 12, "do_sample": False}
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        got = model.generate(**given, cache_implementation="static", compile_config=config, **options)
        assert torch.equal(got, model.generate(**given, **options))
    assert len(graphs) == len(shapes) == 1


class Tape(TorchDispatchMode):
    """Records operations and repeats them on the same memory, as a CUDA graph; asking for a value fails."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default, "a value was asked for"
        made = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for operation, args, kwargs, made in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention", "bd_lru", "hybrid"])
def test_a_step_on_a_static_cache_can_be_recorded(name, monkeypatch):
    """As a CUDA graph of the caller's: no value is asked for, and what follows is that of a growing cache."""
    model, ids = small_model(name), tokens(2, 12)
    static = StaticCache(config=model.config, max_cache_len=16)
    for cut in (slice(0, 5), slice(5, 6)):  # the prompt, and a step to warm up
        model(ids[:, cut], past_key_values=static, use_cache=True)
    new, tape = ids[:, 6:7].clone(), Tape()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with tape:
        logits = model(new, past_key_values=static, use_cache=True).logits
    monkeypatch.undo()
    for t in range(6, 12):
        new.copy_(ids[:, t : t + 1])
        if t > 6:
            tape.replay()
        close(logits[:, -1], model(ids[:, : t + 1]).logits[:, -1], ROUNDING)


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention", "attention-window", *HYBRIDS])
@pytest.mark.parametrize("padding", [False, True])
def test_documents_in_a_static_cache(name, padding):
    """A step sees the last document alone, as on a growing cache, and none of the padding."""
    model, ids = small_model(name), tokens(2, 9)
    mask = left_padded(2, 9) if padding else torch.ones_like(ids)
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[0, 4] = reset[1, 6] = True
    caches = [StaticCache(config=model.config, max_cache_len=16), None]
    out = [model(ids, attention_mask=mask, reset=reset, past_key_values=c, use_cache=True) for c in caches]
    caches = [o.past_key_values for o in out]
    for token in (5, 7):
        new = torch.full((2, 1), token)
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        steps = []
        for cache in caches:
            inputs = model.prepare_inputs_for_generation(
                new, past_key_values=cache, attention_mask=mask, use_cache=True, is_first_iteration=False,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
            )  # fmt: skip
            steps.append(model(**inputs).logits)
        close(steps[0], steps[1], ROUNDING)
    alone = model(torch.cat([ids[:1, 4:], torch.tensor([[5, 7]])], dim=1)).logits[:, -1:]
    close(steps[0][:1], alone, ROUNDING)


def test_masks_by_kind_of_layer_are_refused_elsewhere():
    model, ids = small_model("hybrid"), tokens(2, 5)
    step = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    for mask in ({"full_attention": step}, {"full_attention": None, "linear_attention": None}, {}):
        with pytest.raises(ValueError, match="masks by kind of layer are for one token"):
            model(ids, attention_mask=mask)
