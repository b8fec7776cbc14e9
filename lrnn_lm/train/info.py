"""`lrnn info`: parameters, operations, state and memory of a recipe's or a checkpoint's model."""

from dataclasses import replace
from pathlib import Path

import torch
import yaml
from rich.console import Console, Group, RenderableType
from rich.table import Table

from ..files import user_path
from ..model import LRNNConfig
from ..model.accounting import (
    TRAINING_PASSES,
    Account,
    TrainingMemory,
    account,
    check_parameters,
    meta_model,
    training_memory,
)
from ..recipe import Recipe, load_recipe, resolve_path
from ..runs.layout import checkpoint_folder
from ..runs.load import describe as describe_checkpoint
from ..runs.load import json_table, model_configuration
from .build import model_config
from .optim import state_bytes
from .segments import check_segments
from .sources import rows_read, synthetic_task


def print_info(target: str, overrides: list[str] | None = None, console: Console | None = None) -> None:
    """Print the costs of a recipe, or of a checkpoint folder if `target` holds a config.json.

    Raises ValueError for a missing recipe or checkpoint, overrides on a checkpoint, an unknown vocabulary
    size, or a parameter count other than the recipe says.
    """
    console = console or Console(markup=False)  # brackets are text: paths have some
    folder = checkpoint_folder(user_path(target))
    if not (folder / "config.json").is_file():
        if folder.is_dir():
            describe_checkpoint(target)  # raises, and names the checkpoint of a run
        console.print(describe(load_recipe(target, overrides)))
        return
    if overrides:
        raise ValueError(f"{target} is a checkpoint: overrides such as {overrides[0]!r} belong to a recipe")
    config = _read_config(folder)
    costs = account(config, config.max_position_embeddings)
    console.print(Group(_parameters(target, costs), _work(costs), _state(config, costs)))


def _read_config(folder: Path) -> LRNNConfig:
    path = folder / "config.json"
    kind = json_table(path).get("model_type")
    if kind != LRNNConfig.model_type:
        raise ValueError(f"{path}: model_type is {kind!r}, not {LRNNConfig.model_type!r}")
    return model_configuration(folder)


def describe(recipe: Recipe) -> RenderableType:
    """Tables of a recipe's model, its costs and its budget; ValueError as in `print_info`."""
    check_segments(recipe)
    config = model_config(recipe, vocabulary(recipe))
    check_parameters(config, recipe.model.parameters)
    length = recipe.data.sequence_length
    costs = account(config, length)
    train = recipe.train
    on_cpu = train.device == "cpu"  # where `auto` means fp32
    full = train.precision == "fp32" or (train.precision == "auto" and on_cpu)
    dtype = torch.float32 if full else torch.bfloat16
    at_once = train.segment or length // train.sequence_parallel
    state = state_bytes(meta_model(config), recipe.optim)
    memory = training_memory(config, train.micro_batch, at_once, dtype, train.activation_checkpointing, state)
    if train.average is not None:
        memory = replace(memory, weights=2 * memory.weights)
    return Group(
        _parameters(recipe.name, costs),
        _work(costs),
        _state(config, costs),
        _memory(memory, recipe, dtype),
        _budget(recipe, costs),
        *([_mixture(recipe)] if recipe.data.sources else []),
    )


def vocabulary(recipe: Recipe) -> int:
    """The vocabulary's size, from the recipe or from its tokenizer's SentencePiece recipe.

    Raises ValueError where only the tokenizer itself knows it.
    """
    if recipe.model.vocab_size is not None:
        return recipe.model.vocab_size
    if recipe.data.source.type == "synthetic":
        return synthetic_task(recipe).vocab_size
    path = resolve_path(recipe.data.tokenizer)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        size = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("vocab_size")
        if isinstance(size, int):
            return size
    raise ValueError(
        f"the vocabulary of tokenizer {recipe.data.tokenizer!r} is not known before it is loaded; "
        "give its size as model.vocab_size"
    )


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(min_width=28)
    table.add_column(justify="right", min_width=16)
    table.add_column(style="dim")
    return table


def _parameters(name: str, costs: Account) -> Table:
    table = _table(f"{name}: parameters")
    total = costs.total_parameters
    for part, count in costs.parameters.items():
        table.add_row(part, f"{count:,}", f"{count / total:.1%}")
    if "head" not in costs.parameters:
        table.add_row("head", "0", "tied to the embedding")
    table.add_row("total", f"{total:,}")
    return table


