"""The one table of tolerances of the model's tests; the scans have theirs in kernels/scans.py.

Each is the largest absolute difference allowed between two ways to compute the same fp32 numbers of order 1.
"""

TOLERANCE = {
    "same numbers": 0.0,
    "other order of sums": 2e-5,  # segments, padding, packing: the same products in other shapes
    "gradient": 1e-4,  # relative to the largest entry
    "bf16": 5e-2,
}
