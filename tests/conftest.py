"""What has to be set before torch and triton are imported, here and in the processes that tests start.

One thread a process: `make test` runs a process a core, small tensors are faster so, and sums come in the
same order in every process, so that runs can be compared bit by bit. Without a GPU, Triton kernels are tested
in Triton's interpreter.
"""

import gc
import os
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"  # which is torch's number of threads, too

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    """Triton's interpreter replaces the language anew in each call of a kernel's functions, which takes half
    of the time: let it do so once a launch for each module."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # ids of the modules' globals

    def patch_once(function: Callable) -> object:
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    def start(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, start


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported by now stays, so leave it out of garbage collection: a trainer begins with a full one,
    which takes half a second through all of that. Trainers freeze nothing here, as they end first."""
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def pytest_unconfigure(config: pytest.Config, unfreeze=gc.unfreeze) -> None:
    """Let Triton's objects go before its library does, which complains of those that are left."""
    unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def full_manager():
    """lm-eval's index of everything takes seconds to read: once a process."""
    from lm_eval.tasks import TaskManager

    from lrnn_lm.evaluate.tasks.names import own_tasks_path

    return TaskManager(include_path=str(own_tasks_path()))


@pytest.fixture
def read_once(full_manager, monkeypatch):
    """Whoever asks for the whole index gets the one that was read."""
    from lm_eval import tasks as upstream

    real = type(full_manager)

    def manager(include_defaults=True, **settings):
        return full_manager if include_defaults else real(include_defaults=False, **settings)

    monkeypatch.setattr(upstream, "TaskManager", manager)
