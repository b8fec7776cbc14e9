"""Pretraining on Accelerate: assembly, the loop, exact checkpoints. As a function, `api.train`."""

from ..api import make_callable

make_callable(__name__, "lrnn_lm.api", "train")
