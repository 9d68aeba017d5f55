"""Progress on a terminal: bytes, rate and time left. In a pipe nothing is shown."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

import click

from adapterhub_tools.model.protocols import Progress, SilentProgress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from adapterhub_tools.cli.output import Output

_INTERVAL_SECONDS = 0.1


def progress_for(output: Output) -> Progress:
    """Returns a display if standard error is a terminal and text is wanted, else one that shows nothing."""
    if output.as_json or output.quiet or not sys.stderr.isatty():
        return SilentProgress()
    display = TerminalProgress()
    context = click.get_current_context(silent=True)
    if context is not None:  # after an error too: the cursor is hidden until then
        context.call_on_close(display.finish)
    return display


class TerminalProgress:
    """A bar on standard error; safe to advance from several threads."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._lock = threading.Lock()
        self._pending = 0
        self._shown = 0.0

    def start(self, what: str, total_bytes: int) -> None:
        """A phase of ``total_bytes`` begins; a phase that is still open ends."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self.finish()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total_bytes)
        self._bar.start()

    def advance(self, nbytes: int) -> None:
        """``nbytes`` more are done; the display is told ten times a second, since each update costs time."""
        with self._lock:
            self._pending += nbytes
            now = time.monotonic()
            if now - self._shown < _INTERVAL_SECONDS or self._bar is None or self._task is None:
                return
            self._bar.update(self._task, advance=self._pending)
            self._pending, self._shown = 0, now

    def finish(self) -> None:
        """The phase is over: the bar disappears."""
        with self._lock:
            bar, self._bar, self._task, self._pending = self._bar, None, None, 0
        if bar is not None:
            bar.stop()
