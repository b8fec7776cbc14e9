"""lrnn-lm: pretraining language models built on linear recurrent networks with rich state mixing.

Importing it makes transformers' `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know `model_type: lrnn`.
Torch and transformers themselves are imported when one of the classes below is first asked for.
"""

from typing import Any

from .registration import register

__version__ = "0.1.0"
__all__ = ["LRNNConfig", "LRNNForCausalLM", "LRNNModel"]

register()


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
