"""Jobs for a cluster: `lrnn submit`."""

from .submit import submit

__all__ = ["submit"]
