"""Text to (B, T) batches of tokens at an exact position: sources, tokenizers, memory-mapped shards, rows,
loaders.
"""

from .loader import TrainLoader, validation_batches
from .prepare import PreparedData, open_prepared, prepare
from .shards import TokenShards
from .specs import DataError, DataSpec, SourceSpec
from .tokenize import tokenizer_hash

__all__ = [
    "DataError",
    "DataSpec",
    "PreparedData",
    "SourceSpec",
    "TokenShards",
    "TrainLoader",
    "open_prepared",
    "prepare",
    "tokenizer_hash",
    "validation_batches",
]
