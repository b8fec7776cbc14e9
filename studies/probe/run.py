"""`lrnn eval CHECKPOINT.. --length 16x --recall`: what the command line calls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .length import probe_lengths
from .recall import probe_recall


def probe(checkpoints: Sequence[str | Path], length: str | None, recall: bool, **options: Any) -> None:
    """Probe each checkpoint at rows of `length`, and all side by side with `recall`; options: of both."""
    if length is not None:
        probe_lengths(checkpoints, length, **options)
    if recall:
        probe_recall(checkpoints, **options)
