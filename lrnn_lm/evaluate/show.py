"""How tables are printed: the console, and numbers of any size in few characters, or none in JSON."""

import io
import math
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def table_console() -> "Console":
    """A console on stdout: as wide as the terminal, and 120 columns in a log, where there is none to fit.

    What stdout's encoding cannot write (the ± of ASCII) comes out as `?`: the work is done and written.
    """
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def decimal(number: float | None) -> str:
    """Four decimals, or four figures of a large number (an untrained model's perplexity); '' for None."""
    if number is None:
        return ""
    return f"{number:.4f}" if abs(number) < 1e6 else f"{number:.4g}"


def finite(facts: Any) -> Any:
    """The same with null for what is no number, which JSON has no word for: a state may have diverged."""
    if isinstance(facts, dict):
        return {key: finite(value) for key, value in facts.items()}
    if isinstance(facts, list):
        return [finite(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts
