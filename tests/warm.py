"""What the fork server of `forks.py` has imported and computed before it forks a child."""

import atexit
import gc
from importlib import import_module

# With lm-eval, which takes 1.4 s in each process that scores something.
SCORING = ("harness", "live", "lm", "reconstruction", "reporting.card", "tasks.synthetic")


def warm() -> None:
    from torch.utils.collect_env import get_pretty_env_info

    from lrnn_lm.evaluate.scoring import described
    from lrnn_lm.model.export.remote_code import remote_code

    for name in ("cli", "train.build", *(f"evaluate.{name}" for name in SCORING)):
        import_module(f"lrnn_lm.{name}")
    import_module("lm_eval.evaluator")
    for mixers in ({"bd_lru"}, {"bd_lru", "attention"}):
        remote_code(frozenset(mixers))  # 1.2 s, at the end of each run
    described(get_pretty_env_info)  # 0.7 s, with each scoring of tasks


gc.disable()  # what imports make stays, so collections find nothing
warm()
gc.enable()
gc.freeze()  # children neither look through these objects nor copy their pages
atexit.register(gc.unfreeze)
