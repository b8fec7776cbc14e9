"""A checkpoint as graphs, for where this package or PyTorch is not: `lrnn export --format FORMAT`.

    onnx            token.onnx, prefill.onnx and the weights of both, weights.bin; onnxruntime runs them
    executorch      model.pte with methods `token` and `prefill`, for one sequence; ExecuTorch runs it
    torch-export    token.pt2 and prefill.pt2; torch.export.load reads them
    FORMAT.json     tokens of a prefill, the shape of each layer's state, BOS and EOS

`token` takes one token of each sequence, `prefill` 16 at once, for prompts. Both take `input_ids` (B, T) and
`state_0`, `state_1`, .. of the layers, zeros before the first token, and return `logits` (B, T, V) and
`next_state_0`, ... The recurrence is written out step by step, so T is fixed; B is free but for ExecuTorch.
examples/onnx_generate.py runs those of ONNX.
"""

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import PreTrainedTokenizerBase

from ...kernels import written_out
from ...mixers import mixer_class
from ...mixers.base import Mixer, SequenceContext
from ...mixers.fla_layer import FlaMixer
from ...requirements import check_extra
from ..modeling import LRNNForCausalLM

Programs = dict[str, ExportedProgram]  # token and prefill


class _Steps(nn.Module):
    """The model with its states as inputs and outputs; a learnt initial state counts as zeros."""

    def __init__(self, model: LRNNForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        body, after = self.model.model, []
        x = body.embed_tokens(input_ids)
        for layer, state in zip(body.applied_layers, states, strict=True):
            learnt = layer.initial_state
            begins = None if learnt is None else learnt.view(1, *state.shape[1:])
            given = state if begins is None else state + begins
            x, (state,) = layer(x, SequenceContext(), carried=(given,))
            after.append(state if begins is None else state - begins)
        return self.model.lm_head(body.norm(x)), *after


def write_graphs(
    model: LRNNForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, format: str, prefill: int
) -> None:
    """Write the graphs of a model in fp32, and FORMAT.json, to a new folder (`runs.export.export_graphs`)."""
    modules, write = FORMATS[format]
    check_extra(format, *modules)
    for i, spec in enumerate(model.config.layer_mixers):
        if reason := _obstacle(mixer_class(spec["type"])):
            raise ValueError(f"layer {i} ({spec['type']}) cannot be exported as a graph: {reason}")
    folder.mkdir(parents=True)
    states = _empty_states(model)
    facts = {
        "prefill": prefill,
        "states": [list(state.shape[1:]) for state in states],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / f"{format}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    lengths, free = {"prefill": prefill, "token": 1}, format != "executorch"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporters, about their own future
        write({name: _program(model, states, tokens, free) for name, tokens in lengths.items()}, folder)


def _obstacle(mixer: type[Mixer]) -> str | None:
    """Why a type of mixer has no graph; None if it has one."""
    if mixer.layer_type != "linear_attention":
        return "its keys and values grow with the text"
    return "its kernels need a GPU" if issubclass(mixer, FlaMixer) else None


def _empty_states(model: LRNNForCausalLM) -> list[Tensor]:
    """(2, ..) each: zeros, as before the first token. Two sequences: an exporter takes 1 for a constant."""
    context, x = SequenceContext(keep_state=True), torch.zeros(2, 1, model.config.hidden_size)
    with torch.no_grad():
        return [torch.zeros_like(layer.mixer(x, None, context)[1]) for layer in model.model.applied_layers]


def _program(model: LRNNForCausalLM, states: list[Tensor], tokens: int, free: bool) -> ExportedProgram:
    """`tokens` steps of the model, for any number of sequences, or for one."""
    given = [torch.zeros(2, tokens, dtype=torch.long), *states]
    batch, shapes = torch.export.Dim("batch"), None
    if free:
        shapes = {"input_ids": {0: batch}, "states": tuple({0: batch} for _ in states)}
    else:
        given = [tensor[:1] for tensor in given]
    with written_out():
        return torch.export.export(_Steps(model), tuple(given), dynamic_shapes=shapes, strict=False)


def _write_onnx(programs: Programs, folder: Path) -> None:
    """Each graph in a file, and the weights that both have once, in weights.bin."""
    import onnx

    graphs = {name: _onnx_graph(program) for name, program in programs.items()}
    first, *others = graphs
    what = lambda weight: (weight.raw_data, weight.data_type, *weight.dims)  # noqa: E731
    contents = {weight.name: what(weight) for weight in graphs[first].graph.initializer}
    file = folder / f"{first}.onnx"
    onnx.save_model(graphs[first], file, save_as_external_data=True, location="weights.bin")
    saved = onnx.load(file, load_external_data=False).graph.initializer
    places = {contents[w.name]: w for w in saved if w.data_location == onnx.TensorProto.EXTERNAL}
    for name in others:
        for weight in graphs[name].graph.initializer:
            if place := places.get(what(weight)):
                called = weight.name  # folded constants have other names in another graph
                weight.CopyFrom(place)
                weight.name = called
        onnx.save_model(graphs[name], folder / f"{name}.onnx")


def _onnx_graph(program: ExportedProgram):
    """An onnx.ModelProto."""
    numbers = range(len(program.graph_signature.user_outputs) - 1)
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it names operators of torchvision that it skips
    try:
        return torch.onnx.export(
            program, dynamo=True, verbose=False,
            input_names=["input_ids", *(f"state_{i}" for i in numbers)],
            output_names=["logits", *(f"next_state_{i}" for i in numbers)],
        ).model_proto  # fmt: skip
    finally:
        logger.setLevel(before)


def _write_executorch(programs: Programs, folder: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()])
    (folder / "model.pte").write_bytes(lowered.to_executorch().buffer)


def _write_torch_export(programs: Programs, folder: Path) -> None:
    for name, program in programs.items():
        torch.export.save(program, folder / f"{name}.pt2")


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Programs, Path], None]]] = {
    "onnx": (("onnx", "onnxscript"), _write_onnx),
    "executorch": (("executorch",), _write_executorch),
    "torch-export": ((), _write_torch_export),
}  # the modules of the extra of that name, and what writes
