"""The Hugging Face model: configuration, modelling, states, loss, accounting.

Its classes are imported when first asked for: transformers' auto modules ask for the configuration while they
are themselves being imported, when the modelling file could not be imported yet.
"""

import importlib
from typing import Any

from ..requirements import check_transformers

check_transformers()

_HOMES = {
    "LRNNConfig": "config",
    "LRNNForCausalLM": "modeling",
    "LRNNForReconstruction": "autoencoder",
    "LRNNForSequenceClassification": "classification",
    "LRNNForTokenClassification": "classification",
    "LRNNModel": "modeling",
    "LRNNPreTrainedModel": "modeling",
    "copy_states": "states",
    "drop_states": "states",
    "load_states": "states",
    "prefill": "decoding.long_input",
    "save_states": "states",
}
__all__ = list(_HOMES)
_MOVED = {"decode": "decoding.decode"}  # modules that are used from outside under their old names


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MOVED:
        return importlib.import_module(f".{_MOVED[name]}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
