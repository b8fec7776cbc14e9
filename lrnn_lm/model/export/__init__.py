"""A checkpoint for people without this package: weights, tokenizer, and the model's code as three files."""

from .folder import export, write_remote_code

__all__ = ["export", "write_remote_code"]
