"""How ranks share a model, and all code that depends on it: a copy each (DDP), a shard each (FSDP2), or a
shard each of a copy that a group of ranks has (HSDP: FSDP2 over a mesh of groups x ranks of a group).

FSDP2 is torch's `fully_shard` on each block and on the rest, applied here and not by Accelerate: then it is
the same on a GPU and on a CPU with gloo, and the head's weight is gathered while the loss, which reads it
directly, is computed.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..recipe.train import TrainSection

_DISTRIBUTED = "set distributed_type: MULTI_GPU or FSDP in it, as in recipes/accelerate/"
# What Accelerate would do to the model by itself, by the variable that its launcher sets.
_NOT_OURS = {
    "ACCELERATE_USE_DEEPSPEED": _DISTRIBUTED,
    "ACCELERATE_USE_MEGATRON_LM": _DISTRIBUTED,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "leave parallelism_config out; see train.parallel",
    "ACCELERATE_DYNAMO_BACKEND": "leave dynamo_config out, and set train.compile=true",
}


@dataclass(frozen=True)
class Plan:
    """How a run is distributed."""

    kind: Literal["ddp", "fsdp2"] = "ddp"
    reshard: bool = False  # free a block's gathered parameters after each pass, not only after each step
    shard_size: int | None = None  # ranks that hold a copy between them; None: all
    # Whether FSDP2 gathers parameters and sums gradients block by block. Not where ranks share rows: there a
    # rank waits for another's block, which must not wait for this rank's shard of it.
    by_blocks: bool = True


def launch_plan(asked: str, shard_size: int | None = None, shares_rows: bool = False) -> Plan:
    """The recipe's `train.parallel` and `train.shard_size`; for auto, what Accelerate's config file told its
    launcher. shares_rows: whether several ranks share a row.

    Call it before the Accelerator is made: it removes the variable that has Accelerate apply FSDP itself.
    Raises ValueError for what that file asks Accelerate to do and is not supported.
    """
    for key, remedy in _NOT_OURS.items():
        if os.environ.get(key, "no").lower() not in ("", "no", "false"):
            raise ValueError(f"the Accelerate config sets {key}, which is not supported: {remedy}")
    launched = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    reshard = False
    if launched:
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError("the Accelerate config asks for FSDP 1; set fsdp_version: 2 in it")
        if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
            raise ValueError("fsdp_offload_params is not supported; set it to false in the Accelerate config")
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    kind = ("fsdp2" if launched else "ddp") if asked == "auto" else asked
    return Plan(kind, reshard and not shares_rows, shard_size, not shares_rows)


def ignored(train: TrainSection, accelerator: Accelerator) -> list[str]:
    """What Accelerate's config file or environment asks for and the recipe decides otherwise, a line each."""

    def asked(key: str) -> str:
        return os.environ.get(key, "").lower()

    lines = []
    if asked("ACCELERATE_MIXED_PRECISION") not in ("", "no", accelerator.mixed_precision):
        lines.append(("mixed_precision", "ACCELERATE_MIXED_PRECISION", "train.precision decides"))
    if asked("FSDP_ACTIVATION_CHECKPOINTING") == "true" and not train.activation_checkpointing:
        decides = "train.activation_checkpointing decides"
        lines.append(("fsdp_activation_checkpointing", "FSDP_ACTIVATION_CHECKPOINTING", decides))
    # The launcher hands its --gradient_accumulation_steps to DeepSpeed only: the rest cannot be told.
    key = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if asked(key) not in ("", "1"):
        decides = "train.tokens_per_step and train.micro_batch decide"
        lines.append(("gradient_accumulation_steps", key, decides))
    return [f"the Accelerate config's {name}: {asked(key)} is not used: {why}" for name, key, why in lines]


def share(model: nn.Module, accelerator: Accelerator, plan: Plan) -> nn.Module:
    """The module to call for a forward pass. FSDP2 changes `model` itself: its parameters become shards."""
    if accelerator.num_processes == 1 or plan.kind == "ddp":
        return accelerator.prepare_model(model)
    ranks = accelerator.num_processes
    size = plan.shard_size or ranks
    # Ranks are numbered node by node: a row of the mesh lies within a node where its size divides a node's.
    shape, names = ((ranks,), ("shard",)) if size == ranks else ((ranks // size, size), ("copy", "shard"))
    mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=names)
    bf16 = accelerator.mixed_precision == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,  # bf16 would round the number of targets that the loss is divided by
    )
    for block in model.model.layers if plan.by_blocks else ():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=plan.reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def accumulating(model: nn.Module, last: bool, plan: Plan) -> Iterator[None]:
    """Around the passes of one micro-batch: only the last of a step exchanges gradients between ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or plan.reshard)
    without_sync = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if without_sync else nullcontext():
        yield


def settle_buckets(model: nn.Module, empty_pass: Callable[[], None]) -> None:
    """Run a pass whose gradients are dropped, after which DDP lays out its gradient buckets for good.

    The sum over three or more ranks rounds by that layout: without this pass, a resumed run's first step
    would differ in its last bits from the same step of an uninterrupted run.
    """
    if isinstance(model, DistributedDataParallel):
        model.train()
        empty_pass()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a global norm of at most `limit`; returns the norm before, () on the device."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return whole(norm)


def reshard(model: nn.Module) -> None:
    """Free parameters gathered by passes without a backward; saving and loading need the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: Tensor) -> Tensor:
    """A tensor, gathered from its shards if it is sharded: all ranks call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that this rank's parameter holds, on its device."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
