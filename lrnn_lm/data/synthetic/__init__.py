"""Synthetic tasks, their rows made as they are read: state tracking, formal languages, MAD."""
