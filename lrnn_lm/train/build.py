"""From a recipe to data, model, optimiser and trainer.

Whatever is wrong with a recipe on this machine is found here, before the first step.
"""

import errno
import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..data import DataError, SyntheticData
from ..files import random_state_kept, replace_file, world_size
from ..model import LRNNConfig, LRNNForReconstruction
from ..model.accounting import check_parameters, model_class
from ..output import error_console
from ..recipe import Recipe, RecipeError, dump_recipe, load_recipe
from ..runs import checkpoint
from ..runs.branch import changes, differences, find_parent
from ..runs.layout import CheckpointFolder, RunFolder, latest_checkpoint, step_of
from ..runs.remote_copy import RunCopy
from .average import Average, check_updated
from .init_from import find_weights, load_weights
from .loop import Trainer
from .optim import make_optimizer, optimizer_class, scale_for_width
from .parallel import Plan, ignored, launch_plan, share
from .runtime import make_accelerator, seed_everything
from .segments import allow_graphs, check_segments
from .sources import Prepared, held_out_documents, notes, prepare_data, synthetic_task, verify_shards
from .stop import StopSignal
from .tasks import Scorer
from .tensors import load
from .together import Together, cpu_group


def model_config(recipe: Recipe, vocab_size: int, **token_ids: int | None) -> LRNNConfig:
    """The model's configuration."""
    model = recipe.model.model_dump(exclude={"parameters", "vocab_size", "init_from"})
    synthetic = recipe.data.source.type == "synthetic"
    if synthetic and synthetic_task(recipe).kind.head == "autoencoder":
        model["architectures"] = [LRNNForReconstruction.__name__]
    if recipe.optim.base_width is not None:
        model["initializer_range"] *= (recipe.optim.base_width / recipe.model.hidden_size) ** 0.5
    return LRNNConfig(
        **model,
        vocab_size=vocab_size,
        max_position_embeddings=recipe.data.sequence_length,
        loss_chunk=recipe.train.loss_chunk,
        residual_in_fp32=recipe.train.residual_in_fp32,
        **token_ids,
    )


def build_trainer(
    recipe: Recipe,
    console: Console | None = None,
    stop: StopSignal | None = None,
    check: Callable[[Path], None] | None = None,
    from_checkpoint: Path | None = None,
    scorer: Scorer | None = None,
) -> Trainer:
    """A trainer ready to run, at the position of the run's newest valid checkpoint if it has one.

    `stop` is the caller's, if it has installed signal handlers. `check` is the caller's last test of the run
    folder, called on the main rank; it raises ValueError. `from_checkpoint` makes a new run a branch: it
    goes on from that checkpoint of another run (`runs/branch.py`). `scorer` scores the tasks of
    `eval.during`; without it none are scored.

    Raises ValueError, on every rank, if the recipe asks for something that cannot be done here; Stopped if
    any rank was asked to stop.
    """
    console = console or error_console()
    disable_progress_bar()  # transformers' bars would cut through ours
    folder = Path(recipe.train.runs_dir) / recipe.name
    stop = stop or StopSignal()
    accelerator, plan = _start(recipe, folder, stop)
    together = Together(accelerator, stop)
    together.all(lambda: recipe.check_ranks(accelerator.num_processes, plan.kind))
    main, device = accelerator.is_main_process, accelerator.device
    together.main_first(lambda: _fetch(recipe, folder, console) if main else None)
    parent, begins = together.from_main(together.all(lambda: _origin(recipe, folder, from_checkpoint, main)))
    source = recipe.model.init_from if begins else None
    weights = together.main_first(lambda: find_weights(source, main)) if source else None
    prepared = together.main_first(lambda: _get_data(recipe, folder, main, stop))
    for line in [*recipe.notes(), *ignored(recipe.train, accelerator), *notes(prepared)] if main else ():
        console.print(escape(line), soft_wrap=True)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir, trust_remote_code=False)
    bare_model = together.all(lambda: _make_model(recipe, prepared, tokenizer, weights).to(device))
    model = share(bare_model, accelerator, plan)
    optimizer = together.all(lambda: make_optimizer(bare_model, recipe.optim, device))
    average = Average(bare_model, recipe) if recipe.train.average is not None else None
    lock = together.all(lambda: _lock(folder) if main else None)
    newest = together.from_main(
        together.all(lambda: _find_checkpoint(folder, parent, console) if main else None)
    )
    group = cpu_group(accelerator, recipe.train.timeout_minutes)

    def load_into_model(newest: Path) -> checkpoint.Position:
        return load(newest, bare_model, optimizer, accelerator.process_index, group, average)

    position = together.all(lambda: _resume(recipe, prepared, newest, load_into_model))
    trainer = together.all(
        lambda: Trainer(
            recipe, folder, accelerator, bare_model, model, optimizer, tokenizer, prepared, position, console,
            group, plan, average, scorer,
        )
    )  # fmt: skip
    facts = (recipe, prepared, parent, trainer.finished, check, device, console)
    together.all(lambda: _write_run_folder(folder, *facts) if main else None)
    if newest is not None and trainer.carry is not None:
        together.all(lambda: trainer.carry.load(CheckpointFolder(newest).trainer))
    trainer.lock = lock
    return trainer


