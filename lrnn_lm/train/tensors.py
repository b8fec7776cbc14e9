"""Model and optimizer to a checkpoint's files and back, whole or sharded.

Whole: model.safetensors and trainer/optimizer.safetensors, written by one rank. Sharded: trainer/shards,
written by torch.distributed.checkpoint, each rank its own part. Both load on any number of ranks, with DDP or
FSDP2. Keys are `model/NAME`, `optimizer/NAME/KEY` and, with `train.average`, `average/NAME`.
"""

import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from ..runs.checkpoint import CheckpointError, Position, read_position, verify
from ..runs.layout import CheckpointFolder, checkpoint_folder
from .average import Average
from .optim import Optimizer
from .parallel import like_parameter
from .runtime import restore_random_state

Group = dist.ProcessGroup | None
WEIGHTS = "model.safetensors"


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None
) -> dict[str, Tensor]:
    """Every parameter, its optimizer state and its average, not copied; a tied weight once."""
    values = average.values if average is not None else {}
    tensors: dict[str, Tensor] = {f"average/{name}": value for name, value in values.items()}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value.detach()
    return dict(sorted(tensors.items()))  # a new state and a loaded one may differ in the order of keys


def part(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of `model` or of `optimizer`, without that prefix."""
    prefix = f"{kind}/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def write_whole(tensors: Mapping[str, Tensor], aside: Path, model: nn.Module) -> None:
    """Weights, configuration, optimizer and average, from whole tensors on the CPU."""
    model.save_pretrained(aside, state_dict=part(tensors, "model"))
    save_file(part(tensors, "optimizer"), CheckpointFolder(aside).optimizer)
    if average := part(tensors, "average"):
        save_file(average, CheckpointFolder(aside).average, metadata={"format": "pt"})


def write_shards(tensors: dict[str, Tensor], aside: Path, group: Group) -> None:
    """Write this rank's part; a collective, so all ranks of the group call it."""
    writer = HuggingFaceStorageWriter(str(CheckpointFolder(aside).shards), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=group)


def write_config(aside: Path, model: nn.Module) -> None:
    """Write what `save_pretrained` puts beside the weights."""
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(aside)
    if model.can_generate():
        model.generation_config.save_pretrained(aside)


def write_random_state(trainer: Path, rank: int, state: tuple[dict, dict[str, Tensor]]) -> list[Path]:
    plain, tensors = state
    paths = [trainer / f"rng-{rank:05d}.json", trainer / f"rng-{rank:05d}.safetensors"]
    paths[0].write_text(json.dumps(plain))
    save_file(tensors, paths[1])
    return paths


def is_sharded_folder(folder: Path) -> bool:
    return CheckpointFolder(folder).shards.is_dir()


def load(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    rank: int,
    group: Group,
    average: Average | None = None,
) -> Position:
    """Load a checkpoint that passed `verify` into model, optimizer and random generators; its position.

    Every rank calls it. The checkpoint may come from another number of ranks, or from DDP instead of FSDP2.
    An average that it does not have begins at its weights. Raises CheckpointError if its tensors are not
    those of this model and this optimizer.
    """
    sharded = is_sharded_folder(folder)
    sizes = (
        _shard_sizes(folder)
        if sharded
        else {key: torch.Size(file.get_slice(name).get_shape()) for key, file, name in _whole_entries(folder)}
    )
    check_fit(folder, model, part(sizes, "model"))
    optimizer.state.clear()
    _make_state(folder, model, optimizer, part(sizes, "optimizer"))
    has_average = bool(part(sizes, "average"))
    targets = training_tensors(model, optimizer, average if has_average else None)
    if sharded:
        _load_shards(folder, targets, group)
    else:
        with torch.no_grad():
            for key, file, name in _whole_entries(folder):
                if key not in targets:
                    continue  # an average that this run does not keep
                targets[key].copy_(like_parameter(file.get_tensor(name), targets[key]))
    if average is not None and not has_average:
        average.restart()
    # A rank that did not exist before takes the first rank's state: nothing in training draws from it.
    trainer, name = CheckpointFolder(folder).trainer, f"rng-{rank:05d}"
    name = name if (trainer / f"{name}.json").exists() else "rng-00000"
    plain = json.loads((trainer / f"{name}.json").read_text())
    restore_random_state(plain, load_file(trainer / f"{name}.safetensors"))
    return read_position(folder)


def check_fit(folder: Path, model: nn.Module, stored: dict[str, torch.Size]) -> None:
    """Raise CheckpointError unless the stored names and shapes are those of the model's parameters."""
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    wrong = sorted(name for name in {*stored, *expected} if stored.get(name) != expected.get(name))
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{folder} holds another model than the recipe's: {wrong[0]}{more} does not fit"
        )


