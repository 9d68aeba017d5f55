"""The objects of a registry as files of a folder, each made in one step and flushed to the device."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from adapterhub_tools.errors import FormatError
from adapterhub_tools.hub.upload import Outgoing
from adapterhub_tools.store.directory import flush, write_all
from adapterhub_tools.store.files import LocalFile, resolve_inside, store_error

_TEMPORARY = ".tmp-"
_PIECE_BYTES = 1 << 20
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV)


class DirectoryStore:
    """A folder; see ObjectStore.

    Attributes:
        url: ``file:///…``.
        root: the folder.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.root: Path = Path(unquote(urlsplit(url).path))

    def read(self, key: str, limit: int) -> bytes | None:
        """Returns an object, or None.

        Raises:
            FormatError: it is larger than ``limit``, or leads out of the folder.
            StoreError: it cannot be read.
        """
        if not os.path.lexists(self.root / key):
            return None
        with LocalFile(resolve_inside(self.root, key), name=key) as source:
            if source.length > limit:
                raise FormatError.of(
                    "too-large", f"has {source.length:,} bytes.", file=key, remedy="Restore it from a copy."
                )
            return source.read(0, source.length)

    def create(self, key: str, data: bytes) -> bool:
        """Makes an object in one step; False if there is other content already."""
        temporary = self._write(key, [data])
        try:
            if not self._give_name(temporary, self.root / key):
                return self.read(key, len(data) + (1 << 20)) == data
        finally:
            temporary.unlink(missing_ok=True)
        self._sync_folders(key)
        return True

    def store(self, key: str, content: Outgoing, advance: Callable[[int], None] | None) -> None:
        """Makes an object whose content its key names."""
        target = self.root / key
        if target.is_file() and target.stat().st_size == content.size:
            if advance is not None:
                advance(content.size)
            return
        temporary = self._write(key, content.pieces(0, content.size, advance))
        try:
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise store_error(error, "put it in its place", target) from error
        self._sync_folders(key)

    def names(self, prefix: str) -> tuple[str, ...]:
        """Returns the names directly below a prefix."""
        try:
            found = [entry.name for entry in (self.root / prefix).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError as error:
            raise store_error(error, "list the folder", self.root / prefix) from error
        return tuple(sorted(name for name in found if not name.startswith(_TEMPORARY)))

    def pieces(self, key: str) -> Iterator[bytes]:
        """Yields an object's content."""
        with LocalFile(resolve_inside(self.root, key), name=key) as source:
            for begin in range(0, source.length, _PIECE_BYTES):
                yield source.read(begin, min(_PIECE_BYTES, source.length - begin))

    def above(self) -> Iterator[DirectoryStore]:
        """Yields the folders that hold this one, the nearest first."""
        for folder in self.root.resolve().parents:
            yield DirectoryStore(folder.as_uri())

    def _write(self, key: str, pieces: Iterable[bytes]) -> Path:
        """Writes content under a temporary name beside its own, and flushes it."""
        folder = (self.root / key).parent
        temporary = folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            if not self.root.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root.parent))
            folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                for piece in pieces:
                    write_all(fd, piece)
                flush(fd)
            finally:
                os.close(fd)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise store_error(error, "write it", self.root / key) from error
            raise
        return temporary

    def _give_name(self, temporary: Path, target: Path) -> bool:
        """Gives a file its name if that is free: by a link, or under a lock where there are no links."""
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise store_error(error, "put it in its place", target) from error
            return self._rename_locked(temporary, target)
        return True

    def _rename_locked(self, temporary: Path, target: Path) -> bool:
        try:
            fd = os.open(self.root / f"{_TEMPORARY}lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if target.exists():
                    return False
                temporary.replace(target)
                return True
            finally:
                os.close(fd)
        except OSError as error:
            raise store_error(error, "put it in its place", target) from error

    def _sync_folders(self, key: str) -> None:
        """Flushes the folders down to an object, so that its name survives a power failure."""
        folder = (self.root / key).parent
        while True:
            try:
                fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    flush(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                raise store_error(error, "flush it to the device", folder) from error
            if folder == self.root.parent:
                return
            folder = folder.parent
