"""The scans in Triton, and the scan of a matrix-valued state. Triton is imported when a scan runs in it."""
