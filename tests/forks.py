"""Children of servers that have imported the libraries: a command without the seconds that its imports take.

    run_lrnn("info", recipe)        the command line, forked from a server that has imported all of lrnn_lm
    run_code(CODE, folder)          Python text, likewise
    LIBRARIES.run(CODE, folder)     likewise, from a server with torch and transformers, but neither Triton
                                    nor lrnn_lm

For what a start-up itself does (locale, variables that a library reads as it is imported), start a process.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest.mock import patch

TESTS = Path(__file__).parent
PATH = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
LRNN = "from lrnn_lm.cli import main; main()"


@cache
def server() -> ForkServerContext:
    """The warm server of this process."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    with patch.dict(os.environ, PYTHONPATH=PATH):
        forkserver.ensure_running()
    return context


def run_lrnn(*words: object, **options) -> subprocess.CompletedProcess[str]:
    return run_code(LRNN, *words, **options)


def run_code(code: str, *words: object, timeout: float = 120, **options) -> subprocess.CompletedProcess[str]:
    """Python text with these arguments, in a child of the warm server; `options` are those of `_order`."""
    with _order(code, words, **options) as order:
        child = server().Process(target=become, args=(order,))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            raise AssertionError(f"still running after {timeout} s: {Path(order['err']).read_text()}")
        return _completed(order, child.exitcode)


class Server:
    """A server that has run some code; started when it is first asked."""

    def __init__(self, first: str):
        self._first = first
        self._process: subprocess.Popen[str] | None = None

    def run(self, code: str, *words: object, **options) -> subprocess.CompletedProcess[str]:
        """Python text with these arguments, in a child."""
        if self._process is None:
            quiet, frozen = "import gc; gc.disable()", "gc.freeze(); gc.enable()"  # as in conftest.py
            lines = [quiet, self._first, frozen, "import forks; forks.serve()"]
            command = [sys.executable, "-c", "\n".join(lines)]
            env = os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
            )
        with _order(code, words, **options) as order:
            print(json.dumps(order), file=self._process.stdin, flush=True)
            return _completed(order, int(self._process.stdout.readline()))


# Also what a first model imports, which takes three seconds. Torch's compiler would import Triton with it.
LIBRARIES = Server("""
import sys
sys.modules["triton"] = None
import transformers.generation.utils, transformers.modeling_utils
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from torch.utils._triton import has_triton_package
del sys.modules["triton"]
has_triton_package.cache_clear()
""")


@contextmanager
def _order(
    code: str, words: tuple, env: Mapping[str, str] | None = None, cwd: Path | None = None, stdin: str = ""
) -> Iterator[dict]:
    """What a child is told: its files, folder and environment; by default this process's."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder, name)) for name in ("in", "out", "err")}
        Path(files["in"]).write_text(stdin)
        env = dict(os.environ if env is None else env)
        yield {
            "code": code,
            "words": [str(word) for word in words],
            "env": env,
            "cwd": str(cwd or ""),
            **files,
        }


def _completed(order: dict, code: int) -> subprocess.CompletedProcess[str]:
    said = [Path(order[name]).read_text() for name in ("out", "err")]
    return subprocess.CompletedProcess(order["words"], code, *said)


def serve() -> None:
    """In the server: fork a child for every line, answer with its exit code."""
    for line in sys.stdin:
        if not (child := os.fork()):
            code = 1
            try:
                become(json.loads(line))
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(order: dict) -> None:
    """In a child: do what is ordered."""
    os.environ.clear()
    os.environ.update(order["env"])
    if order["cwd"]:
        os.chdir(order["cwd"])
    for descriptor, name, flags in ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
        os.dup2(os.open(order[name], flags | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["-c", *order["words"]]
    exec(order["code"], {"__name__": "__main__"})
    sys.stdout.flush()
