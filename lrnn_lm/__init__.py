"""lrnn-lm: pretraining language models built on linear recurrent networks with rich state mixing.

Importing it makes transformers' `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know `model_type: lrnn`.
Torch and transformers themselves are imported when one of the names below is first asked for; docs/api.md has
an example of each.
"""

import importlib
from typing import Any

from .api import HOMES
from .registration import register
from .version import __version__

__all__ = [*HOMES, "__version__"]

register()


def __getattr__(name: str) -> Any:
    if name in HOMES:
        module = importlib.import_module(f"lrnn_lm.{HOMES[name] or name}")
        return getattr(module, name) if HOMES[name] else module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
