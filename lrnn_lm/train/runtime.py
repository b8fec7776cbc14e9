"""The machine under a run: device, precision, trackers, seeds and random state."""

import os
import random
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import distributed as dist

from ..files import no_default_device, world_size
from ..recipe.train import TrainSection

# Datasheet values: dense bf16 rate in FLOP/s, for model FLOPs utilisation (MFU); memory bandwidth in bytes/s.
# The first key that is part of the device's name counts, so `H100 PCIe` stands before `H100`.
_DATASHEETS = {
    "H100 PCIe": (756e12, 2.0e12), "H100 NVL": (835e12, 3.9e12), "H100": (989e12, 3.35e12),
    "GH200 480GB": (989e12, 4.0e12), "H200 NVL": (835e12, 4.8e12), "H200": (989e12, 4.8e12),
    "A100-SXM4-40GB": (312e12, 1.555e12), "A100-PCIE-40GB": (312e12, 1.555e12), "A100": (312e12, 2.04e12),
    "L40S": (362e12, 0.864e12), "B200": (2250e12, 8e12),
}  # fmt: skip
_EXTRAS = ("tensorboard", "trackio", "wandb")  # trackers that pyproject.toml has a version of
_BUCKET_MB = 64  # gradients that DDP sends in one all-reduce, overlapped with the backward pass


def make_accelerator(train: TrainSection, trackers: list[str], folder: str) -> Accelerator:
    """An Accelerator on the device and in the precision that a recipe asks for.

    A rank that waits for the others longer than the timeout ends with an error.
    Raises ValueError for a missing device, a device without bf16, a tracker that is not installed, or
    several ranks without gloo (needed on GPUs too: ranks agree on checkpoints over it).
    """
    device, precision = train.device, train.precision
    if world_size() > 1 and not (dist.is_available() and dist.is_gloo_available()):
        raise ValueError(
            "several ranks meet by gloo, which this build of torch lacks; train with one process, "
            "or install a build that has it"
        )
    for tracker in trackers:  # Accelerate would silently leave out a tracker that is not installed
        if find_spec(tracker) is None:
            package = f"'lrnn-lm[{tracker}]'" if tracker in _EXTRAS else tracker.replace("_", "-")
            raise ValueError(
                f"tracking.trackers names {tracker}, which is not installed: pip install {package}"
            )
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError(
            "train.device is cuda, but no CUDA device is visible here; use train.device=auto or cpu"
        )
    on_cuda = has_cuda and device != "cpu"
    has_bf16 = on_cuda and torch.cuda.is_bf16_supported()
    if precision == "bf16" and not has_bf16:
        where = "this CUDA device" if on_cuda else "a CPU run"
        raise ValueError(
            f"train.precision is bf16, which {where} does not do; use train.precision=auto or fp32"
        )
    use_bf16 = has_bf16 and precision != "fp32"
    kind = "cuda" if on_cuda else "cpu"
    named = os.environ.get("ACCELERATE_TORCH_DEVICE", kind)  # which Accelerate takes before its arguments
    if named not in (kind, *(f"{kind}:{i}" for i in range(torch.cuda.device_count() if on_cuda else 1))):
        raise ValueError(
            f"the environment has ACCELERATE_TORCH_DEVICE={named}, but this run's device is {kind}, by "
            "train.device and what is here; unset it"
        )
    timeout = timedelta(minutes=train.timeout_minutes)
    _meet_again("nccl" if on_cuda else "gloo", timeout)
    return Accelerator(
        cpu=not on_cuda,
        mixed_precision="bf16" if use_bf16 else "no",
        log_with=trackers or None,
        project_dir=folder,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(bucket_cap_mb=_BUCKET_MB, gradient_as_bucket_view=True),
        ],
    )


def _meet_again(backend: str, timeout: timedelta) -> None:
    """Where torchrun has restarted the ranks: start their process group, which Accelerate then takes.

    Their store still has the addresses of the ranks before them, at which they would wait for each other. So
    they meet under names of their own. Not on several machines, as torchrun counts restarts on each.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or world_size() == 1:  # also a process that a rank starts, without that rank's number
        return
    if os.environ.get("GROUP_WORLD_SIZE") != "1" or dist.is_initialized():
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


@contextmanager
def own_settings() -> Iterator[None]:
    """torch's default dtype, device and gradients as a new process has them, whatever the caller has set.

    Raises ValueError within torch.autocast, which casts each weight once and keeps that copy until its end.
    """
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        raise ValueError(
            "call train() outside of torch.autocast: a run takes its precision from train.precision"
        )
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with no_default_device(), torch.inference_mode(False):  # which turns gradients on within no_grad too
            yield
    finally:
        torch.set_default_dtype(dtype)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch; only the model's initial weights depend on it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state of every random generator: a part for JSON, and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    plain = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
    }
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return plain, tensors


def restore_random_state(plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Set the generators to what `random_state` returned."""
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device; None if unknown."""
    return _datasheet(device)[0]


def peak_bandwidth(device: torch.device) -> float | None:
    """Memory bandwidth of the device in bytes/s; None if unknown."""
    return _datasheet(device)[1]


def _datasheet(device: torch.device) -> tuple[float | None, float | None]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rates for key, rates in _DATASHEETS.items() if key in name), (None, None))
