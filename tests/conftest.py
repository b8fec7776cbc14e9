"""What has to be set before torch and triton are imported, here and in the processes that tests start.

One thread a process: `make test` runs a process a core, small tensors are faster so, and sums come in the
same order in every process, so that runs can be compared bit by bit. Without a GPU, Triton kernels are tested
in Triton's interpreter.
"""

import gc
import os
from collections.abc import Callable
from pathlib import Path

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
