"""`model.init_from`: the weights of a checkpoint, an exported folder or a hub model for a new run.

Weights only. Names, shapes, and whatever else decides what the model computes must be the recipe's.
"""

import textwrap
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..files import hub_is_reachable
from ..model import LRNNConfig
from ..recipe import resolve_path
from ..recipe.mixer import MIXER_OPTIONS
from ..runs.checkpoint import verify
from ..runs.layout import CheckpointFolder, checkpoint_folder
from ..runs.load import describe, json_table, model_configuration
from .tensors import check_fit, is_sharded_folder, read_shards

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "tie_word_embeddings",
          "rms_norm_eps", "repeat", "learn_initial_state")  # fmt: skip
_START = {"gate_std", "half_life", "shift_keys"}  # options that only say how weights are drawn
_TOLD = 4  # differences in a message, at most


def find_weights(source: str, main: bool) -> Path:
    """The folder that `model.init_from` names; a hub name is downloaded, or found in the hub's cache.

    Raises ValueError if there is no such folder or model, or it is of another family; on the main rank, also
    for a checkpoint that is damaged.
    """
    folder = checkpoint_folder(resolve_path(source))
    if not folder.is_dir():
        folder = _from_hub(source)
    try:
        config = json_table(describe(folder).path / "config.json")
    except ValueError as error:
        raise ValueError(f"model.init_from: {error}") from None
    kind = config.get("model_type")
    if kind != LRNNConfig.model_type:
        raise ValueError(
            f"model.init_from: {source} is of another family (model_type {kind!r}): only "
            f"{LRNNConfig.model_type!r} models have weights for this one"
        )
    if config.get("quantization_config"):
        raise ValueError(
            f"model.init_from: the weights of {source} are integers; take the checkpoint that it was made of"
        )
    damage = verify(folder) if main and CheckpointFolder(folder).manifest.exists() else None
    if damage is not None:
        raise ValueError(f"model.init_from: {folder} is damaged ({damage}); take another checkpoint")
    return folder


def _from_hub(name: str) -> Path:
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors"],
                local_files_only=not hub_is_reachable(),
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        why = textwrap.shorten(str(error), 120, placeholder=" ..")
        raise ValueError(
            f"model.init_from: {name}: no such folder, and it cannot be fetched from the hub ({why}); "
            "give a folder, or a hub name as in owner/model"
        ) from None


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Copy the weights of a folder into `model`; both have the same names and shapes.

    Raises ValueError, naming what differs, if it holds another model or cannot be read.
    """
    config = model_configuration(folder)
    differing = [
        f"{name} is {getattr(config, name)!r} there, {getattr(model.config, name)!r} here"
        for name in _SIZES
        if getattr(config, name) != getattr(model.config, name)
    ] + _mixer_differences(config, model.config)
    if differing:
        more = f"; {len(differing) - _TOLD} more" if len(differing) > _TOLD else ""
        raise ValueError(
            f"model.init_from: {folder} holds another model: {'; '.join(differing[:_TOLD])}{more}. "
            "Give this recipe its sizes and mixers."
        )
    tensors = _read(folder)
    for copy, kept in model.all_tied_weights_keys.items():  # tools that join shards write both
        if copy in tensors and kept in tensors and torch.equal(tensors[copy], tensors[kept]):
            del tensors[copy]
    check_fit(folder, model, {name: tensor.shape for name, tensor in tensors.items()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def _mixer_differences(theirs: LRNNConfig, ours: LRNNConfig) -> list[str]:
    """What differs between the mixers of the first layer where any option does."""
    for layer, pair in enumerate(zip(theirs.layer_mixers, ours.layer_mixers, strict=False)):
        filled = [{k: o.default for k, o in MIXER_OPTIONS[m["type"]].items()} | m for m in pair]
        there, here = ({k: v for k, v in mixer.items() if k not in _START} for mixer in filled)
        if there["type"] != here["type"]:
            return [f"layer {layer}'s mixer is {there['type']} there, {here['type']} here"]
        if there != here:
            keys = [key for key in there if there[key] != here.get(key)]
            return [f"layer {layer}'s mixer.{k} is {there[k]!r} there, {here.get(k)!r} here" for k in keys]
    return []


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder, on the CPU; of a run's sharded checkpoint, joined."""
    sharded = is_sharded_folder(folder) and not any(folder.glob("*.safetensors"))
    if sharded:
        return read_shards(folder)
    if not (files := sorted(folder.glob("*.safetensors"))):
        raise ValueError(f"model.init_from: {folder}: there are no weights (.safetensors) in it")
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"model.init_from: {folder}: its weights cannot be read ({error})") from None
