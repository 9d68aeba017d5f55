"""The files that a piece of work reads: each opened once, when first asked for, and shared by its threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from adapterhub_tools.model.protocols import OpenSource


class Sources:
    """Open files by uri; safe to use from several threads.

    Args:
        opener: uri -> the open file, which is closed with this.
    """

    def __init__(self, opener: Callable[[str], OpenSource]) -> None:
        """Opens nothing yet."""
        self._opener = opener
        self._opened: dict[str, OpenSource] = {}
        self._lock = threading.Lock()

    def open(self, uri: str) -> OpenSource:
        """Returns a file, opened by whoever asks first.

        Raises:
            StoreError: it cannot be opened.
        """
        with self._lock:
            if uri not in self._opened:
                self._opened[uri] = self._opener(uri)
            return self._opened[uri]

    def check_unchanged(self) -> None:
        """Checks every file that was opened; see OpenSource."""
        for source in self._opened.values():
            source.check_unchanged()

    def close(self) -> None:
        """Closes every file that was opened; a second call does nothing."""
        with ExitStack() as stack:
            for source in self._opened.values():
                stack.callback(source.close)
            self._opened.clear()

    def __enter__(self) -> Sources:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files."""
        self.close()
