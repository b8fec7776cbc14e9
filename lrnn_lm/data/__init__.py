"""Text to (B, T) batches of tokens, from any position on: sources, tokenizers, shards, loaders."""

from .loader import TrainLoader, validation_batches
from .prepare import PreparedData, open_prepared, prepare, prepare_all
from .shards import TokenShards
from .specs import DataError, DataSpec, SourceSpec
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
    "SyntheticTask",
    "TokenShards",
    "TrainLoader",
    "open_prepared",
    "prepare",
    "prepare_all",
    "prepare_synthetic",
    "tokenizer_hash",
    "validation_batches",
]
