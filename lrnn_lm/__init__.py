"""lrnn-lm: pretraining language models built on linear recurrent networks with rich state mixing.

Importing it makes transformers' `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know `model_type: lrnn`.
Torch and transformers themselves are imported when one of the names below is first asked for; docs/api.md has
an example of each.
"""

from typing import Any

from .api import HOMES, public
from .registration import register
from .version import __version__

__all__ = [*HOMES, "__version__"]

register()


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return public(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
