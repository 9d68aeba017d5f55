"""The working folder beside an output: made, locked while its process lives, found again and removed."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from adapterhub_tools.errors import Problem, StoreError
from adapterhub_tools.store.files import store_error

_own: dict[Path, Path] = {}
"""The working folders that this process has made and not yet removed -> their outputs."""


def recover(out: Path) -> tuple[Path, ...]:
    """Removes the working folders that killed runs left beside an output; those in use are not touched.

    If such a run had renamed the old output away and not yet put the new one in its place, the old one is
    restored.

    Returns:
        The working folders that were removed.
    """
    parent = Path(os.path.realpath(out.parent))
    prefix = f".{out.name}.tmp-"
    removed = []
    try:
        names = [name for name in os.listdir(parent) if name.startswith(prefix)]
    except OSError:
        return ()  # the check of the destination says why
    for name in sorted(names):
        work = parent / name
        lock = _lock_abandoned(work)
        if lock is None:
            continue
        try:
            if remove_work(work, parent / out.name):
                removed.append(work)
        finally:
            os.close(lock)
    return tuple(removed)


def make_work(out: Path) -> tuple[Path, int]:
    """Makes a working folder beside an output; returns it and the descriptor of its lock file, locked.

    Raises:
        StoreError: it cannot be made or locked.
    """
    for _ in range(100):
        work = out.with_name(f".{out.name}.tmp-{os.urandom(6).hex()}")
        _own[work] = out  # before there is anything: an interruption can come at any moment
        try:
            os.mkdir(work)
        except OSError as error:
            del _own[work]
            if error.errno == errno.ENAMETOOLONG:
                raise _name_too_long(work, out) from error
            raise store_error(error, "make a folder", work) from error
        try:
            fd = os.open(work / ".lock", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # another run's clean-up took the folder before it was locked
        except OSError as error:
            _remove_empty(work)
            raise store_error(error, "lock the working folder", work) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, socket.gethostname().encode())
            if (work / ".lock").exists():
                return work, fd
        except BlockingIOError:
            pass  # that clean-up was faster
        except OSError as error:
            remove_work(work, out)
            os.close(fd)
            raise store_error(error, "lock the working folder", work) from error
        os.close(fd)
    raise StoreError(
        Problem(
            kind="locked",
            message="other runs keep removing the working folder.",
            file=str(out),
            remedy="Let them finish, then try again.",
        )
    )


def remove_own() -> None:
    """Removes the working folders of this process, which is about to end; see ``remove_work``."""
    for work, out in list(_own.items()):
        remove_work(work, out)


def _name_too_long(work: Path, out: Path) -> StoreError:
    more = len(os.fsencode(work.name)) - len(os.fsencode(out.name))
    message = f"its name is too long: the working folder beside it needs {more} more bytes than the name."
    return StoreError(
        Problem(kind="name-too-long", message=message, file=str(out), remedy="Choose a shorter name.")
    )


def _lock_abandoned(work: Path) -> int | None:
    """Returns the descriptor of the lock of a working folder that no process uses, else None.

    The lock names its host: on a network file system a lock of another machine may look free, so those stay.
    """
    try:
        fd = os.open(work / ".lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        _remove_empty(work)  # killed between making the folder and its lock
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.read(fd, 256) in (b"", socket.gethostname().encode()):
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def _remove_empty(folder: Path) -> None:
    """Removes a folder if there is nothing in it."""
    try:
        os.rmdir(folder)
    except OSError:
        return


def remove_work(work: Path, out: Path) -> bool:
    """Removes a working folder, its lock last; returns whether it is gone.

    Should the output be missing because its old folder was renamed away, that is put back first; where it
    cannot be, nothing is removed, and the next run tries again.
    """
    gone = _remove(work, out)
    if gone:
        _own.pop(work, None)
    return gone


def _remove(work: Path, out: Path) -> bool:
    import shutil

    old = work / "old"
    try:
        if old.is_dir() and not os.path.lexists(out):
            os.rename(old, out)
    except OSError:
        return False
    for name in ("new", "old", "probe-a", "probe-b"):
        shutil.rmtree(work / name, ignore_errors=True)
    try:
        if len(os.listdir(work)) <= 1:  # while anything else is left, the lock marks it for the next run
            (work / ".lock").unlink(missing_ok=True)
            os.rmdir(work)
    except OSError as error:
        return error.errno == errno.ENOENT
    return not work.exists()
