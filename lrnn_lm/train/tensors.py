"""What a checkpoint holds of model and optimiser, into files and back, whole or sharded.

Whole: model.safetensors and trainer/optimizer.safetensors, written by one rank. Sharded: trainer/shards,
written by torch.distributed.checkpoint, each rank its own part. Either comes back on any number of ranks,
whichever way they share the model. Keys are `model/NAME` and `optimizer/NAME/KEY`.
"""

import json
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from ..runs.checkpoint import COPY, CheckpointError, Position, read_position, room_for_copy, verify
from ..runs.layout import CheckpointFolder, checkpoint_folder
from .optim import Optimizer
from .parallel import like_parameter
from .runtime import restore_random_state

Group = dist.ProcessGroup | None
WEIGHTS = "model.safetensors"


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every parameter and the optimiser's state of it, as they are; a tied weight stands once."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value.detach()
    return dict(sorted(tensors.items()))  # files do not depend on where the optimiser's state came from


def part(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Those of `model` or of `optimizer`, by the rest of their keys."""
    return {
        key.removeprefix(f"{kind}/"): value for key, value in tensors.items() if key.startswith(f"{kind}/")
    }


def write_whole(tensors: Mapping[str, Tensor], aside: Path, model: nn.Module) -> None:
    """Weights, configuration and optimiser, from whole tensors on the CPU."""
    model.save_pretrained(aside, state_dict=part(tensors, "model"))
    save_file(part(tensors, "optimizer"), CheckpointFolder(aside).optimizer)


def write_shards(tensors: dict[str, Tensor], aside: Path, group: Group) -> None:
    """This rank's part; all ranks of the group at the same time."""
    shards = CheckpointFolder(aside).shards
    dcp.save(
        tensors,
        storage_writer=HuggingFaceStorageWriter(str(shards), save_distributed=True),
        process_group=group,
    )


def write_config(aside: Path, model: nn.Module) -> None:
    """What `save_pretrained` writes beside the weights."""
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


def load(folder: Path, model: nn.Module, optimizer: Optimizer, rank: int, group: Group) -> Position:
    """Put a checkpoint that passed `verify` into model, optimiser and random generators; its position.

    Every rank calls it; the checkpoint may be of another number of ranks, or another way to share the model.
    Raises CheckpointError if its tensors are not those of this model, or of this optimizer.
    """
    names = _shard_sizes(folder) if is_sharded_folder(folder) else _whole_sizes(folder)
    _check_fit(folder, model, part(names, "model"))
    optimizer.state.clear()
    _make_state(folder, model, optimizer, part(names, "optimizer"))
    targets = training_tensors(model, optimizer)
    if is_sharded_folder(folder):
        _load_shards(folder, targets, group)
    else:
        with torch.no_grad():
            for key, value in _whole_tensors(folder):
                targets[key].copy_(like_parameter(value, targets[key]))
    _restore_random(CheckpointFolder(folder).trainer, rank)
    return read_position(folder)


def _restore_random(trainer: Path, rank: int) -> None:
    """A rank that was not there before takes the first one's: nothing in training draws from them."""
    name = f"rng-{rank:05d}" if (trainer / f"rng-{rank:05d}.json").exists() else "rng-00000"
    with safe_open(trainer / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    restore_random_state(json.loads((trainer / f"{name}.json").read_text()), tensors)


def _check_fit(folder: Path, model: nn.Module, stored: dict[str, torch.Size]) -> None:
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    wrong = sorted(name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name))
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{folder} holds another model than the recipe's: {wrong[0]}{more} does not fit"
        )


def fill_state(model: nn.Module, optimizer: Optimizer) -> None:
    """The state that the optimizer would make of itself at its first step, where it has none yet."""
    for parameter in model.parameters():
        if not optimizer.state.get(parameter):
            optimizer.state[parameter] = optimizer.new_state(parameter)


def _make_state(folder: Path, model: nn.Module, optimizer: Optimizer, stored: Iterable[str]) -> None:
    """Zeros for each parameter of which a checkpoint has something stored, under `NAME/KEY`."""
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


def _whole_files(folder: Path) -> Iterator[tuple[str, Path]]:
    yield "model", folder / WEIGHTS
    yield "optimizer", CheckpointFolder(folder).optimizer


def _whole_sizes(folder: Path) -> dict[str, torch.Size]:
    sizes = {}
    for kind, path in _whole_files(folder):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                sizes[f"{kind}/{key}"] = torch.Size(file.get_slice(key).get_shape())
    return sizes


def _whole_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for kind, path in _whole_files(folder):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield f"{kind}/{key}", file.get_tensor(key)


def _shard_sizes(folder: Path) -> dict[str, torch.Size]:
    metadata = HuggingFaceStorageReader(str(CheckpointFolder(folder).shards)).read_metadata()
    return {key: value.size for key, value in metadata.state_dict_metadata.items()}


def _load_shards(folder: Path, targets: dict[str, Tensor], group: Group) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # one process reads alone, as it should
        dcp.load(
            targets,
            storage_reader=HuggingFaceStorageReader(str(CheckpointFolder(folder).shards)),
            process_group=group,
            no_dist=group is None,
        )


def read_shards(folder: Path, kind: str = "model") -> dict[str, Tensor]:
    """The whole tensors of a sharded checkpoint, on the CPU, by one process."""
    sizes = _shard_sizes(folder)
    tensors = {key: torch.empty(size) for key, size in sizes.items() if key.startswith(f"{kind}/")}
    _load_shards(folder, tensors, None)
    return part(tensors, kind)


def write_weights(folder: Path, path: Path) -> None:
    """The weights of a sharded checkpoint as one file, as transformers loads it."""
    save_file(read_shards(folder), path, metadata={"format": "pt"})


@contextmanager
def plain_folder(folder: Path) -> Iterator[Path]:
    """A checkpoint with its weights in model.safetensors: itself, or while it lasts, a copy of a sharded one.

    Raises ValueError if the shards are damaged.
    """
    folder = checkpoint_folder(folder)
    if (folder / WEIGHTS).exists() or not is_sharded_folder(folder):
        yield folder
        return
    damage = verify(folder)
    if damage is not None:
        raise ValueError(f"{folder} is damaged ({damage}); take another checkpoint of the run")
    with room_for_copy(folder.parent), TemporaryDirectory(prefix=COPY, dir=folder.parent) as scratch:
        plain = Path(scratch) / folder.name
        shutil.copytree(folder, plain, ignore=shutil.ignore_patterns("trainer"))
        write_weights(folder, plain / WEIGHTS)
        yield plain
