"""A checkpoint for people without this package: weights, tokenizer, and the model's code as three files."""

from .folder import export, files_with_code, write_remote_code

__all__ = ["export", "files_with_code", "write_remote_code"]
