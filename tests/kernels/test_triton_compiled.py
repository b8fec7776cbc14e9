"""What the interpreter does not see of the Triton kernels: whether they compile, under which key, and when
they are imported.
"""

import os
import re
from pathlib import Path

import pytest
from forks import LIBRARIES

import lrnn_lm.kernels

pytest.importorskip("triton")


def test_importing_the_kernels_does_not_import_triton():
    code = (
        "import sys, lrnn_lm.kernels as k, torch;"
        "k.block_diagonal_scan(torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1));"
        "assert not [m for m in sys.modules if m.startswith('lrnn_lm.kernels.scan.triton')]"
    )
    done = LIBRARIES.run(code)
    assert done.returncode == 0, done.stderr


def compile_for_hopper(what: str, cache: Path) -> set[str]:
    """The kernels that compile_only.py compiled, by what Triton keeps in `cache`."""
    script = Path(__file__).with_name("compile_only.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = LIBRARIES.run(code, what, env=environment | {"TRITON_CACHE_DIR": str(cache)})
    assert done.returncode == 0, done.stdout + done.stderr
    return {*done.stdout.splitlines()[-1].split()}


def test_every_kernel_compiles_for_hopper_without_a_gpu(pytestconfig):
    """At the smallest sizes; the sizes that differ are below.

    What is compiled is kept for the next run, by the text of a kernel and of all that it calls, and by
    Triton's version: 35 s of CPU time the first time.
    """
    written = {
        f"{file.stem}.{name}"
        for file in Path(lrnn_lm.kernels.__file__).parent.rglob("*.py")
        for name in re.findall(r"^def (\w*_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert compile_for_hopper("smallest", pytestconfig.cache.mkdir("hopper")) == written


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiles_for_hopper_without_a_gpu(tmp_path):
    """Sizes, dtypes and gates that compile differently; also, that a new T compiles nothing."""
    compile_for_hopper("everything", tmp_path)


def test_a_kernels_cache_key_does_not_depend_on_what_ran_before():
    """Else what one process has compiled, the next compiles again (Triton 3.6; 3.9 takes care itself)."""
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "from lrnn_lm.kernels.scan import higher_order_kernels as h, block_diagonal_kernels as bd\n"
        "from lrnn_lm.kernels.scan import chunk_transfer as c\n"
        "kernels = [bd.forward_kernel, bd.backward_kernel, h.forward_kernel, h.backward_kernel,"
        " c.block_transfer_kernel, c.channel_transfer_kernel]\n"
        "for step in (1, -1):\n"
        "    if not os.fork():\n"  # two processes that have run nothing, for one import of torch
        "        keys = {k.cache_key: k for k in kernels[::step]}\n"
        "        print([k.cache_key for k in kernels], flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
    )
    done = LIBRARIES.run(code)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    assert len(set(first.split(", "))) == 6
