"""Mounts that only one process sees, by Linux namespaces; they vanish with it."""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path

_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18


def enter_own_mounts() -> None:
    """Gives this process, which must have one thread, mounts of its own.

    Raises:
        OSError: neither root nor user namespaces are at hand.
    """
    user, group = os.getuid(), os.getgid()
    if user == 0:
        _check(_libc().unshare(_NEWNS))
    else:
        _check(_libc().unshare(_NEWNS | _NEWUSER))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount(None, "/", None, _RECURSIVE | _PRIVATE, None)


def mount(*, at: str, source: str | None = None, read_only: bool = False, options: str = "") -> None:
    """Mounts a folder at another, or without ``source`` a file system in memory, such as ``"size=65536"``."""
    if source is None:
        _mount("tmpfs", at, "tmpfs", 0, options)
        return
    _mount(source, at, None, _BIND, None)
    if read_only:
        _mount(None, at, None, _BIND | _REMOUNT | _READ_ONLY, None)


def show(folder: Path) -> dict[str, str]:
    """Returns path -> SHA-256 of every file below a folder; of a folder, ``"folder"``."""
    return {
        path.relative_to(folder).as_posix(): (
            "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in sorted(folder.rglob("*"))
    }


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mount(source: str | None, at: str, kind: str | None, flags: int, data: str | None) -> None:
    texts = [None if text is None else text.encode() for text in (source, at, kind, data)]
    _check(_libc().mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]))


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
