"""Benchmarks: each one run that measures its contenders side by side and writes JSON."""
