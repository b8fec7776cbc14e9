"""Measurements on a GPU, each a script."""
