"""A folder that appears whole or not at all, whatever kills the program or the machine.

The output is built in a working folder beside it::

    .<name>.tmp-<random>/
        .lock       locked while its process lives; a working folder whose lock is free is left over, and
        removed new/        what becomes the output
        old/        what the output was, only while it is replaced without an atomic exchange

Each file and each folder is flushed to the device, the receipt or manifest last; then ``new`` takes the
output's name in one rename, or changes places with it in one exchange, and the folder that holds both is
flushed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.errors import Problem, StoreError
from adapterhub_tools.store.destination import check_destination, free_bytes
from adapterhub_tools.store.exchange import UNSUPPORTED_ERRORS, exchange
from adapterhub_tools.store.files import LocalFile, path_reason, store_error
from adapterhub_tools.store.working_folder import make_work, recover, remove_work

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_COPY_BYTES = 1024 * 1024


def stage(
    out: Path, *, inputs: Sequence[Path], replace: bool = False, allow_replace_gap: bool = False
) -> StagedDirectory:
    """Returns a context manager that builds a folder and, on ``commit``, puts it in its place.

    Args:
        out: the folder to make; it may exist if it is empty.
        inputs: what is read; the output may not overlap it.
        replace: a folder that is not empty may stand there; it is exchanged for the new one as a whole.
        allow_replace_gap: where the file system cannot exchange folders, rename the old one away first.
            Should the machine fail between the two renames, the output is missing until the next run restores
            the old one.

    Raises:
        StoreError: as ``check_destination``, which is asked again on entering.
    """
    check_destination(out, inputs=inputs, replace=replace)
    return StagedDirectory(out, inputs=inputs, replace=replace, allow_replace_gap=allow_replace_gap)


class StagedDirectory:
    """A folder being built; made by ``stage``. Before ``commit`` nothing is visible at its destination.

    Attributes:
        path: where its files are written meanwhile; valid inside the ``with`` block.
        left: working folders that could not be removed, to be told to the user.
    """

    def __init__(self, out: Path, *, inputs: Sequence[Path], replace: bool, allow_replace_gap: bool) -> None:
        self._asked = (out, tuple(inputs), replace)
        self._allow_gap = allow_replace_gap
        self._out = out
        self._work = out
        self._lock = -1
        self._existed = self._occupied = False
        self._can_exchange = True
        self._synced: set[str] = set()
        self.path: Path = out
        self.left: tuple[str, ...] = ()

    def __enter__(self) -> StagedDirectory:
        """Removes what killed runs left, checks the destination and makes the working folder.

        Raises:
            StoreError: as ``check_destination``; or the file system cannot exchange folders, and that is
                needed.
        """
        out, inputs, replace = self._asked
        recover(out)
        destination = check_destination(out, inputs=inputs, replace=replace)
        self._out, self._existed = destination.path, destination.exists
        self._occupied = destination.occupied
        self._work, self._lock = make_work(self._out)
        try:
            self.path = self._work / "new"
            os.mkdir(self.path)
            if self._occupied:
                self._probe_exchange()
        except OSError as error:
            self._remove()
            raise store_error(error, "make the working folder", self._work) from error
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes the working folder; without a commit the destination is as it was."""
        self._remove()

    def create(self, relative: str) -> int:
        """Creates a file, and the folders above it, and returns its descriptor, open for reading and writing.

        The caller closes it, and may call ``mark_synced`` after an fsync of its own.

        Raises:
            StoreError: the path leaves the folder, or the file exists or cannot be made.
        """
        reason = path_reason(relative)
        if reason:
            raise StoreError(Problem(kind="path", message=f"the path {reason}.", file=relative))
        target = self.path / relative
        try:
            os.makedirs(target.parent, exist_ok=True)
            # Mode 0666 less the umask, as any new file; the mode of what is copied does not matter.
            return os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self.error(error, "create it", relative) from error

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Writes a file and flushes it to the device.

        Raises:
            StoreError: as ``create``, or it cannot be written.
        """
        fd = self.create(relative)
        try:
            write_all(fd, data)
            flush(fd)
        except OSError as error:
            raise self.error(error, "write it", relative) from error
        finally:
            self._close(fd, relative)
        self._synced.add(relative)

    def copy_file(self, source: Path, relative: str) -> tuple[int, str]:
        """Copies a file's content, not its mode, and flushes it; a symbolic link is followed.

        Returns:
            The size in bytes and the SHA-256 in hexadecimal of what was written.

        Raises:
            FormatError: the source is not a regular file.
            StoreError: it cannot be read or changed meanwhile; or as ``write_bytes``.
        """
        import hashlib

        digest = hashlib.sha256()
        with LocalFile(source, name=str(source)) as reading:
            fd = self.create(relative)
            try:
                for start in range(0, reading.length, _COPY_BYTES):
                    piece = reading.read(start, min(_COPY_BYTES, reading.length - start))
                    digest.update(piece)
                    write_all(fd, piece)
                flush(fd)
            except OSError as error:
                raise self.error(error, "write it", relative) from error
            finally:
                self._close(fd, relative)
            reading.check_unchanged()
            self._synced.add(relative)
            return reading.length, digest.hexdigest()

    def mark_synced(self, relative: str) -> None:
        """Says that a file is written and flushed, so that ``commit`` need not flush it again."""
        self._synced.add(relative)

    def sync_tree(self) -> None:
        """Flushes every file that was not flushed yet, and every folder, to the device.

        Raises:
            StoreError: the device refused.
        """
        for folder, _, files in os.walk(self.path, topdown=False, onerror=self._unlisted):
            for file in files:
                relative = os.path.relpath(os.path.join(folder, file), self.path)
                if relative not in self._synced:
                    self._sync(self.path / relative)
                    self._synced.add(relative)
            self._sync(Path(folder))

    def commit(self, last: tuple[str, bytes] | None) -> None:
        """Writes the last file, flushes everything, and puts the folder in its place.

        Args:
            last: the path and content of the receipt or manifest, which names the files written before it;
                None for a folder that has none.

        Raises:
            StoreError: the destination is untouched; should even that be in doubt, the message says so.
        """
        # The receipt must not reach the device before what it vouches for.
        self.sync_tree()
        if last is not None:
            self.write_bytes(*last)
            self.sync_tree()
        self._sync(self._work)
        try:
            self._put_in_place()
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                message = "the output was made by another program meanwhile; it is untouched."
                remedy = "Choose another output, or run again with --replace."
                raise StoreError(
                    Problem(kind="exists", message=message, file=str(self._out), remedy=remedy)
                ) from error
            raise self.error(error, "put the output in its place", "") from error
        try:
            self._sync(self._out.parent)
            self._sync(self._work)
        except StoreError:
            self._take_back()
            raise

    def error(self, error: OSError, doing: str, relative: str) -> StoreError:
        """Returns the StoreError for a failed call on a file here; on a full disk, with the room left.

        Args:
            error: what the call raised.
            doing: the action, such as ``"write it"``.
            relative: the file, relative to the output; empty for the one that the error names, if it names
                one here, else for the output itself.
        """
        named = error.filename if isinstance(error.filename, str) else ""
        if not relative and named.startswith(f"{self.path}{os.sep}"):
            relative = os.path.relpath(named, self.path)
        return self._error_at(error, doing, self._out / relative)

    def _error_at(self, error: OSError, doing: str, path: Path) -> StoreError:
        shown = str(path)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return store_error(error, doing, shown)
        problem = store_error(error, doing, shown).problems[0]
        message = f"{problem.message} {free_bytes(self._out.parent):,} bytes are free."
        return StoreError(Problem(kind=problem.kind, message=message, file=shown, remedy=problem.remedy))

    def _put_in_place(self) -> None:
        if not self._occupied:
            # rename(2) replaces an empty folder and refuses any other, so a second writer cannot be
            # overwritten.
            os.rename(self.path, self._out)
        elif self._can_exchange:
            exchange(self.path, self._out)
        else:
            old = self._work / "old"
            os.rename(self._out, old)
            try:
                self._sync(self._work)
                os.rename(self.path, self._out)
            except BaseException:
                os.rename(old, self._out)
                raise

    def _take_back(self) -> None:
        """Undoes the last step of a commit that may not have reached the device."""
        old = self._work / "old"
        try:
            if self._occupied and self._can_exchange:
                exchange(self.path, self._out)
                return
            os.rename(self._out, self.path)
            if old.exists():
                os.rename(old, self._out)
            elif self._existed:
                os.mkdir(self._out)
        except OSError as error:
            message = "the new output is in place, but may not survive a power failure."
            remedy = "Check the device, then run again with --replace."
            raise StoreError(
                Problem(kind="not-durable", message=message, file=str(self._out), remedy=remedy)
            ) from error

    def _probe_exchange(self) -> None:
        """Finds out, before any work, whether this file system can exchange folders."""
        probes = (self._work / "probe-a", self._work / "probe-b")
        for probe in probes:
            os.mkdir(probe)
        try:
            exchange(*probes)
        except OSError as error:
            if error.errno not in UNSUPPORTED_ERRORS:
                raise
            self._can_exchange = False
            if not self._allow_gap:
                message = "this file system cannot exchange two folders in one step."
                remedy = "Choose a new output, or allow a moment without any with --allow-replace-gap."
                raise StoreError(
                    Problem(kind="no-exchange", message=message, file=str(self._out), remedy=remedy)
                ) from error
        for probe in probes:
            os.rmdir(probe)

    def _sync(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                flush(fd)
            finally:
                os.close(fd)
        except OSError as error:
            # A file is named where it will stand; the working folder and its parent are themselves.
            inside = path == self.path or self.path in path.parents
            shown = self._out / path.relative_to(self.path) if inside else path
            raise self._error_at(error, "flush it to the device", shown) from error

    def _unlisted(self, error: OSError) -> None:
        """Ends a walk through the folder: what it cannot list it would leave unflushed."""
        raise self.error(error, "list the folder", "") from error

    def _close(self, fd: int, relative: str) -> None:
        try:
            os.close(fd)
        except OSError as error:  # a network file system may report a failed write only here
            raise self.error(error, "write it", relative) from error

    def _remove(self) -> None:
        """Removes the working folder, with what the output was if it was replaced."""
        if self._lock >= 0:
            if not remove_work(self._work, self._out):
                self.left = (str(self._work),)
            os.close(self._lock)
            self._lock = -1


def flush(fd: int) -> None:
    """Flushes a file or folder to the device; on macOS through the drive's own cache too.

    Raises:
        OSError: the device refused; what was written since the last flush may be lost.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(fd, full)
            return
        except OSError:
            pass  # not every file system there knows it
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems have nothing to flush for a folder, and say so this way.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Writes every byte at the descriptor's position; the system may take fewer at a time.

    Raises:
        OSError: a write failed.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
