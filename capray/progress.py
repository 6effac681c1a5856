"""How long work shows itself: a bar on a terminal, plain lines in a job's log. Drawn by rich, to standard error."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


def duration(seconds: float | None) -> str:
    """Seconds as ``1:02:03`` or ``2:03``; ``?`` when unknown."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressDisplay:
    """One task's progress: ``update`` as often as you like, ``say`` for lines that stay."""

    def __init__(self, description: str, total: float | None = None):
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("time left"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            speed_estimate_period=60,
        )
        self._task = self._bar.add_task(description, total=total, figures="")
        self._last_line = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def update(self, completed: float, figures: str, description: str | None = None, total: float | None = None) -> None:
        """Show ``completed`` of the total and ``figures`` beside it."""
        self._bar.update(self._task, completed=completed, figures=figures, description=description, total=total)
        if not self._console.is_terminal and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            task = self._bar.tasks[0]
            self._console.print(f"{task.description}  {figures}  time left {duration(task.time_remaining)}", markup=False)

    def say(self, line: str) -> None:
        self._console.print(line, markup=False)
