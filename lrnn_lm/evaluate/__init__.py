"""Scores of a checkpoint on lm-eval and offline tasks, generated text, and reports over runs.

Called as a function it is `evaluate.harness.evaluate`.
"""

from ..callable_package import make_callable
from .generate import generate
from .harness import check_tasks, evaluate
from .reporting.report import report

__all__ = ["check_tasks", "evaluate", "generate", "report"]
make_callable(__name__, "lrnn_lm.evaluate.harness", "evaluate")
