"""What a person sees of a run: a progress bar on a terminal, elsewhere a line every 15 seconds."""

import math
import time

from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..recipe import Recipe, format_count

_LINE_SECONDS = 15.0  # between lines where there is no terminal


class ProgressLine:
    """Loss, speed and time left; silent on every rank but the main one."""

    def __init__(self, console: Console, recipe: Recipe, first_step: int, accelerator: Accelerator):
        self._console, self._total = console, recipe.total_steps
        self._tokens_at = recipe.tokens_at
        self._speaks = accelerator.is_main_process
        self._draws = self._speaks and console.is_terminal
        ranks = accelerator.num_processes
        self._ranks = f" ({ranks} ranks)" if ranks > 1 else ""
        self._first, self._loss, self._speed = first_step, math.nan, math.nan
        self._spoke = self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._draws,
        )
        self._task = self._bar.add_task(
            recipe.name, total=self._total, completed=first_step, loss=math.nan, speed=0.0
        )

    def __enter__(self) -> "ProgressLine":
        if self._speaks and 0 < self._first < self._total:
            self._console.print(f"resuming from step {self._first} of {self._total}{self._ranks}")
        self._bar.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._bar.stop()

    def step(self, step: int, loss: float, speed: float, applied: bool, outlier: bool = False) -> None:
        """Show a logged step; speed in tokens a second, smoothed here like the loss."""
        if not self._speaks:
            return
        self._speed = speed if math.isnan(self._speed) else 0.9 * self._speed + 0.1 * speed
        if not applied:
            why = "far above the last ones" if outlier else "not finite"
            self._console.print(f"[yellow]step {step} skipped: its loss or gradient is {why}")
        else:
            self._loss = loss if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * loss
        self._bar.update(self._task, completed=step, loss=self._loss, speed=self._speed)
        if not self._draws and (time.monotonic() - self._spoke > _LINE_SECONDS or step == self._total):
            self._spoke = time.monotonic()
            left = (self._total - step) * (self._spoke - self._began) / max(1, step - self._first)
            tokens = format_count(self._tokens_at(step))
            self._console.print(
                f"step {step}/{self._total}  {tokens} tokens  loss {self._loss:.3f}  "
                f"{self._speed:,.0f} tokens/s  {left:.0f} s left"
            )

    def warn(self, words: str) -> None:
        """Print a line of what went wrong without ending the run."""
        self.say(f"[yellow]{escape(words)}")

    def say(self, words: str) -> None:
        """Print a line, such as what a validation found."""
        if self._speaks:
            self._console.print(words, soft_wrap=True)
