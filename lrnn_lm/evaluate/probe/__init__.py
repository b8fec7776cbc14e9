"""Probes of a checkpoint beyond its scores: long rows, and what the context already holds."""
