"""Rows of T tokens and their targets, cut from the stream of documents.

Row r reads positions r*T .. r*T+T of the stream (T+1 tokens): its last target is the next row's first input.
    input_ids (T,)  int64
    labels    (T,)  int64, the next token; -100 where that token starts another document
    reset     (T,)  bool, true where a document starts: the state is cleared there
"""

import numpy as np
import torch

from .shards import TokenShards

IGNORED = -100
Row = dict[str, torch.Tensor]


class PackedRows(torch.utils.data.Dataset[Row]):
    """The rows of a split. With `keep_tail` the last, short row is padded and masked, else dropped."""

    def __init__(self, shards: TokenShards, sequence_length: int, keep_tail: bool = False) -> None:
        self.shards = shards
        self.sequence_length = sequence_length
        targets = max(shards.num_tokens - 1, 0)
        self.num_rows = -(-targets // sequence_length) if keep_tail else targets // sequence_length

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> Row:
        T = self.sequence_length
        start = row * T
        tokens = self.shards.read(start, start + T + 1)  # (T+1,), shorter in the tail
        starts = self.shards.document_starts(start, start + T + 1)
        used = len(tokens) - 1
        input_ids = np.zeros(T, np.int64)
        labels = np.full(T, IGNORED, np.int64)
        reset = np.zeros(T, np.bool_)
        input_ids[:used] = tokens[:-1]
        labels[:used] = tokens[1:]
        labels[starts[starts > 0] - 1] = IGNORED
        reset[starts[starts < T]] = True
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "reset": torch.from_numpy(reset),
        }


def collate(rows: list[Row]) -> Row:
    """Rows (T,) to a batch (b, T)."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
