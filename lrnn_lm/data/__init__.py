"""Text to (B, T) batches of tokens at an exact position: sources, tokenizers, memory-mapped shards, rows,
loaders.
"""

from .loader import TrainLoader, validation_batches
from .prepare import PreparedData, open_prepared, prepare
from .shards import TokenShards
from .specs import DataError, DataSpec, SourceSpec, SyntheticSpec
from .synthetic.prepare import SyntheticData, prepare_synthetic
from .synthetic.tasks import MAD_TASKS, STATE_TASKS, SYNTHETIC_TASKS, SyntheticRows, SyntheticTask
from .tokenize import tokenizer_hash

__all__ = [
    "MAD_TASKS",
    "STATE_TASKS",
    "SYNTHETIC_TASKS",
    "DataError",
    "DataSpec",
    "PreparedData",
    "SourceSpec",
    "SyntheticData",
    "SyntheticRows",
    "SyntheticSpec",
    "SyntheticTask",
    "TokenShards",
    "TrainLoader",
    "open_prepared",
    "prepare",
    "prepare_synthetic",
    "tokenizer_hash",
    "validation_batches",
]
