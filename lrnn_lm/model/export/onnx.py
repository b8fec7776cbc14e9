"""A checkpoint as ONNX graphs, for where PyTorch is not: `lrnn export CHECKPOINT DIR --format onnx`.

    token.onnx      one token of each sequence
    prefill.onnx    16 tokens at once, for prompts; both read their weights from weights.bin
    onnx.json       tokens of prefill.onnx, the shape of each layer's state, BOS and EOS

Both take `input_ids` (B, T) and `state_0`, `state_1`, .. of the layers, zeros before the first token, and
return `logits` (B, T, V) and `next_state_0`, ... The recurrence is written out step by step, so T is fixed;
B is free. examples/onnx_generate.py runs them with onnxruntime.
"""

import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...mixers import mixer_class
from ...mixers.base import Mixer, SequenceContext
from ...mixers.fla_layer import FlaMixer
from ...requirements import check_extra
from ..modeling import LRNNForCausalLM


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


def write_onnx(
    model: LRNNForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, prefill: int
) -> None:
    """Write the graphs of a model in fp32, and onnx.json, to a new folder; see `runs.export.export_onnx`."""
    check_extra("onnx", "onnx", "onnxscript")
    for i, spec in enumerate(model.config.layer_mixers):
        if reason := _obstacle(mixer_class(spec["type"])):
            raise ValueError(f"layer {i} ({spec['type']}) cannot be exported to ONNX: {reason}")
    folder.mkdir(parents=True)
    states = _empty_states(model)
    facts = {
        "prefill": prefill,
        "states": [list(state.shape[1:]) for state in states],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / "onnx.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    lengths = {"prefill": prefill, "token": 1}
    _write_graphs({name: _graph(model, states, tokens) for name, tokens in lengths.items()}, folder)


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


def _graph(model: LRNNForCausalLM, states: list[Tensor], tokens: int):
    """An onnx.ModelProto of `tokens` steps."""
    batch = torch.export.Dim("batch")
    numbers = range(len(states))
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it names operators of torchvision that it skips
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch.export, about its own future
            program = torch.onnx.export(
                _Steps(model), (torch.zeros(2, tokens, dtype=torch.long), *states),
                dynamo=True, verbose=False,
                input_names=["input_ids", *(f"state_{i}" for i in numbers)],
                output_names=["logits", *(f"next_state_{i}" for i in numbers)],
                dynamic_shapes={"input_ids": {0: batch}, "states": tuple({0: batch} for _ in numbers)},
            )  # fmt: skip
    finally:
        logger.setLevel(before)
    return program.model_proto


def _write_graphs(graphs: dict, folder: Path) -> None:
    """Each graph in a file, and the weights that both have once, in weights.bin."""
    import onnx

    first, *others = graphs
    file = folder / f"{first}.onnx"
    contents = {weight.name: weight.raw_data for weight in graphs[first].graph.initializer}
    onnx.save_model(graphs[first], file, save_as_external_data=True, location="weights.bin")
    saved = onnx.load(file, load_external_data=False).graph.initializer
    places = {weight.name: weight for weight in saved if weight.data_location == onnx.TensorProto.EXTERNAL}
    for name in others:
        for weight in graphs[name].graph.initializer:
            if weight.name in places and contents[weight.name] == weight.raw_data:
                weight.CopyFrom(places[weight.name])
        onnx.save_model(graphs[name], folder / f"{name}.onnx")
