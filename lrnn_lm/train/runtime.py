"""The machine under a run: device, precision, seeds, random state, and the wish to stop."""

import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

EXIT_STOPPED = 85  # saved and stopped by a signal; SLURM requeues on it
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# Dense bf16 rate in FLOP/s by datasheet, for model FLOPs utilisation.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def make_accelerator(device: str, precision: str, trackers: list[str], folder: str) -> Accelerator:
    """An Accelerator on the device and in the precision that a recipe asks for.

    Raises ValueError if there is no such device here, or it does not do bf16.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("train.device is cuda, but no CUDA device is visible here; use train.device=auto or cpu")
    on_cuda = has_cuda and device != "cpu"
    has_bf16 = on_cuda and torch.cuda.is_bf16_supported()
    if precision == "bf16" and not has_bf16:
        where = "this CUDA device" if on_cuda else "a CPU run"
        raise ValueError(f"train.precision is bf16, which {where} does not do; use train.precision=auto or fp32")
    use_bf16 = has_bf16 and precision != "fp32"
    return Accelerator(
        cpu=not on_cuda,
        mixed_precision="bf16" if use_bf16 else "no",
        log_with=trackers or None,
        project_dir=folder,
    )


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch. The model's initial weights and nothing else depend on it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state of every random generator: a part for JSON and a part in tensors."""
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
    """Undo what happened to the generators since `random_state`."""
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device by datasheet; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for key, rate in _PEAK_FLOPS.items() if key in name), None)


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and SIGINT into a wish that the loop reads at step boundaries.

    A second SIGINT ends the process at once. Used as a context manager; the old handlers come back at its end.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._name: str | None = None
        self._old: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> "StopSignal":
        self._old = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._name == "SIGINT":
            os._exit(128 + signal.SIGINT)
        self._name = signal.Signals(number).name

    @property
    def name(self) -> str:
        """The signal that came, or a word for one that came to another rank."""
        return self._name or "a signal on another rank"

    def requested(self) -> bool:
        """Whether any rank was asked to stop; every rank must call it, and all get the same answer."""
        if self._accelerator.num_processes == 1:
            return self._name is not None
        flag = torch.tensor(int(self._name is not None), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, reduction="sum").item())
