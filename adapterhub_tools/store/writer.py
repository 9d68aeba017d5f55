"""Writing large files at given offsets without filling the page cache.

The kernel lets dirty pages pile up and then makes the writer pay for them all at once; on a file of several
gigabytes most of a merge's time went there. Starting the write-back of each range as soon as it is written,
and dropping the pages once they are on the disk, keeps the cost flat (benchmarks/merge.py). Both calls are
optional: where the platform lacks them, writing works the same and fsync does the rest.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterhub_tools.errors import StoreError

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
LAG_BYTES = 32 << 20
"""How much may be on its way to the disk before the oldest range is waited for and dropped from the cache."""


def _load_sync_file_range() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_SYNC_FILE_RANGE = _load_sync_file_range()
_NOT_POSSIBLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ESPIPE)
"""What an optional call fails with where the platform or the file system cannot do it."""


class RangeWriter:
    """A new file of known length that several threads fill.

    Args:
        path: the file; must not exist.
        length: its final length in bytes.
        drop_pages: True to drop written pages from the page cache.
    """

    def __init__(self, path: Path, length: int, *, drop_pages: bool) -> None:
        """Creates the file and reserves its space, so that a full disk is known at once."""
        self.path = path
        self._drop = drop_pages
        self._lock = threading.Lock()
        self._pending: deque[tuple[int, int]] = deque()
        self._lag = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if length and hasattr(os, "posix_fallocate"):
                with self._named():
                    self._reserve(length)
        except OSError:
            self.close()
            raise

    def write(self, data: memoryview, offset: int) -> None:
        """Writes all of ``data`` at ``offset`` and starts its way to the disk.

        Raises:
            OSError: the disk is full or broken; names this file, and the staged directory maps it.
        """
        view, at = data, offset
        while len(view):
            with self._named():
                done = os.pwrite(self._fd, view, at)
            if done == 0:
                raise StoreError.of(
                    "write", "the system wrote nothing.", file=str(self.path), remedy="Try again."
                )
            view, at = view[done:], at + done
        if _SYNC_FILE_RANGE is None:
            return
        self._write_back(offset, len(data), _WRITE)
        with self._lock:
            self._pending.append((offset, len(data)))
            self._lag += len(data)
            oldest = []
            while self._lag > LAG_BYTES:
                oldest.append(self._pending.popleft())
                self._lag -= oldest[-1][1]
        for start, length in oldest:
            self._write_back(start, length, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            self._drop_pages(start, length)

    def finish(self) -> None:
        """Waits until everything is on the disk, and closes the file.

        Raises:
            OSError: the device refused; names this file.
        """
        with self._named():
            os.fsync(self._fd)
        self._drop_pages(0, 0)
        self.close()

    def close(self) -> None:
        """Closes the file, finished or not; a second call does nothing.

        Raises:
            OSError: the file system reports a failed write only now; names this file.
        """
        if self._fd >= 0:
            fd, self._fd = self._fd, -1  # closed even if the call fails
            with self._named():
                os.close(fd)

    def _reserve(self, length: int) -> None:
        try:
            os.posix_fallocate(self._fd, 0, length)
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise

    def _write_back(self, start: int, length: int, flags: int) -> None:
        """Calls sync_file_range; its errors count, since the kernel tells each only once, fsync included."""
        if _SYNC_FILE_RANGE is None or _SYNC_FILE_RANGE(self._fd, start, length, flags) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NOT_POSSIBLE:
            raise OSError(code, os.strerror(code), str(self.path))

    def _drop_pages(self, start: int, length: int) -> None:
        if self._drop and hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # advice only
                os.posix_fadvise(self._fd, start, length, os.POSIX_FADV_DONTNEED)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Adds this file's path to an error of a call on its descriptor."""
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise
