"""`pytest -p tests.early`: each process of pytest-xdist forks the servers of `forks.py` from itself.

It does so before pytest sets anything up, between imports that its tests need in any case. So it imports
the libraries once; each server took up to 8 s of a core to import them again. Without this, as where tests
are run by hand, a server starts when it is first asked.
"""

import gc
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    gc.disable()  # as in conftest.py, until the tests are collected
    sys.path.insert(0, str(Path(__file__).parent))
    import forks

    forks.fork_all()
