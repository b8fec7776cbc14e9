"""A model for people without this package: its code as three files, or its graphs for ONNX."""

from .remote_code import write_remote_code

__all__ = ["write_remote_code"]
