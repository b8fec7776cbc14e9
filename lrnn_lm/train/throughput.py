"""Speed of a run relative to its machine: tokens/s, MFU, memory bandwidth, waiting for data.

MFU counts the operations of the model's mathematics without recomputation (`model.accounting`). Memory
traffic is a lower bound, each byte counted once: activations kept for the backward pass are written and read;
weights are read in both passes, in the precision of the passes; gradients are written; the optimizer reads
weights, gradients and its state and writes weights and state.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig

from ..model.accounting import account, meta_model, training_memory
from ..recipe import Recipe
from .optim import state_bytes
from .runtime import peak_bandwidth, peak_flops, peak_memory_bytes


@dataclass(frozen=True)
class Spent:
    """Seconds of a step, measured on the host."""

    seconds: float  # in all
    waiting: float  # for rows
    idle: float  # for the device, after it was given all its work


class Throughput:
    """Turns a step's seconds into the numbers of a line of metrics.jsonl."""

    def __init__(self, recipe: Recipe, config: PreTrainedConfig, sharded: bool, accelerator: Accelerator):
        self._ranks, self._device = ranks, device = accelerator.num_processes, accelerator.device
        self._tokens = recipe.train.tokens_per_step
        length = recipe.data.sequence_length
        cost = account(config, length)
        self.flops_per_token = cost.flops_per_token_training
        self._flops, self._bandwidth = peak_flops(device), peak_bandwidth(device)
        self.bytes_per_step = 0.0
        if self._bandwidth is not None:
            dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
            shared = recipe.train.sequence_parallel
            rows = -(-recipe.rows_per_step * shared // ranks)
            micro_batch = min(recipe.train.micro_batch, rows)
            recomputed = recipe.train.activation_checkpointing
            memory = training_memory(config, micro_batch, length // shared, dtype, recomputed)
            passes = -(-rows // recipe.train.micro_batch)
            weights = cost.total_parameters * (2 * dtype.itemsize + 4)
            shards = (recipe.train.shard_size or ranks) if sharded else 1
            state = state_bytes(meta_model(config), recipe.optim)
            update = (3 * 4 * cost.total_parameters + 2 * state) / shards
            self.bytes_per_step = passes * (2 * memory.activations + weights) + update

    def line(self, spent: Spent, tokens: int | None = None) -> dict[str, float | int | None]:
        """Fields of metrics.jsonl; null where the device's datasheet values are unknown.

        tokens: of this step; None for a full one. The memory traffic of others is not known.
        """
        tokens = self._tokens if tokens is None else tokens
        speed = tokens / spent.seconds
        mfu = share = None
        if self._flops is not None:
            mfu = speed * self.flops_per_token / (self._flops * self._ranks)
        if self._bandwidth is not None and tokens == self._tokens:
            share = self.bytes_per_step / spent.seconds / self._bandwidth
        return {
            "tokens_per_second": round(speed, 1),
            "mfu": mfu,
            "memory_bandwidth": share,
            "data_wait": spent.waiting / spent.seconds,
            "host_idle": spent.idle / spent.seconds,
            "memory_bytes": peak_memory_bytes(self._device),
        }
