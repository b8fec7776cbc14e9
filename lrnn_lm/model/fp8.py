"""Products of the blocks in fp8, through torchao: weights, inputs and gradients are scaled as they come.

Weights stay as they are and keep their names, so checkpoints do not change. Embedding and head, norms, gates'
normalisation and states are untouched; so are layers that read their projections' weights themselves.
"""

import importlib.util

import torch
from torch import nn

from ..mixers import ResidualOutput

ALIGNED = 16  # both sides of an fp8 matrix
OLDEST_GPU = (8, 9)


def use_fp8(model: nn.Module, device: torch.device, emulate: bool = False) -> int:
    """Have the blocks' projections compute in fp8, in place; returns how many do.

    Those whose width is no multiple of 16 stay as they are. Before compiling, after initialising or loading.

    Args:
        model: a model with its blocks in `model.model.layers`.
        emulate: compute fp8's rounding in the usual precision; for machines without fp8.
    Raises:
        ValueError: torchao is not installed, the device has no fp8 products, or no projection fits.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("products in fp8 need torchao: pip install 'lrnn-lm[fp8]'")
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < OLDEST_GPU):
        raise ValueError(
            f"{device.type} has no fp8 products here: they need a GPU of compute capability 8.9 or newer "
            "(L40S, H100, ..)"
        )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    changed = 0

    def fits(module: nn.Module, name: str) -> bool:
        nonlocal changed
        plain = type(module) in (nn.Linear, ResidualOutput) and ".inner." not in name  # others' layers
        wide = plain and module.in_features % ALIGNED == 0 and module.out_features % ALIGNED == 0
        changed += wide
        return wide

    config = Float8LinearConfig(emulate=emulate)
    for block in model.model.layers:
        convert_to_float8_training(block, config=config, module_filter_fn=fits)
    if not changed:
        raise ValueError(
            f"no projection of this model is a multiple of {ALIGNED} wide on both sides, as fp8 needs"
        )
    return changed
