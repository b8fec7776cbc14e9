"""Checkpoints for people without this package: the model's code beside its weights, and `lrnn export`.

`write_remote_code` adds the code to a checkpoint in place. `export` makes a folder to publish: weights in a
chosen precision, tokenizer, code and a model card, without the trainer's state.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError

from ...remote import check_free, upload, url_of
from ..modeling import LRNNForCausalLM
from .remote_code import AUTO_MAP, remote_code

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LEFT_OUT = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.py", "config.json", "README.md")


def write_remote_code(folder: str | Path) -> None:
    """Let a folder that `save_pretrained` wrote load with `trust_remote_code=True` where this package is not.

    Writes the generated files and names them in config.json (`auto_map`); safe to repeat.
    """
    folder = Path(folder)
    for name, text in remote_code().items():
        (folder / name).write_text(text, encoding="utf-8")
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"auto_map": AUTO_MAP}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export(
    checkpoint: str | Path,
    target: str | Path,
    dtype: str | None = None,
    write_card: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint as a new folder that needs torch and transformers only.

    Args:
        checkpoint: a checkpoint folder.
        target: a folder that does not exist yet, or an empty one; or a URL where nothing is.
        dtype: bf16 or fp32; None for the checkpoint's.
        write_card: adds README.md to the finished folder (see `evaluate.reporting.card`).
    Returns:
        The target.
    Raises:
        ValueError: not a checkpoint of ours, a missing or damaged file, a target that is not empty, or an
            unknown dtype.
    """
    checkpoint, target = Path(checkpoint).expanduser(), Path(target).expanduser()
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: use {' or '.join(DTYPES)}")
    check_exportable(checkpoint, target)
    with written_aside(target) as aside:
        load_model(checkpoint, dtype).save_pretrained(aside)
        shutil.copytree(
            checkpoint,
            aside,
            ignore=_other_files(checkpoint),
            dirs_exist_ok=True,
            copy_function=shutil.copyfile,
        )
        write_remote_code(aside)
        if write_card is not None:
            write_card(aside)
    return target


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder to be made beside the target, which takes the target's place once it is whole.

    If the target is a URL, a temporary folder is copied there.
    """
    if (url := url_of(target)) is not None:
        with TemporaryDirectory() as scratch:
            yield Path(scratch) / "model"
            upload(Path(scratch) / "model", url)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield aside
        aside.rename(target)
    except SafetensorError as error:
        raise ValueError(f"{target}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_exportable(checkpoint: Path, target: Path) -> None:
    """Raise ValueError if the checkpoint or its tokenizer cannot be exported, or the target is in use."""
    _check_checkpoint(checkpoint)
    _check_target(target)
    _check_tokenizer(checkpoint)


def _other_files(checkpoint: Path) -> Callable[[str, list[str]], set[str]]:
    """For copytree: files that are not copied, as they are written anew or belong to the trainer."""
    patterns = shutil.ignore_patterns(*_LEFT_OUT)

    def ignore(folder: str, names: list[str]) -> set[str]:
        folders = {name for name in names if (Path(folder) / name).is_dir()}
        return patterns(folder, names) | folders

    return ignore


def load_model(checkpoint: Path, dtype: str | None) -> LRNNForCausalLM:
    try:
        return LRNNForCausalLM.from_pretrained(
            checkpoint, dtype=DTYPES.get(dtype, "auto"), local_files_only=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{checkpoint}: cannot be loaded as a model: {reason[:300]}") from error


def _check_checkpoint(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder")
    config = folder / "config.json"
    if not config.is_file():
        inner = folder / "checkpoints" / "latest"
        hint = f"; did you mean {inner}?" if inner.exists() else " (there is no config.json in it)"
        raise ValueError(f"{folder}: not a checkpoint folder{hint}")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        kind, classes = settings.get("model_type"), settings.get("architectures") or []
    except (json.JSONDecodeError, AttributeError):
        raise ValueError(f"{config}: not a JSON object") from None
    if kind != LRNNForCausalLM.config_class.model_type:
        raise ValueError(f"{folder}: its model_type is {kind!r}, and only 'lrnn' models can be exported")
    if classes and LRNNForCausalLM.__name__ not in classes:
        raise ValueError(f"{folder}: holds {classes[0]}, and only language models can be exported")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: model.safetensors is missing; take another checkpoint of the run")
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder}: tokenizer_config.json is missing; save the tokenizer there first")


def _check_tokenizer(folder: Path) -> None:
    """Raise ValueError if the tokenizer does not load; it is copied file by file, so nothing else would
    notice."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # by where a file is torn
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{folder}: its tokenizer only loads with code of its own (trust_remote_code), which an "
                "export does not take along; save it as a fast tokenizer (tokenizer.json) first"
            ) from error
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder}: its tokenizer cannot be loaded ({reason[:200]}): tokenizer.json or "
            "tokenizer_config.json is damaged; take another checkpoint of the run"
        ) from error


def _check_target(target: Path) -> None:
    if (url := url_of(target)) is not None:
        return check_free(url)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file; give a folder to export to")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target}: is not empty; give a new folder to export to")