def fill_state(model: nn.Module, optimizer: Optimizer) -> None:
    """Give every parameter the state that the optimizer would create for it at the first step."""
    for parameter in model.parameters():
        if not optimizer.state.get(parameter):
            optimizer.state[parameter] = optimizer.new_state(parameter)


def _make_state(folder: Path, model: nn.Module, optimizer: Optimizer, stored: Iterable[str]) -> None:
    """Give each parameter with stored state (`NAME/KEY`) a new state to load into.

    Raises CheckpointError if the keys are those of another optimizer.
    """
    keys: dict[str, set[str]] = defaultdict(set)
    for path in stored:
        name, _, key = path.rpartition("/")
        keys[name].add(key)
    parameters = dict(model.named_parameters())
    for name, found in keys.items():
        state = optimizer.new_state(parameters[name])
        if found != state.keys():
            raise CheckpointError(
                f"{folder} holds the state of another optimizer ({', '.join(sorted(found))} of {name}, not "
                f"{', '.join(sorted(state))}): set optim.name back, or give this run another name=.."
            )
        optimizer.state[parameters[name]] = state


def _whole_entries(folder: Path) -> Iterator[tuple[str, Any, str]]:
    """(key, open file, name in it) of each tensor of an unsharded checkpoint; nothing is read yet."""
    inner = CheckpointFolder(folder)
    files = {"model": folder / WEIGHTS, "optimizer": inner.optimizer, "average": inner.average}
    for kind, path in files.items():
        if kind == "average" and not path.exists():
            continue
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, not a dict
                yield f"{kind}/{name}", file, name


def _shard_sizes(folder: Path) -> dict[str, torch.Size]:
    metadata = HuggingFaceStorageReader(str(CheckpointFolder(folder).shards)).read_metadata()
    return {key: value.size for key, value in metadata.state_dict_metadata.items()}


def has_average(folder: Path) -> bool:
    """Whether a checkpoint holds the moving average of the weights."""
    if CheckpointFolder(folder).average.exists():
        return True
    return is_sharded_folder(folder) and bool(part(_shard_sizes(folder), "average"))


def _load_shards(folder: Path, targets: dict[str, Tensor], group: Group) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # not initialised: one process reads alone
        dcp.load(
            targets,
            storage_reader=HuggingFaceStorageReader(str(CheckpointFolder(folder).shards)),
            process_group=group,
            no_dist=group is None,
        )


def read_shards(folder: Path, kind: str = "model") -> dict[str, Tensor]:
    """The joined tensors of a sharded checkpoint, on the CPU; one process alone can read them."""
    sizes = _shard_sizes(folder)
    tensors = {key: torch.empty(size) for key, size in sizes.items() if key.startswith(f"{kind}/")}
    _load_shards(folder, tensors, None)
    return part(tensors, kind)


def weights_to_export(folder: Path, average: bool = False) -> dict[str, Tensor] | None:
    """The joined weights of a sharded checkpoint, or its moving average; None: those that its folder holds.

    Raises ValueError if the files are damaged, or there is no average.
    """
    folder = checkpoint_folder(folder)
    sharded = is_sharded_folder(folder)
    if average and not has_average(folder):
        raise ValueError(f"{folder} holds no average of weights: only runs with train.average keep one")
    if not average and ((folder / WEIGHTS).exists() or not sharded):
        return None
    damage = verify(folder)
    if damage is not None:
        raise ValueError(f"{folder} is damaged ({damage}); take another checkpoint of the run")
    if sharded:
        return read_shards(folder, "average" if average else "model")
    return load_file(CheckpointFolder(folder).average)
