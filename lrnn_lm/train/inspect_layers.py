"""Inspection of the layers every `inspect_every` steps: size of each state, share of saturated gates.

state_norm       root mean square over the batch of the 2-norm of a layer's state after its last token
gate_saturation  share of rows of A_t in which one gate has more than 0.99 of the sum: such a row only keeps,
                 moves or overwrites state, and its gates get little gradient

A mixer is called several times where a learnt start cuts rows at documents, or layers are applied repeatedly:
its last state counts, and the gates of all calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SATURATED = 0.99
_ROWS, _TOKENS = 1, 512  # inspected of a micro-batch: enough for a share to two digits


def shortened(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a micro-batch that is inspected."""
    return {key: value[:_ROWS, :_TOKENS] for key, value in batch.items()}


@contextmanager
def watched(model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """Inside, each forward pass of a mixer appends its `layer`, and its `state` and `gates` if it has any.

    gates: (2,) how many rows of A_t are saturated, and how many there are.
    """
    seen: list[dict[str, Tensor]] = []
    kinds = [spec["type"] for spec in model.config.layer_mixers]

    def look(layer: int, mixer: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, Any]) -> None:
        if model.model.layers[layer].initial_state is not None and inputs[1] is None:
            return  # one token, which tells the state's shape (model/initial_state.py)
        found: dict[str, Any] = {"layer": layer}
        if isinstance(outputs[1], Tensor):
            found["state"] = outputs[1].float().flatten(1).norm(dim=1).square().mean().sqrt()
        transitions = mixer.transitions(inputs[0])
        if transitions is not None:
            # Of H-LRU's companion matrix only the first row has gates: the others shift.
            rows = (transitions[..., :1, :] if kinds[layer] == "h_lru" else transitions).abs()
            input_gate = 1 - rows.sum(dim=-1)
            largest = torch.maximum(rows.amax(dim=-1), input_gate)
            saturated = (largest > _SATURATED).float()
            found["gates"] = torch.stack([saturated.sum(), saturated.new_full((), saturated.numel())])
        seen.append(found)

    hooks = [
        block.mixer.register_forward_hook(lambda *seen_by, layer=i: look(layer, *seen_by))
        for i, block in enumerate(model.model.layers)
    ]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def inspect(model: nn.Module, forward: Callable[[], Any]) -> dict[str, list[float | None]]:
    """Each layer's state and gates in a forward pass of the model."""
    with watched(model) as seen:
        forward()
    return summary(seen)


def summary(seen: list[dict[str, Tensor]]) -> dict[str, list[float | None]]:
    """For each measure a list with a number a layer; all in one transfer from the device."""
    states: dict[int, Tensor | None] = {}
    gates: dict[int, Tensor] = {}
    for found in seen:
        layer = found["layer"]
        states[layer] = found.get("state")
        if "gates" in found:
            gates[layer] = found["gates"] + gates.get(layer, 0)
    layers = sorted(states)
    shares = [gates[layer][0] / gates[layer][1] if layer in gates else None for layer in layers]
    measured = [*(states[layer] for layer in layers), *shares]
    known = [value for value in measured if value is not None]
    numbers = iter(torch.stack(known).tolist() if known else ())
    told = [None if value is None else next(numbers) for value in measured]
    return {"state_norm": told[: len(layers)], "gate_saturation": told[len(layers) :]}
