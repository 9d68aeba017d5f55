"""A file being received into a folder that is being built."""

from __future__ import annotations

import os
from contextlib import suppress
from types import TracebackType

from adapterhub_tools.store.directory import StagedDirectory, flush, write_all

_WRITE_BACK_BYTES = 16 << 20


class StagedFile:
    """A new file in a StagedDirectory, as a Sink; flushed to the device on leaving the ``with`` block."""

    def __init__(self, staged: StagedDirectory, relative: str) -> None:
        self._staged = staged
        self._relative = relative
        self._fd = -1
        self._pending = 0

    def __enter__(self) -> StagedFile:
        """Creates the file.

        Raises:
            StoreError: it cannot be made.
        """
        self._fd = self._staged.create(self._relative)
        return self

    def write(self, data: bytes) -> None:
        """Writes the next bytes.

        Raises:
            StoreError: the disk is full or failing.
        """
        try:
            write_all(self._fd, data)
        except OSError as error:
            raise self._staged.error(error, "write it", self._relative) from error
        self._pending += len(data)
        if self._pending >= _WRITE_BACK_BYTES and hasattr(os, "posix_fadvise"):
            # The kernel begins to write these pages now, so that little is left to wait for at the end.
            with suppress(OSError):  # advice only
                end = os.lseek(self._fd, 0, os.SEEK_CUR)
                os.posix_fadvise(self._fd, end - self._pending, self._pending, os.POSIX_FADV_DONTNEED)
            self._pending = 0

    def restart(self) -> None:
        """Empties the file."""
        try:
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
        except OSError as error:
            raise self._staged.error(error, "empty it", self._relative) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flushes and closes the file."""
        try:
            if kind is None:
                flush(self._fd)
                self._staged.mark_synced(self._relative)
        except OSError as failure:
            raise self._staged.error(failure, "write it", self._relative) from failure
        finally:
            os.close(self._fd)
