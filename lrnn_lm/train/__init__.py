"""Pretraining on Accelerate: assembly, the loop, exact checkpoints. As a function, `api.train`."""

from ..callable_package import make_callable

make_callable(__name__, "lrnn_lm.api", "train")
