"""What a run goes on from, and with which recipes: its own checkpoints, or one of another run (a branch).

`lrnn train RECIPE --from CHECKPOINT` begins a run with that checkpoint's weights, optimizer, random state,
step and data position. The run folder keeps the parent in parent.json, also for starts before the run has
checkpoints of its own.
"""

import hashlib
import os
from glob import glob
from pathlib import Path
from typing import Any

from ..files import user_path
from ..recipe import Recipe, flatten, load_recipe
from .checkpoint import read_position, verify
from .layout import CheckpointFolder, RunFolder, latest_checkpoint
from .load import describe, json_table

# What a run cannot go on with another value of: it would have another model or other batches.
_FIXED = ("seed", "model", "data", "train.tokens_per_step", "train.ramp")
# Parts of the above that change neither. Not data.shard_tokens: prepared text is known by its files' hashes.
_FREE = ("data.cache_dir", "data.num_proc", "data.num_workers", "model.parameters")
# What changes the numbers of a run that goes on with another value of it. Not how ranks share the work.
_TOLD = (
    "optim", "data.sources", "data.stages", "train.tokens", "train.precision", "train.residual_in_fp32",
    "train.start_from_other", "train.z_loss", "train.average", "train.guard", "eval.tokens",
)  # fmt: skip
_STATE = ("optim.name", "optim.betas", "optim.eps")  # which give the optimizer's state its meaning


def differences(old: Recipe, new: Recipe, step: int, branch: bool = False) -> list[str]:
    """`key: was .., is ..` for each key that differs and must not, in a run that goes on from `step`."""
    was, now = flatten(old), flatten(new)
    fixed, free = ((*_FIXED, *_STATE), (*_FREE, "model.init_from")) if branch else (_FIXED, _FREE)
    length = old.data.rows_in_order or 1
    read = old.tokens_at(-(-step // length) * length)  # stretches that were begun are read to their ends
    free += tuple(key for key in now if key.endswith(".max_epochs"))
    # What was read is the same: more may follow.
    if old.data.stages_until(read) == new.data.stages_until(read):
        free += ("data.stages", *(key for key in now if key.endswith(".weight")))
    if was.get("model.mixer.type") != now.get("model.mixer.type"):  # told once, without its options
        free += tuple(key for key in {*was, *now} if key.startswith("model.mixer.") and key[12:] != "type")
    return _lines(was, now, fixed, free)


def changes(old: Recipe, new: Recipe) -> list[str]:
    """The same for keys that may differ, and change what the rest of the run computes."""
    return _lines(flatten(old), flatten(new), _TOLD, ())


def _lines(
    was: dict[str, Any], now: dict[str, Any], sections: tuple[str, ...], free: tuple[str, ...]
) -> list[str]:
    return [
        line
        for key in sorted({*was, *now})
        if was.get(key) != now.get(key) and _within(key, sections) and not _within(key, free)
        if not _moved(key, was.get(key), now.get(key))
        for line in _told(key, was.get(key), now.get(key))
    ]


def _moved(key: str, was: Any, now: Any) -> bool:
    """Whether two paths name one place, or the first leads nowhere now, as on another machine: text and
    tokenizer are known by their hashes. A relative path that leads nowhere may be a name on the hub."""
    is_path = key.endswith(".path") or key in ("data.tokenizer", "model.init_from")
    if not (is_path and isinstance(was, str) and isinstance(now, str)):
        return False
    old, new = (os.path.expanduser(os.path.expandvars(path)) for path in (was, now))
    if os.path.realpath(old) == os.path.realpath(new):
        return True
    return os.path.isabs(old) and key != "model.init_from" and not glob(f"{old}*", recursive=True)


def _told(key: str, was: Any, now: Any) -> list[str]:
    """A difference in words: of layer patterns the first layer that differs, else all layers' types."""
    if key == "model.layer_pattern":
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(was or (), now or (), strict=False)) if a != b]
        if was and now and len(was) == len(now) and all(a["type"] == b["type"] for _, a, b in pairs):
            i, a, b = pairs[0]
            return [line for k in a if a[k] != b[k] for line in _told(f"{key}[{i}].{k}", a[k], b[k])]
        was, now = (pattern and [entry["type"] for entry in pattern] for pattern in (was, now))
    return [f"{key}: was {was!r}, is {now!r}"]


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def find_parent(recipe: Recipe, folder: Path, given: Path | None) -> dict[str, Any] | None:
    """The contents of parent.json, for a run that begins as a branch; None for any other.

    given: the checkpoint of `--from`. Without it, the parent that the run stored before its first checkpoint.
    Raises ValueError if the run has begun otherwise, or the recipe cannot go on from that checkpoint.
    """
    stored = json_table(RunFolder(folder).parent)
    wanted = str(user_path(given).absolute()) if given is not None else None
    if stored and wanted not in (None, stored["given"], stored["checkpoint"]):
        found = _describe_parent(given, wanted)
        if found["manifest_sha256"] != stored["manifest_sha256"]:  # else it is the same, and has been moved
            raise ValueError(
                f"{folder} is a branch of {stored['checkpoint']}, not of {given}; "
                "give this run another name=.."
            )
        stored = found
    if latest_checkpoint(RunFolder(folder).checkpoints) is not None:
        if given is not None and not stored:
            raise ValueError(f"{folder} has begun without --from; give this run another name=..")
        return None
    if given is None and not stored:
        return None
    parent = stored or _describe_parent(given, wanted)
    _check_parent(recipe, parent)
    return parent


def _describe_parent(given: Path, wanted: str) -> dict[str, Any]:
    try:
        path = describe(given).path
    except ValueError as error:
        raise ValueError(f"--from: {error}") from None
    run, manifest = CheckpointFolder(path).run, CheckpointFolder(path).manifest
    if not manifest.is_file() or run is None or not run.recipe.is_file():
        raise ValueError(
            f"--from: {given} is no checkpoint in a run's folder: a branch needs its optimizer, position "
            "and recipe; for its weights alone set model.init_from"
        )
    return {
        "given": wanted,
        "checkpoint": str(path),
        "step": read_position(path).step,
        "run": run.path.name,
        "recipe_sha256": _sha256(run.recipe),
        "manifest_sha256": _sha256(manifest),
    }


def _check_parent(recipe: Recipe, parent: dict[str, Any]) -> None:
    path = Path(parent["checkpoint"])
    if not path.is_dir() or (damage := verify(path)) is not None:
        damage = damage if path.is_dir() else "it is gone"
        raise ValueError(f"--from: {path} cannot be used ({damage}); take another checkpoint of that run")
    if _sha256(CheckpointFolder(path).manifest) != parent["manifest_sha256"]:
        raise ValueError(f"--from: {path} has changed since this branch began; give this run another name=..")
    old = load_recipe(CheckpointFolder(path).run.recipe)
    if recipe.model.init_from not in (None, old.model.init_from):
        raise ValueError(
            f"--from takes the weights of {path}, and model.init_from those of {recipe.model.init_from}: "
            "leave one out"
        )
    if differing := differences(old, recipe, parent["step"], branch=True):
        raise ValueError(
            f"--from: {path} is of a run that this recipe cannot continue ({'; '.join(differing)})"
        )
    if parent["step"] >= recipe.total_steps:
        raise ValueError(
            f"--from: {path} is at step {parent['step']} and train.tokens pays for {recipe.total_steps} "
            "steps, the parent's included; raise train.tokens"
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
