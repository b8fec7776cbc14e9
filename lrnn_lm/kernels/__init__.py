"""Tensors in, tensors out: the recurrences, from the specification to the fastest path."""

from .derivatives import is_written_out, no_second_derivatives, written_out
from .dispatch import (
    BACKENDS,
    block_diagonal_scan,
    higher_order_scan,
    plane_width,
    runs_fused,
    scan_packed,
)
from .gates import GATES, check_gate, normalise
from .scan.gru import gru_scan, slstm_scan
from .scan.m2rnn import m2rnn_scan
from .scan.matrix_scan import matrix_scan

__all__ = [
    "BACKENDS",
    "GATES",
    "block_diagonal_scan",
    "check_gate",
    "gru_scan",
    "higher_order_scan",
    "is_written_out",
    "m2rnn_scan",
    "matrix_scan",
    "no_second_derivatives",
    "normalise",
    "plane_width",
    "runs_fused",
    "scan_packed",
    "slstm_scan",
    "written_out",
]
