"""Judging a checkpoint: lm-eval tasks, offline held-out tasks, generated text, and reports over runs."""

from .generate import generate
from .harness import check_tasks, evaluate
from .reporting.report import report

__all__ = ["check_tasks", "evaluate", "generate", "report"]
