"""Local files: read by range, watched for changes, and never outside the folder that they belong to."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.errors import AdapterError, FormatError, Problem, StoreError

if TYPE_CHECKING:
    from types import TracebackType

LFS_REMEDY = "Fetch the content with `git lfs pull`, or download the file again."

_LFS_PREFIX = b"version https://git-lfs"
_READ_MAX = 1 << 30  # Linux reads at most 2 GiB at once

_REMEDIES: dict[int, tuple[str, str]] = {
    errno.ENOENT: ("not-found", "Check the path."),
    errno.ENOTDIR: ("not-found", "Check the path: a part of it is a file, not a folder."),
    errno.EISDIR: ("not-regular", "Give a file, not a folder."),
    errno.EACCES: ("permission", "Give this user access to it, or choose another place."),
    errno.EPERM: ("permission", "Give this user access to it, or choose another place."),
    errno.EROFS: ("read-only", "Choose a place on a file system that is mounted writable."),
    errno.ENOSPC: ("disk-full", "Free space on that file system, or choose another."),
    errno.EDQUOT: ("quota", "Free space within your quota, or choose another file system."),
    errno.EFBIG: ("file-too-large", "Raise the file size limit (ulimit -f), or write smaller shards."),
    errno.EMFILE: ("too-many-files", "Raise the limit on open files (ulimit -n)."),
    errno.ENFILE: ("too-many-files", "The system has too many open files; close some programs."),
    errno.ENAMETOOLONG: ("name-too-long", "Choose a shorter path."),
    errno.ELOOP: ("path", "A symbolic link there points back to itself; remove it."),
    errno.EIO: ("io", "The device reported an error; check it, then try again."),
    errno.ESTALE: ("io", "The network file system lost the file; mount it again, then try again."),
    errno.ETIMEDOUT: ("io", "The network file system did not answer; try again."),
    errno.ENOMEM: ("memory", "Free memory, then try again."),
    errno.ENOLCK: ("lock", "This file system cannot lock files; choose a place on another."),
    errno.EBUSY: ("busy", "Another program or a mount uses it; stop that, then try again."),
    errno.EXDEV: ("cross-device", "Choose a destination on one file system."),
    errno.EEXIST: ("exists", "Remove it, or choose another name."),
    errno.ENOTEMPTY: ("exists", "Remove what is in it, or choose another name."),
    errno.ENOTSUP: ("not-supported", "Choose a destination on another file system."),
}


def store_error(error: OSError, doing: str, file: str | Path) -> StoreError:
    """Returns the StoreError for a failed system call: what was being done, why it failed, what to do.

    Args:
        error: what the call raised.
        doing: the action, such as ``"read"`` or ``"write"``.
        file: the file or folder concerned.
    """
    kind, remedy = _REMEDIES.get(error.errno or 0, ("io", "Check the file system, then try again."))
    reason = error.strerror or type(error).__name__
    message = f"could not {doing}: {reason}."
    return StoreError(Problem(kind=kind, message=message, file=str(file), remedy=remedy))


def is_folder(path: Path) -> bool:
    """Tells whether a path is a folder; one that leads nowhere is not.

    Raises:
        StoreError: it cannot be told: a folder above it may not be entered, or the path is too long.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise store_error(error, "find it", path) from error


