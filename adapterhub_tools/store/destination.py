"""Whether a folder may be written: what is refused before any work starts."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.errors import Problem, StoreError, escape
from adapterhub_tools.store.files import is_folder, store_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MOUNTS = "/proc/self/mountinfo"  # Linux only


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A folder that may be written.

    Attributes:
        path: the folder; its parent is a real path.
        exists: it is there already.
        occupied: it exists and is not empty, so writing it means replacing it.
    """

    path: Path
    exists: bool
    occupied: bool


def check_destination(out: Path, *, inputs: Sequence[Path], replace: bool = False) -> Destination:
    """Checks that a folder may be written; changes nothing.

    Args:
        out: the folder; it need not exist, its parent must.
        inputs: folders and files that are read; the output may not be, hold or lie in one of these folders.
        replace: an existing folder that is not empty may be replaced.

    Raises:
        StoreError: the output is a symbolic link, a mount point, a file, or not empty without ``replace``;
            its parent is missing or not writable; it overlaps an input.
    """
    if out.name in ("", ".."):
        out = Path(os.path.realpath(out))
    try:
        parent = Path(os.path.realpath(out.parent, strict=True))
    except OSError as error:
        raise store_error(error, "find the folder that shall hold the output", out.parent) from error
    path = parent / out.name
    if out.name == "" or not parent.is_dir():
        raise _refused("not-a-folder", path, "the output's parent is not a folder.", "Choose another output.")
    occupied = _existing(path, replace)
    for reading in inputs:
        _check_apart(path, reading)
    if not os.access(parent, os.W_OK | os.X_OK):
        remedy = "Give this user access to it, or choose another place."
        raise _refused("permission", parent, "the folder that shall hold the output is not writable.", remedy)
    return Destination(path=path, exists=path.is_dir(), occupied=occupied)


def check_space(folder: Path, needed_bytes: int) -> None:
    """Checks that a file system has room.

    Args:
        folder: an existing folder on it.
        needed_bytes: what will be written.

    Raises:
        StoreError: there is less than that; says how much is needed and how much is free.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        message = f"{needed_bytes:,} bytes are needed, {free:,} are free."
        remedy = "Free space on that file system, or choose another."
        raise StoreError(Problem(kind="disk-full", message=message, file=str(folder), remedy=remedy))


def free_bytes(folder: Path) -> int:
    """Returns how many bytes this user may still write on the file system of a folder.

    Raises:
        StoreError: the folder cannot be examined.
    """
    try:
        status = os.statvfs(folder)
    except OSError as error:
        raise store_error(error, "examine the file system", folder) from error
    return status.f_bavail * status.f_frsize


def _existing(path: Path, replace: bool) -> bool:
    """Returns whether the output exists and is not empty; refuses what may not be written."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise store_error(error, "examine the output", path) from error
    if stat.S_ISLNK(status.st_mode):
        remedy = "Give the path that it points to, or another."
        raise _refused("symlink", path, "the output is a symbolic link.", remedy)
    if not stat.S_ISDIR(status.st_mode):
        raise _refused(
            "not-a-folder", path, "the output exists and is not a folder.", "Choose another output."
        )
    if _is_mount_point(path):
        remedy = "Choose a folder inside it."
        raise _refused("mount-point", path, "the output is a mount point, which cannot be renamed.", remedy)
    try:
        with os.scandir(path) as entries:
            occupied = next(entries, None) is not None
    except OSError as error:
        raise store_error(error, "list the output", path) from error
    if occupied and not replace:
        remedy = "Choose another output, or replace it as a whole with --replace."
        raise _refused("exists", path, "the output exists and is not empty.", remedy)
    return occupied


def _check_apart(out: Path, reading: Path) -> None:
    """Refuses an output that is, holds or lies in an input, by path and by device and inode."""
    folder = Path(os.path.realpath(reading))
    outs, folders = set(_identities(out)), set(_identities(folder))
    remedy = "Choose an output beside the inputs."
    is_dir = is_folder(folder)
    if is_dir and (outs & set(_own_identity(folder)) or out == folder or folder in out.parents):
        message = f"the output is the input '{escape(reading)}' or lies in it."
        raise _refused("overlaps-input", out, message, remedy)
    if folders & set(_own_identity(out)) or out == folder or out in folder.parents:
        message = f"the output holds the input '{escape(reading)}'."
        raise _refused("overlaps-input", out, message, remedy)
    _refuse_in_cache(out, folder, reading)
    if not is_dir:
        return
    # A folder of links, such as a snapshot in a Hub cache, is only as safe as what they point to.
    try:
        with os.scandir(folder) as entries:
            links = [entry.path for entry in entries if entry.is_symlink()]
    except OSError as error:
        raise store_error(error, "list the folder", reading) from error
    for link in links:
        real = Path(os.path.realpath(link))
        if out == real or out in real.parents:
            message = f"the output holds '{escape(real)}', to which '{escape(reading)}' links."
            raise _refused("overlaps-input", out, message, remedy)
        _refuse_in_cache(out, real, reading)


def _refuse_in_cache(out: Path, real: Path, reading: Path) -> None:
    """Refuses an output among the files of the Hub cache repository that something read lies in."""
    parts = real.parts
    for index, part in enumerate(parts[:-1]):
        if part.startswith("models--") and parts[index + 1] in ("blobs", "snapshots"):
            repository = Path(*parts[: index + 1])
            if out == repository or repository in out.parents:
                message = f"the output lies in the Hub cache's '{escape(repository)}', which holds files of "
                message += f"'{escape(reading)}'."
                raise _refused("overlaps-input", out, message, "Choose an output outside the cache.")


def _identities(path: Path) -> Iterator[tuple[int, int]]:
    """Yields device and inode of a path and of each folder above it, as far as they exist."""
    for folder in (path, *path.parents):
        yield from _own_identity(folder)


def _own_identity(path: Path) -> Iterator[tuple[int, int]]:
    try:
        status = os.stat(path)
    except OSError:
        return
    yield status.st_dev, status.st_ino


def _is_mount_point(path: Path) -> bool:
    if os.path.ismount(path):
        return True
    try:  # a bind mount within one file system shows only here
        with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as lines:
            points = [line.split(" ")[4] for line in lines]
    except OSError:
        return False
    return any(_unescaped(point) == str(path) for point in points)


def _unescaped(point: str) -> str:
    """Returns a mount point with the octal escapes of mountinfo resolved."""
    for code in ("040", "011", "012", "134"):
        point = point.replace("\\" + code, chr(int(code, 8)))
    return point


def _refused(kind: str, path: Path, message: str, remedy: str) -> StoreError:
    return StoreError(Problem(kind=kind, message=message, file=str(path), remedy=remedy))
