"""What the fork server of `forks.py` has imported and computed before it forks a child."""

import atexit
import gc
from importlib import import_module

from lrnn_lm.model.export.remote_code import remote_code

for name in ("cli", "train.build", "evaluate.harness", "evaluate.reporting.card"):
    import_module(f"lrnn_lm.{name}")
remote_code()  # 1.4 s, at the end of each run
gc.freeze()  # children neither look through these objects nor copy their pages
atexit.register(gc.unfreeze)
