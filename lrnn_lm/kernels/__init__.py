"""Tensors in, tensors out: the two recurrences, from the specification to the fastest path."""

from .dispatch import BACKENDS, block_diagonal_scan, higher_order_scan
from .gates import GATES, check_gate, normalise

__all__ = ["BACKENDS", "GATES", "block_diagonal_scan", "check_gate", "higher_order_scan", "normalise"]
