"""The one assembly point: from a recipe to data, model, optimiser and trainer.

Everything that can be wrong with a recipe on this machine is found here, before the first step.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from ..data import DataSpec, PreparedData, SourceSpec, prepare
from ..model import LRNNConfig, LRNNForCausalLM
from ..recipe import Recipe, dump_recipe, resolve_path
from ..recipe.schema import SourceSection
from . import checkpoint
from .loop import Trainer
from .optim import make_optimizer
from .runtime import make_accelerator, seed_everything

# Changing one of these makes another model or another sequence of batches: a run cannot go on with it.
_FIXED = ("seed", "model", "data", "train.tokens_per_step")
_FREE = ("data.cache_dir", "data.num_proc", "data.num_workers", "data.shard_tokens", "model.parameters")


def prepare_data(recipe: Recipe, progress: bool = True) -> PreparedData:
    """The tokenizer and token shards of a recipe, made if they are not there."""
    data = recipe.data
    spec = DataSpec(
        source=_source(data.source),
        validation_source=_source(data.validation_source) if data.validation_source else None,
        validation_fraction=data.validation_fraction,
        tokenizer=str(resolve_path(data.tokenizer)),
        sequence_length=data.sequence_length,
        cache_dir=data.cache_dir,
        shard_tokens=data.shard_tokens,
        num_proc=data.num_proc,
        vocab_size=recipe.model.vocab_size,
        seed=recipe.seed,
    )
    return prepare(spec, progress)


def _source(section: SourceSection) -> SourceSpec:
    return SourceSpec(**section.model_dump())


def model_config(recipe: Recipe, vocab_size: int, **token_ids: int | None) -> LRNNConfig:
    """The model's configuration that a recipe describes, for a vocabulary of this size."""
    model = recipe.model.model_dump(exclude={"parameters", "vocab_size"})
    return LRNNConfig(
        **model,
        vocab_size=vocab_size,
        max_position_embeddings=recipe.data.sequence_length,
        loss_chunk=recipe.train.loss_chunk,
        **token_ids,
    )


def build_trainer(recipe: Recipe, console: Console | None = None) -> Trainer:
    """A trainer ready to run, at the position of the run's newest valid checkpoint if it has one.

    Raises:
        ValueError: whatever the recipe asks for that cannot be done here, in one or two lines.
    """
    console = console or Console(stderr=True, highlight=False)
    disable_progress_bar()  # transformers' bars for files of a few seconds would cut through ours
    folder = Path(recipe.train.runs_dir) / recipe.name
    accelerator = make_accelerator(
        recipe.train.device, recipe.train.precision, list(recipe.tracking.trackers), str(folder)
    )
    if accelerator.is_main_process:
        check_unchanged(recipe, folder)
    with accelerator.main_process_first():  # the others find what the first has made
        prepared = prepare_data(recipe, progress=accelerator.is_main_process)
    tokenizer = _load_tokenizer(prepared.tokenizer_dir)
    config = model_config(
        recipe,
        recipe.model.vocab_size or prepared.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    seed_everything(recipe.seed)
    model = LRNNForCausalLM(config)
    if recipe.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.train.compile:
        for block in model.model.layers:
            block.compile()
    model.to(accelerator.device)
    optimizer = make_optimizer(model, recipe.optim, accelerator.device)
    position = checkpoint.Position()
    newest = checkpoint.newest_valid(folder / "checkpoints", lambda text: console.print(f"[yellow]{text}"))
    if newest is not None:
        prepared.check_tokenizer(newest)
        position = checkpoint.load(newest, model, optimizer, accelerator.device)
    if accelerator.is_main_process:
        _write_run_folder(folder, recipe, prepared)
    return Trainer(recipe, folder, accelerator, model, optimizer, tokenizer, prepared, position, console)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def check_unchanged(recipe: Recipe, folder: Path) -> None:
    """Raise ValueError, naming every difference, if a run with checkpoints was made by another model or other data."""
    stored = folder / "recipe.yaml"
    if not stored.exists() or not checkpoint.list_checkpoints(folder / "checkpoints"):
        return
    old, new = _flatten(yaml.safe_load(stored.read_text())), _flatten(yaml.safe_load(dump_recipe(recipe)))
    differing = [
        f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and _within(key, _FIXED) and not _within(key, _FREE)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds checkpoints of another recipe ({'; '.join(differing)}). "
            "Give this run another name=.., or remove that folder."
        )


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _write_run_folder(folder: Path, recipe: Recipe, prepared: PreparedData) -> None:
    """recipe.yaml, the data's manifest, and the held-out documents, which evaluation looks for in the run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    manifest = json.dumps(prepared.manifest, indent=1) + "\n"
    (folder / "data.json").write_text(manifest, encoding="utf-8")
    heldout = folder / "heldout.jsonl"
    if not heldout.exists() or heldout.stat().st_size != prepared.heldout_path.stat().st_size:
        heldout.write_bytes(prepared.heldout_path.read_bytes())
