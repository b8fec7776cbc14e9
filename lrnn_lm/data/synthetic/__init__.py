"""Synthetic tasks, whose rows are made when they are read: state tracking, formal languages, MAD."""