def _work(costs: Account) -> Table:
    """Rows that are zero are left out: no attention term where there is no attention."""
    table = _table("\nFLOPs a token")
    work = costs.work
    for label, count, note in (
        ("matrix products", work.products, "head included"),
        ("scan", work.scan, "linear recurrence, parallel over time"),
        ("sequential", work.sequential, "nonlinear recurrence: each step waits for the one before"),
        ("attention", work.attention, f"average over a context of {costs.context_length:,}"),
    ):
        if count:
            table.add_row(label, f"{count:,}", note)
    table.add_row("forward", f"{costs.flops_per_token:,}")
    table.add_row("training", f"{costs.flops_per_token_training:,}", f"{TRAINING_PASSES} x forward")
    return table


def _state(config: LRNNConfig, costs: Account) -> Table:
    table = _table("\nstate of one sequence")
    if costs.recurrent_state_bytes:
        table.add_row("recurrent", _bytes(costs.recurrent_state_bytes), "fp32, the same at any length")
    if costs.attention_state_bytes:
        T = costs.context_length
        each = account(config, T + 1).attention_state_bytes - costs.attention_state_bytes
        more = f"{each:,} bytes more a token" if each else "the same beyond its windows"
        table.add_row(
            "keys and values", _bytes(costs.attention_state_bytes), f"bf16, after {T:,} tokens; {more}"
        )
    return table


def _memory(memory: TrainingMemory, recipe: Recipe, dtype: torch.dtype) -> Table:
    table = _table("\ntraining memory, estimated for one device that holds the whole model")
    kind = str(dtype).removeprefix("torch.")
    kind += " (auto, on a GPU)" if recipe.train.precision == "auto" and dtype != torch.float32 else ""
    at_once = recipe.train.segment or recipe.data.sequence_length // recipe.train.sequence_parallel
    shape = f"micro-batch {recipe.train.micro_batch} x {at_once:,} tokens in {kind}"
    if recipe.train.activation_checkpointing:
        shape += ", layers recomputed"
    averaged = recipe.train.average is not None
    table.add_row("weights", _bytes(memory.weights), "fp32, and their average" if averaged else "fp32")
    table.add_row("gradients", _bytes(memory.gradients), "fp32")
    each = memory.optimizer / (memory.gradients / 4)
    table.add_row("optimizer", _bytes(memory.optimizer), f"{recipe.optim.name}, {each:.3g} bytes a parameter")
    table.add_row("activations", _bytes(memory.activations), shape)
    chunk = min(recipe.train.loss_chunk, recipe.train.micro_batch * at_once)
    table.add_row("loss", _bytes(memory.loss), f"logits of {chunk:,} tokens at once")
    table.add_row("total", _bytes(memory.total))
    return table


def _budget(recipe: Recipe, costs: Account) -> Table:
    table = _table("\nbudget")
    tokens = recipe.tokens_at(recipe.total_steps)
    left = recipe.train.tokens - tokens
    table.add_row("tokens", f"{tokens:,}", f"{left:,} more do not fill a step" if left else "")
    table.add_row("steps", f"{recipe.total_steps:,}")
    table.add_row("tokens a step", f"{recipe.train.tokens_per_step:,}")
    table.add_row("rows a step", f"{recipe.rows_per_step:,}", f"of {recipe.data.sequence_length:,} tokens")
    table.add_row("tokens a parameter", f"{tokens / costs.total_parameters:.1f}")
    table.add_row("FLOPs in all", f"{tokens * costs.flops_per_token_training:.2e}")
    return table


def _mixture(recipe: Recipe) -> Table:
    """What the run reads of each source. How many epochs that is, `lrnn prepare` tells."""
    table = _table("\nmixture, tokens of the budget")
    counts = rows_read(recipe, recipe.total_steps)
    for source, rows in zip(recipe.data.sources, counts, strict=True):
        what = f"{rows / sum(counts):.1%}, {source.type} {source.path or ''}".strip()
        table.add_row(source.name, f"{rows * recipe.data.sequence_length:,}", what)
    return table


def _bytes(count: int) -> str:
    """A size as people read it: 1536 -> `1.5 KiB`."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} B"
