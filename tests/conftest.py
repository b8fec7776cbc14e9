"""What has to be set before torch and triton are imported, here and in the processes that tests start.

One thread a process: `make test` runs as many processes as cores and more, small tensors are faster so, and
sums come in the same order in every process, so that runs can be compared bit by bit. Without a GPU, Triton
kernels are tested in Triton's interpreter.
"""

import gc
import os
import sys
from functools import cache
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # which is torch's number of threads, too

import pytest


@cache
def prepare_triton() -> None:
    """Raises UsageError where it is too late for the interpreter."""
    gc.disable()  # until the tests are collected: what imports make stays, so collections find nothing
    import torch
    from interpreter import quicken

    if not torch.cuda.is_available():
        if "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ:
            raise pytest.UsageError("Triton was imported before TRITON_INTERPRET was set: leave -n 0 out")
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        quicken()


# Here, as pytest next imports the conftest.py of the folders that it was given, and some import Triton. Not
# in the process that hands out the tests, which begins once it has imported what it needs.
if "PYTEST_XDIST_WORKER" in os.environ or not any(a.startswith(("-n", "--numproc")) for a in sys.argv[1:]):
    prepare_triton()


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        prepare_triton()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Three for two cores: processes wait for ranks, servers and commands for a third of their time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores * 3 // 2


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported by now stays, so leave it out of garbage collection: a trainer begins with a full one,
    which takes half a second through all of that. Trainers freeze nothing here, as they end first."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.freeze = gc.unfreeze = lambda: None


def pytest_unconfigure(config: pytest.Config, unfreeze=gc.unfreeze) -> None:
    """Let Triton's objects go before its library does, which complains of those that are left."""
    unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


# Of lm-eval's tasks, those of the suite `standard`, which has what offline tasks are compared with.
LM_EVAL_FOLDERS = ("arc", "blimp", "hellaswag", "lambada", "openbookqa", "piqa", "sciq", "super_glue",
                   "wikitext", "winogrande")  # fmt: skip


@pytest.fixture
def few_tasks(monkeypatch):
    """Who asks for lm-eval's index of thousands of files, which takes seconds to read, gets these tasks."""
    from lm_eval import tasks as upstream

    real, there = upstream.TaskManager, Path(upstream.__file__).parent

    def manager(include_path=(), include_defaults=True, **settings):
        paths = [include_path] if isinstance(include_path, str) else [*include_path]
        if include_defaults:
            paths += [str(there / folder) for folder in LM_EVAL_FOLDERS]
        return real(include_path=paths, include_defaults=False, **settings)

    monkeypatch.setattr(upstream, "TaskManager", manager)
