"""How tables are printed: the console, and numbers of any size in few characters."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def table_console() -> "Console":
    """A console on stdout: as wide as the terminal, and 120 columns in a log, where there is none to fit."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def decimal(number: float | None) -> str:
    """Four decimals, or four figures of a large number (an untrained model's perplexity); '' for None."""
    if number is None:
        return ""
    return f"{number:.4f}" if abs(number) < 1e6 else f"{number:.4g}"