def _start(recipe: Recipe, folder: Path, stop: StopSignal) -> tuple[Accelerator, Plan]:
    """The ranks of a recipe that this machine can train; nothing is prepared or written yet."""
    check_segments(recipe)
    optimizer_class(recipe.optim.name)
    shares_rows = recipe.train.sequence_parallel > 1
    plan = launch_plan(recipe.train.parallel, recipe.train.shard_size, shares_rows)
    if world_size() > 1:
        stop.hold()  # if one rank left now, the others would wait for it
    else:
        stop.let_go()
    return make_accelerator(recipe.train, list(recipe.tracking.trackers), str(folder)), plan


def _fetch(recipe: Recipe, folder: Path, console: Console) -> None:
    """With `checkpoint.copy_to`, check that place, and fetch its newest checkpoint if that is newer."""
    if recipe.checkpoint.copy_to is None:
        return
    copy = RunCopy(folder, recipe.checkpoint.copy_to)
    copy.check()
    if not copy.newer():
        return

    def check(stored: Path, step: int) -> None:
        change = "another name=.., or another checkpoint.copy_to"
        _check_same(recipe, stored, step, copy.url, f"Give this run {change}.")

    with _lock(folder):
        fetched = copy.fetch(check, lambda text: console.print(f"[yellow]{escape(text)}", soft_wrap=True))
    if fetched is not None:
        console.print(f"fetched {escape(f'{copy.url}/checkpoints/{fetched}')}", soft_wrap=True)


def _get_data(recipe: Recipe, folder: Path, main: bool, stop: StopSignal) -> Prepared:
    """Prepared data: the main rank makes it, the others find it made."""
    if main:
        check_unchanged(recipe, folder)
    try:
        prepared = prepare_data(recipe, progress=main)
    except ValueError:
        stop.leave_if_asked()  # SentencePiece turns a Stopped raised in its callbacks into another error
        raise
    stop.leave_if_asked()  # and Python drops a Stopped raised in a finaliser
    if main:
        verify_shards(prepared)
    return prepared


def _origin(
    recipe: Recipe, folder: Path, given: Path | None, main: bool
) -> tuple[dict[str, Any] | None, bool]:
    """On the main rank: the parent of a branch that has no checkpoint yet; whether the run begins anew."""
    parent = find_parent(recipe, folder, given) if main else None
    begins = parent is None and latest_checkpoint(RunFolder(folder).checkpoints) is None
    if begins:
        check_updated(recipe)
    return parent, begins


def _find_checkpoint(folder: Path, parent: dict[str, Any] | None, console: Console) -> Path | None:
    """The run's newest valid checkpoint, else a branch's parent, else None."""
    newest = checkpoint.newest_valid(
        RunFolder(folder).checkpoints, lambda text: console.print(f"[yellow]{escape(text)}", soft_wrap=True)
    )
    return Path(parent["checkpoint"]) if newest is None and parent is not None else newest


def _resume(
    recipe: Recipe,
    prepared: Prepared,
    newest: Path | None,
    load_into_model: Callable[[Path], checkpoint.Position],
) -> checkpoint.Position:
    """The position of the newest checkpoint, loaded; the beginning if there is none.

    Raises ValueError if that checkpoint had another tokenizer or other text.
    """
    content = prepared.manifest["content_hash"]
    if newest is None:
        return checkpoint.Position(data=content)
    try:
        prepared.check_tokenizer(newest)
        same = checkpoint.read_position(newest).data == content
    except DataError:  # it was trained on the text, or is another one
        same = False
    if not same:
        read = [source.path or source.type for source in recipe.data.sources or [recipe.data.source]]
        read += [] if isinstance(prepared, SyntheticData) else [recipe.data.tokenizer]
        where = " or ".join(read)
        raise ValueError(
            f"{newest} was trained on other text: {where} has changed since. "
            "Give this run another name=.., or put the text back."
        )
    return load_into_model(newest)


def _lock(folder: Path) -> TextIO:
    """Lock the run folder until the file is closed or the process ends; ValueError if another holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = RunFolder(folder).lock.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # any other: a file system without locks
            raise ValueError(
                f"another process is training {folder}; wait for it, or give this run another name=.."
            ) from None
    return file


def _make_model(recipe: Recipe, prepared: Prepared, tokenizer: Any, weights: Path | None) -> PreTrainedModel:
    """The recipe's model on the CPU, with fresh weights or those of the folder `weights`."""
    config = model_config(
        recipe,
        recipe.model.vocab_size or prepared.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    check_parameters(config, recipe.model.parameters)
    seed_everything(recipe.seed)
    if isinstance(prepared, SyntheticData):
        task = prepared.task
        config.synthetic_task = {"task": task.name, "length": task.length, "options": task.options}
    kind = model_class(config)
    if kind is LRNNForReconstruction and recipe.train.z_loss:
        raise ValueError(
            "train.z_loss is for language models, and this task trains an auto-encoder; leave it out"
        )
    model = kind(config)
    if recipe.optim.base_width is not None:
        scale_for_width(model, recipe.optim.base_width)
    if weights is not None:
        load_weights(weights, model)
        prepared.check_tokenizer(weights)
    if recipe.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.train.compile:
        allow_graphs(config)
        for block in model.model.layers:
            compile_block(block)
    return model


def compile_block(block: torch.nn.Module) -> None:
    """Compile a block in place, once for each shape: there are two, training's and evaluation's."""
    # Rows are not padded: where a SwiGLU's width is no multiple of 64, padded rows of its products would be
    # copied for our kernels (7 of 97 ms a step of a 212M model; other widths are as fast either way). May go
    # once Inductor hands padded rows to a user's kernel as they are.
    block.compile(dynamic=False, options={"comprehensive_padding": False})


def check_unchanged(recipe: Recipe, folder: Path) -> None:
    """Raise ValueError, naming every difference, if a run's checkpoints are of another model or data."""
    if RunFolder(folder).skips.exists():
        raise ValueError(
            f"{RunFolder(folder).skips}: this run left out samples after steps that were not finite, which "
            "only an older lrnn-lm (commit 9065c68) goes on with; use that, or give this run another name=.."
        )
    stored, done = RunFolder(folder).recipe, checkpoint.list_checkpoints(RunFolder(folder).checkpoints)
    if not done:
        return
    remedy = "Give this run another name=.., or remove that folder."
    _check_same(recipe, stored, step_of(done[-1]) or 0, str(folder), remedy)


def _check_same(recipe: Recipe, stored: Path, step: int, where: str, remedy: str) -> None:
    """Raise ValueError if the run that stored a recipe cannot go on with this one from a step."""
    if not stored.exists():
        raise ValueError(
            f"{where}/{stored.name} is gone, so nothing tells whether these checkpoints are of this recipe: "
            "put it back, or a copy of the recipe that the run was trained with"
        )
    if differing := differences(_load_stored(stored), recipe, step):
        told = [*differing[:5], *([f"and {len(differing) - 5} more"] if differing[5:] else [])]
        raise ValueError(f"{where} holds checkpoints of another recipe ({'; '.join(told)}). {remedy}")


def _load_stored(path: Path) -> Recipe:
    """The recipe that the run stored. An unknown key in it is not a typing error but another version's."""
    try:
        return load_recipe(path)
    except RecipeError as error:
        if "unknown key" not in str(error) and "is not known" not in str(error):
            raise
        raise ValueError(
            f"{error}. The run stored this, perhaps with a newer lrnn-lm: go on with that, "
            "or give this run another name=.."
        ) from None


def _tell_changes(run: RunFolder, recipe: Recipe, console: Console) -> None:
    """Say what a run goes on with and did not have before: a forgotten `name=` would mix two runs."""
    if latest_checkpoint(run.checkpoints) is None or not run.recipe.exists():
        return
    if changed := changes(_load_stored(run.recipe), recipe):
        told = "; ".join([*changed[:8], *([f"and {len(changed) - 8} more"] if changed[8:] else [])])
        console.print(f"[yellow]resuming with other settings: {escape(told)}", soft_wrap=True)


def _write_run_folder(
    folder: Path,
    recipe: Recipe,
    prepared: Prepared,
    parent: dict[str, Any] | None,
    finished: bool,
    check: Callable[[Path], None] | None,
    device: torch.device,
    console: Console,
) -> None:
    """Write recipe.yaml, a branch's parent, the data's manifest, and the held-out documents; then check.

    Evaluation reads those from here. A finished run keeps its recipe: it is not trained with the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    if parent is not None:  # first: without it the run would begin anew
        replace_file(run.parent, json.dumps(parent, indent=1) + "\n", durable=True)
    contents = {
        run.recipe: dump_recipe(recipe).encode(),
        run.data: json.dumps(prepared.manifest, indent=1).encode() + b"\n",
    }
    if (held_out := held_out_documents(prepared)) is not None:
        contents[run.heldout] = held_out
    if finished and run.recipe.exists():
        del contents[run.recipe]
    else:
        _tell_changes(run, recipe, console)
    for path, content in contents.items():
        replace_file(path, content)
    if check is not None:
        with random_state_kept(device):  # lm-eval draws where it loads a task
            check(folder)