def is_lfs_pointer(data: bytes) -> bool:
    """Returns whether these first bytes of a file are those of a Git LFS pointer."""
    return data.startswith(_LFS_PREFIX)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """What tells one state of a file from another without reading it.

    Attributes:
        device: the device number of its file system.
        inode: its inode number.
        size: its length in bytes.
        mtime_ns: its modification time in nanoseconds since 1970.
        ctime_ns: when its data or its attributes last changed. Not compared: a new hard link changes it too.
            A cache compares it, since a program can set the modification time back, but not this one.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int = field(compare=False)

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """Takes the stamp from a stat result."""
        return cls(
            device=status.st_dev,
            inode=status.st_ino,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
        )


class LocalFile:
    """A regular file as a Source; reads are positional, so threads can share one.

    Attributes:
        path: the file.
        stamp: its state when it was opened.
    """

    def __init__(self, path: Path, *, name: str, expect: FileStamp | None = None) -> None:
        """Opens the file.

        Args:
            path: the file.
            name: what to call it in a message.
            expect: the state in which it was seen before, if so.

        Raises:
            FormatError: it is a folder, device, pipe or socket.
            StoreError: it cannot be opened, or is not in the expected state any more.
        """
        self.path = path
        self._name = name
        self._fd = -1
        try:
            _require_regular(os.stat(path), name)
            # O_NONBLOCK: should a pipe have taken its place since, do not wait for a writer.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise store_error(error, "open it", name) from error
        try:
            status = os.fstat(fd)
            _require_regular(status, name)
            self.stamp: FileStamp = FileStamp.of(status)
            if expect is not None and expect != self.stamp:
                raise _changed(name)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return self._name

    @property
    def length(self) -> int:
        """The number of bytes when it was opened."""
        return self.stamp.size

    def fileno(self) -> int:
        """Returns the file descriptor."""
        return self._fd

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes from ``offset``.

        Raises:
            StoreError: the bytes cannot be read, or there are fewer than when the file was opened.
        """
        try:
            data = os.pread(self._fd, min(length, _READ_MAX), offset)
        except OSError as error:
            raise store_error(error, f"read at byte {offset}", self._name) from error
        if len(data) == length:
            return data
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills ``view``, which must be contiguous bytes, from ``offset``.

        Raises:
            StoreError: the bytes cannot be read, or there are fewer than when the file was opened.
        """
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done : done + _READ_MAX]], offset + done)
            except OSError as error:
                raise store_error(error, f"read at byte {offset + done}", self._name) from error
            if count == 0:
                if offset + len(view) > self.length:
                    message = f"byte {offset + len(view)} was asked for; the file has {self.length}."
                    raise StoreError.of("read-past-end", message, file=self._name)
                raise _changed(self._name)
            done += count

    def check_unchanged(self) -> None:
        """Checks that the open file, and what now stands at its path, are as they were at opening.

        Raises:
            StoreError: it was written to, truncated, replaced or removed.
        """
        try:
            now = (FileStamp.of(os.fstat(self._fd)), FileStamp.of(os.stat(self.path)))
        except FileNotFoundError as error:
            raise _changed(self._name) from error
        except OSError as error:
            raise store_error(error, "examine it", self._name) from error
        if now != (self.stamp, self.stamp):
            raise _changed(self._name)

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> LocalFile:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self.close()


def resolve_inside(root: Path, relative: str) -> Path:
    """Returns the real path of a file that must lie inside a folder, symbolic links followed.

    A file of a snapshot in a local Hub cache (``models--x/snapshots/<revision>/``) may link into the
    ``blobs`` folder of its own repository. The file need not exist.

    Args:
        root: the folder.
        relative: the path inside it, with forward slashes, as a file gives it.

    Raises:
        FormatError: the path is empty, absolute, holds ``..``, a backslash, a drive or a NUL, or leaves the
            folder.
        StoreError: the folder cannot be examined.
    """
    reason = path_reason(relative)
    if reason:
        raise _outside(relative, reason)
    try:
        real_root = os.path.realpath(root, strict=True)
        try:
            real = os.path.realpath(os.path.join(real_root, relative), strict=True)
        except (FileNotFoundError, NotADirectoryError):
            real = os.path.realpath(os.path.join(real_root, relative))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _outside(relative, "is a symbolic link that leads back to itself") from error
        raise store_error(error, f"find '{relative}'", root) from error
    if not any(_is_inside(real, folder) for folder in (real_root, *_blob_folders(real_root))):
        raise _outside(relative, "leads through a symbolic link out of its folder")
    return Path(real)


def path_reason(relative: str) -> str:
    """Returns why a path may not be used inside a folder, or an empty string if it may."""
    if not relative:
        return "is empty"
    if "\0" in relative:
        return "holds a NUL"
    if "\\" in relative:
        return "holds a backslash"
    if relative.startswith("/"):
        return "is absolute"
    if len(relative) > 1 and relative[1] == ":":
        return "names a drive"
    if any(part in ("", ".", "..") for part in relative.split("/")):
        return "holds an empty part, '.' or '..'"
    return ""


def _blob_folders(real_root: str) -> list[str]:
    """Returns the blobs folder of the Hub cache repository whose snapshot this folder is or is part of."""
    parts = Path(real_root).parts
    for index in range(len(parts) - 2, 0, -1):
        if parts[index] == "snapshots" and parts[index - 1].startswith("models--"):
            return [os.path.realpath(os.path.join(*parts[:index], "blobs"))]
    return []


def _is_inside(path: str, folder: str) -> bool:
    return path != folder and os.path.commonpath((path, folder)) == folder


def _outside(relative: str, reason: str) -> AdapterError:
    message = f"the path {reason}; files are only read inside their own folder."
    return FormatError.of("path", message, file=relative, remedy="Put the file itself into the folder.")


def _require_regular(status: os.stat_result, name: str) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    found = next((text for test, text in kinds if test(status.st_mode)), "something else")
    remedy = "Give the path of a regular file."
    raise FormatError.of("not-regular", f"found {found}, expected a regular file.", file=name, remedy=remedy)


def _changed(name: str) -> AdapterError:
    message = "the file was changed, truncated or replaced while it was being read."
    return StoreError.of(
        "changed-while-reading", message, file=name, remedy="Let the other writer finish, then try again."
    )
