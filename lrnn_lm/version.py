"""The version, once: pyproject.toml reads it from here, and exported checkpoints name it."""

__version__ = "0.1.0"
