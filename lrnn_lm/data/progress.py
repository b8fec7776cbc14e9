"""A line that shows how far `prepare` is: documents, tokens, megabytes a second."""

import time

from ..output import error_console


class Progress:
    """A context that draws on standard error; silent unless `visible`."""

    def __init__(self, visible: bool) -> None:
        from rich.progress import Progress as Bar
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[counts]}"))
        self._bar = Bar(*columns, TimeElapsedColumn(), console=error_console(), disable=not visible)
        self.stage("")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._show()
        self._bar.live.transient = error is not None  # leave only the error message on the screen
        if not self._bar.disable:  # rich 13 prints an empty line even where it is disabled
            self._bar.stop()

    def stage(self, name: str) -> None:
        """Start a new line."""
        self._documents = self._tokens = self._bytes = 0
        self._started = time.monotonic()
        for task in self._bar.task_ids:
            self._bar.stop_task(task)
        self._task = self._bar.add_task(name, total=None, counts="", visible=bool(name))

    def advance(self, tokens: int, size: int, documents: int = 1) -> None:
        """Count documents of `tokens` tokens and `size` bytes."""
        self._documents += documents
        self._tokens += tokens
        self._bytes += size
        if self._documents % 50 == 0:
            self._show()

    def _show(self) -> None:
        if self._documents:
            rate = self._bytes / 1e6 / max(time.monotonic() - self._started, 1e-3)
            counts = f"{self._documents:,} documents, {self._tokens:,} tokens, {rate:.1f} MB/s"
            self._bar.update(self._task, counts=counts)
