"""`lrnn export`: a folder to publish, without the trainer's state, for people without this package.

Weights in a chosen precision, the model's code beside them, tokenizer and model card; or its graphs.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import gcd
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from ..files import readable, signals_unwind, user_path
from ..remote import check_free, upload, url_of
from ..requirements import check_extra
from .layout import CheckpointFolder
from .load import describe, json_table, load_checkpoint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
QUANTISED = ("int8", "int4")
_GROUP, _LEAST = 32, 8  # weights of a row that share a scale in int4: most and fewest
_LEFT_OUT = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.py", "config.json", "README.md")


def export(
    checkpoint: str | Path,
    target: str | Path,
    dtype: str | None = None,
    write_card: Callable[[Path], None] | None = None,
    weights: "dict[str, Tensor] | None" = None,
) -> Path:
    """Write a checkpoint as a new folder that needs torch and transformers only.

    Args:
        checkpoint: a checkpoint folder.
        target: a folder that does not exist yet, or an empty one; or a URL where nothing is.
        dtype: bf16 or fp32; int8 or int4 for the layers' projections, by torchao; None for the checkpoint's.
        write_card: adds README.md to the finished folder (see `evaluate.reporting.card`).
        weights: by name, in place of the checkpoint's.
    Returns:
        The target.
    Raises:
        ValueError: not a checkpoint of ours, a missing or damaged file, a target that is not empty, or an
            unknown dtype.
        UnmetRequirementError: int8 or int4 without torchao.
    """
    import torch

    from ..model.export import write_remote_code

    if dtype is not None and dtype not in (*DTYPES, *QUANTISED):
        raise ValueError(f"dtype {dtype!r}: use {', '.join(DTYPES)}, {' or '.join(QUANTISED)}")
    if dtype in QUANTISED:
        check_extra("torchao", "torchao")
    with new_folder(target) as aside:
        path, model, _ = _load(checkpoint, weights)
        if dtype in QUANTISED:
            model = _quantised(model, dtype)
        elif dtype is not None:
            model.to(getattr(torch, DTYPES[dtype]))
        model.save_pretrained(aside)
        for file in path.iterdir():
            if file.is_file() and not any(map(file.match, _LEFT_OUT)):
                shutil.copyfile(file, aside / file.name)
        _copy_templates(path, aside)
        write_remote_code(aside)
        if write_card is not None:
            write_card(aside)
    return user_path(target)


def export_graphs(
    checkpoint: str | Path,
    target: str | Path,
    format: str = "onnx",
    weights: "dict[str, Tensor] | None" = None,
    prefill: int = 16,
) -> Path:
    """Write a checkpoint's graphs, in fp32, and its tokenizer to a new folder, see `model.export.graphs`.

    format: onnx, executorch or torch-export. weights: as of `export`. prefill: tokens that the prefill takes
    at once.

    Raises:
        ValueError: as `export`; or a layer that has no graph, and why.
        UnmetRequirementError: a package of the format is missing.
    """
    from ..model.export.graphs import write_graphs

    with new_folder(target) as aside:
        path, model, tokenizer = _load(checkpoint, weights)
        write_graphs(model.float(), tokenizer, aside, format, prefill)
        for file in path.glob("*token*"):  # tokenizer.json, special_tokens_map.json, ..
            shutil.copyfile(file, aside / file.name)
        _copy_templates(path, aside)
    return user_path(target)


def _copy_templates(checkpoint: Path, aside: Path) -> None:
    """Chat templates: chat_template.jinja, and others in a folder of their own."""
    for file in (*checkpoint.glob("*.jinja"), *checkpoint.glob("additional_chat_templates/*.jinja")):
        copy = aside / file.relative_to(checkpoint)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _quantised(model: "PreTrainedModel", dtype: str) -> "PreTrainedModel":
    """The model with integers for the weights of its layers, and a scale a row (int8) or group (int4).

    int4: rows that do not split into groups of 8 are int8.
    """
    import torch
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    settings = Int8WeightOnlyConfig()
    if dtype == "int4":
        found = {}
        for name, module in model.named_modules():
            if name.startswith("model.layers.") and isinstance(module, torch.nn.Linear):
                group = gcd(_GROUP, module.in_features)
                narrow = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group))
                found[f"{name}.weight"] = narrow if group >= _LEAST else settings
        settings = FqnToConfig(found)
    return type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype="auto",
        quantization_config=TorchAoConfig(settings),
    )  # fmt: skip


def _load(
    checkpoint: str | Path, weights: "dict[str, Tensor] | None"
) -> "tuple[Path, PreTrainedModel, PreTrainedTokenizerBase]":
    """A checkpoint of ours: its folder, model and tokenizer. A ValueError for others'."""
    path = describe(checkpoint).path
    config = json_table(CheckpointFolder(path).config)
    kind = config.get("model_type")
    if kind != "lrnn":
        raise ValueError(f"{path}: its model_type is {kind!r}, and only 'lrnn' models can be exported")
    if config.get("quantization_config"):
        raise ValueError(f"{path}: its weights are integers; export the checkpoint that it was made of")
    if not (path / "tokenizer_config.json").is_file():  # which names BOS and EOS
        raise ValueError(f"{path}: tokenizer_config.json is missing; save the tokenizer there first")
    return path, *load_checkpoint(path, "cpu", weights=weights)


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder to be made beside the target, which takes the target's place once it is whole. An empty target
    stays, as it may be mounted, linked or the current folder: it gets the files.

    If the target is a URL, a temporary folder is copied there. Raises ValueError if the target is in use.
    """
    target = user_path(target)
    if (url := url_of(target)) is not None:
        check_free(url)
        with signals_unwind(), TemporaryDirectory() as scratch:
            yield Path(scratch) / "model"
            upload(Path(scratch) / "model", url)
        return
    if (file := next((place for place in (target, *target.parents) if place.is_file()), None)) is not None:
        raise ValueError(f"{file}: is a file; give a folder to export to")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target}: is not empty; give a new folder to export to")
    aside = (target if target.is_dir() else target.parent) / f".{target.name}.{os.getpid()}.tmp"
    try:
        with signals_unwind():
            yield aside
            readable(aside, (file for file in aside.rglob("*") if file.is_file()))
            if aside.parent == target:
                if any(file != aside for file in target.iterdir()):
                    raise ValueError(f"{target}: is no longer empty; give a new folder to export to")
                for file in aside.iterdir():
                    file.rename(target / file.name)
            else:
                aside.rename(target)
    except SafetensorError as error:  # a full disk, told by Rust
        raise ValueError(f"{target}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
