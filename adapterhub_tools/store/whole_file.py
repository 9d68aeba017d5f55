"""Puts one file into a folder that exists: a reader sees the old one or all of the new one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def put_whole(root: Path, name: str, data: bytes, *, replace: bool) -> Path:
    """Writes a file beside its place, flushes it to the device and gives it its name in one step.

    Args:
        root: the folder.
        name: the file's name in it.
        data: its content.
        replace: whether an existing one may be replaced.

    Returns:
        its path.

    Raises:
        FileExistsError: there is one already.
        OSError: it cannot be written; what was there is untouched.
    """
    final = root / name
    temporary: Path | None = None
    try:
        descriptor, made = tempfile.mkstemp(prefix=f".{name}.", dir=root)
        temporary = Path(made)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fchmod(stream.fileno(), 0o666 & ~_umask())
            os.fsync(stream.fileno())
        if replace or not _link(temporary, final):
            temporary.replace(final)
        _sync_folder(root)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return final


def _link(temporary: Path, final: Path) -> bool:
    """Gives the file its name, which fails where the name exists; False where no links are possible."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError:
        if final.exists():
            raise FileExistsError(final) from None
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(root: Path) -> None:
    descriptor = os.open(root, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
