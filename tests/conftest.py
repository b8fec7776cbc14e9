"""What has to be set before torch and triton are imported, here and in the processes that tests start.

One thread a process: `make test` runs a process a core, small tensors are faster so, and sums come in the
same order in every process, so that runs can be compared bit by bit. Without a GPU, Triton kernels are tested
in Triton's interpreter.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # which is torch's number of threads, too

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
