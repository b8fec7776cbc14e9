"""`lrnn eval CHECKPOINT --certify s5 --harden DIR`: a copy whose softmax gates select one entry, exactly.

A softmax is sharpened by making its logits larger, here until fp32 computes 1 and zeros. What the layer then
does is what its rounded gates do. Blocks that do not follow the task when they are rounded are left out, as
they would only disturb; what reads the state has to be trained on (recipes/synthetic/s5-certified.yaml).

Legend: S symbols, N blocks, M block size, D model width.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...files import user_path
from .state_boxes import VANISHES, Maps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARP = 1.0  # a block whose gates are further from being rounded is left out


@torch.no_grad()
def harden(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    maps: Maps,
    blocks: list[dict[str, Any]],
    folder: Path,
) -> list[int]:
    """Write the hardened copy of a model in fp64, and return the blocks that it keeps.

    maps, blocks: the model's, with what the rounded blocks do (`certify.rounded_blocks`).
    Raises ValueError for another gate than softmax, if no block follows the task, or for a folder in use.
    """
    from ...model import LRNNConfig, LRNNForCausalLM
    from ...runs.export import new_folder

    mixer = model.model.layers[0].mixer
    if mixer.gate != "softmax":
        raise ValueError(f"--harden sharpens softmax gates; larger logits do not make {mixer.gate} select")
    folder = user_path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not an empty folder; --harden writes a new one")
    kept = [b["block"] for b in blocks if b["follows"] and b["values"] > 1 and b["off"] < SHARP]
    if not kept:
        raise ValueError(
            "no block follows the task when its gates are rounded, so there is nothing to harden"
        )
    table = model.config.to_dict()
    spec = {**model.config.layer_mixers[0], "num_blocks": len(kept)}
    hardened = LRNNForCausalLM(LRNNConfig.from_dict({**table, "mixer": spec, "layer_pattern": None}))
    weights = model.state_dict()
    prefix = "model.layers.0.mixer."
    M = mixer.block_size
    scale = _scale(maps)  # (N, M)
    for name in ("gate_proj.weight", "gate_proj.bias"):  # planes of rows (M+1 or M, N, M, ..)
        planes = weights[prefix + name].unflatten(0, (-1, mixer.num_blocks, M))
        factor = scale.view(1, *scale.shape, *[1] * (planes.ndim - 3))
        weights[prefix + name] = (planes * factor)[:, kept].flatten(0, 2)
    weights[prefix + "value_proj.weight"] = _rows(weights[prefix + "value_proj.weight"], kept, M)
    weights[prefix + "out_proj.weight"] = _rows(weights[prefix + "out_proj.weight"].T, kept, M).T
    hardened.load_state_dict({name: weight.float() for name, weight in weights.items()})
    with new_folder(folder) as aside:
        hardened.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return kept


def _rows(weight: Tensor, kept: list[int], M: int) -> Tensor:
    """Rows (N M, ..) of the blocks that are kept."""
    return weight.unflatten(0, (-1, M))[kept].flatten(0, 1)


def _scale(maps: Maps) -> Tensor:
    """(N, M) factors of each row's logits, with which the largest leads the others enough at all symbols."""
    top = maps.gates.clamp(min=1e-300).log().topk(2, dim=-1).values  # differences are those of the logits
    lead = (top[..., 0] - top[..., 1]).amin(dim=0)
    return (1.25 * VANISHES / lead.clamp(min=1e-6)).clamp(min=1.0)
