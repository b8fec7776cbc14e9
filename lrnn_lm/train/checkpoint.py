"""Checkpoints: a plain Hugging Face folder plus `trainer/`; written aside, fsynced, renamed, checked on load.

    checkpoints/step-00001000/   config.json, model.safetensors, generation_config.json, the tokenizer's files
        trainer/                 state.json, optimizer.safetensors, rng-00000.json/.safetensors (a rank each),
                                 manifest.json (size and sha256 of every other file)
    checkpoints/latest           link to the newest

Nothing is pickled. A folder whose manifest does not hold is damaged: it is skipped, with a warning, for the
one before, and removed once the run has saved again; if all are damaged the run ends there rather than begin
anew over what may still be of use. A folder leaves as it comes, by one rename, so that none ever shows half.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .runtime import random_state, restore_random_state

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that could not be written or read; the message says which, and what stays."""


@dataclass
class Position:
    """Where a run stands: optimiser steps done, samples seen, steps skipped, the last step validated.

    `data` is the content hash of the prepared text whose samples are counted.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    validated: int = -1
    data: str = ""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    checkpoints: Path,
    position: Position,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    write_extras: Callable[[Path], None],
    keep_last: int,
) -> Path:
    """Write a checkpoint in full, then let it appear under its name, then drop the oldest.

    Args:
        checkpoints: the run's folder of checkpoints.
        model: an unwrapped PreTrainedModel.
        write_extras: writes what else belongs in the folder (tokenizer, recipe).
        keep_last: how many to keep, this one included.
    Raises:
        CheckpointError: the disk is full or cannot be written; what was there before stays.
    """
    final, aside = (
        checkpoints / folder_name(position.step),
        checkpoints / f".{folder_name(position.step)}.tmp",
    )
    before = latest_name(checkpoints)
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        clear_leftovers(checkpoints)
        _write(aside, position, model, optimizer, write_extras)
        if final.exists():  # a damaged one that this run went back over
            _remove(final)
        aside.rename(final)
        _fsync(checkpoints)
        _point_latest(checkpoints, final.name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"could not save {final}: {_reason(error)}; last good checkpoint: {latest_name(checkpoints)}. "
            "Free some space and run the same command again to go on from it."
        ) from None
    _prune(checkpoints, before, final, keep_last)
    return final


def _prune(checkpoints: Path, before: str, final: Path, keep_last: int) -> None:
    """Keep the last few up to `before`, the checkpoint that was good until now, and `final`."""
    saved = list_checkpoints(checkpoints)
    names = [folder.name for folder in saved]
    good = names.index(before) + 1 if before in names else len(names)
    damaged = [folder for folder in saved[good:] if folder != final]  # else the run would have begun there
    keep = [folder for folder in saved if folder not in damaged][-keep_last:]
    for folder in saved:
        if folder not in keep:
            _remove(folder)


def latest_name(checkpoints: Path) -> str:
    """The checkpoint last written or resumed from, for messages."""
    link = checkpoints / "latest"
    return os.readlink(link) if link.is_symlink() else "none"


def _remove(folder: Path) -> None:
    """Take a checkpoint away at one stroke; what then lies aside is cleared now or at the next start."""
    aside = folder.with_name(f".{folder.name}.old.tmp")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _write(
    aside: Path,
    position: Position,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    write_extras: Callable[[Path], None],
) -> None:
    trainer = aside / "trainer"
    trainer.mkdir(parents=True)
    model.save_pretrained(aside)
    write_extras(aside)
    save_file(_optimizer_tensors(model, optimizer), trainer / "optimizer.safetensors")
    plain, tensors = random_state()
    save_file(tensors, trainer / "rng-00000.safetensors")
    (trainer / "rng-00000.json").write_text(json.dumps(plain))
    (trainer / "state.json").write_text(json.dumps(asdict(position), indent=1) + "\n")
    files = sorted(p for p in aside.rglob("*") if p.is_file())
    manifest = {
        "format": FORMAT,
        "step": position.step,
        "files": {str(p.relative_to(aside)): _facts(p) for p in files},
    }
    (trainer / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*files, trainer / "manifest.json", trainer, aside]:
        _fsync(path)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state by parameter name: `NAME/exp_avg`, .."""
    return {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Position:
    """Put a checkpoint that passed `verify` into model, optimiser and random generators; its position.

    Raises CheckpointError if its tensors are not those of this model.
    """
    trainer = folder / "trainer"
    _load_weights(folder, model)
    parameters = dict(model.named_parameters())
    for key, value in load_file(trainer / "optimizer.safetensors").items():
        name, _, kind = key.rpartition("/")
        # AdamW keeps its step counter on the CPU unless it is fused.
        on_cpu = kind == "step" and not optimizer.defaults.get("fused")
        optimizer.state[parameters[name]][kind] = value if on_cpu else value.to(device)
    restore_random_state(
        json.loads((trainer / "rng-00000.json").read_text()), load_file(trainer / "rng-00000.safetensors")
    )
    return Position(**json.loads((trainer / "state.json").read_text()))


def _load_weights(folder: Path, model: nn.Module) -> None:
    """Tied weights are stored once: what is missing must be tied to something that is there."""
    stored = load_file(folder / "model.safetensors")
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    wrong = sorted(
        name
        for name in {*stored, *wanted} - tied
        if name not in stored or name not in wanted or stored[name].shape != wanted[name]
    )
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{folder} holds another model than the recipe's: {wrong[0]}{more} does not fit"
        )
    model.load_state_dict(stored, strict=False)


def newest_valid(checkpoints: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose manifest holds, None if there are none; damaged ones go through `warn`.

    Clears what a killed save left, so only one process may call it. Raises CheckpointError if all are
    damaged.
    """
    clear_leftovers(checkpoints)
    folders = list_checkpoints(checkpoints)
    for folder in reversed(folders):
        damage = verify(folder)
        if damage is None:
            _point_latest(checkpoints, folder.name)
            return folder
        before = "trying the one before" if folder != folders[0] else "there is none before"
        warn(f"checkpoint {folder} is damaged ({damage}); {before}")
    if folders:
        raise CheckpointError(
            f"no checkpoint in {checkpoints} is whole. Put one back from a copy, "
            "or remove that folder to train from the beginning."
        )
    return None


def verify(folder: Path) -> str | None:
    """None if every file is as the manifest says, else what is wrong."""
    try:
        manifest = json.loads((folder / "trainer" / "manifest.json").read_text())
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is missing or unreadable"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}, this version reads {FORMAT}"
    for name, facts in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"] or _facts(path) != facts:
            return f"{name} is not as its checksum says"
    return None


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    found = [p for p in checkpoints.glob("step-*") if p.name.removeprefix("step-").isdecimal() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def clear_leftovers(checkpoints: Path) -> None:
    """Remove what a killed save left half-written."""
    for leftover in checkpoints.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    (checkpoints / ".latest.tmp").unlink(missing_ok=True)


def _point_latest(checkpoints: Path, name: str) -> None:
    aside = checkpoints / ".latest.tmp"
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    os.replace(aside, checkpoints / "latest")
    _fsync(checkpoints)


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
