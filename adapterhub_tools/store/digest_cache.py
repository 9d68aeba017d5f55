"""Digests remembered between runs, in a small SQLite file.

An entry counts only while path, device, inode, size, modification and change time of the file are what they
were, and a file changed less than two seconds before it was read is not remembered: with a coarse clock a
later change could leave the same times. The cache may be deleted at any time; whatever is wrong with it, the
digests are computed and a warning says so.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_tools.store.digest import DEFAULT, digest_checkpoint

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Mapping

    from adapterhub_tools.model.protocols import Progress
    from adapterhub_tools.store.checkpoint import Checkpoint
    from adapterhub_tools.store.files import FileStamp

SETTLED_NS = 2_000_000_000
"""How long a file must have been unchanged before it is read, for its digests to be remembered."""
MAX_ENTRIES = 2000
"""The most files remembered; the oldest entries go first."""

_BUSY_SECONDS = 5.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS file_digests_v1 (
    path TEXT NOT NULL, algorithm TEXT NOT NULL, device TEXT NOT NULL, inode TEXT NOT NULL, size TEXT NOT
    NULL, mtime_ns TEXT NOT NULL, ctime_ns TEXT NOT NULL, digests BLOB NOT NULL, check_sha256 BLOB NOT NULL,
    PRIMARY KEY (path, algorithm)
)
"""


def default_path() -> Path:
    """Returns where the cache lies: ``digests.sqlite`` in $ADAPTERTOOL_CACHE, or in the user's cache folder.

    That folder is ``$XDG_CACHE_HOME/adaptertool`` or ``~/.cache/adaptertool``, and on macOS
    ``~/Library/Caches/adaptertool``.
    """
    chosen = os.environ.get("ADAPTERTOOL_CACHE")
    if chosen:
        return Path(chosen) / "digests.sqlite"
    if sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "adaptertool" / "digests.sqlite"


class DigestCache:
    """A cache of tensor digests by file.

    Attributes:
        path: the SQLite file.
        warnings: what went wrong with it, for the user; the digests themselves are right all the same.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Names the file; it is opened, and made, when it is first used."""
        self.path: Path = default_path() if path is None else path
        self.warnings: list[str] = []
        self._connection: sqlite3.Connection | None = None

    def get(self, path: Path, stamp: FileStamp, algorithm: str) -> dict[str, bytes]:
        """Returns the digests remembered for a file in this state, by tensor name; empty if none are."""
        import hashlib
        import sqlite3

        try:
            row = (
                self._open()
                .execute(
                    "SELECT device, inode, size, mtime_ns, ctime_ns, digests, check_sha256 "
                    "FROM file_digests_v1 WHERE path = ? AND algorithm = ?",
                    (_key(path), algorithm),
                )
                .fetchone()
            )
        except (sqlite3.Error, OSError) as error:
            self._warn(error)
            return {}
        if row is None or tuple(row[:5]) != _state(stamp):
            return {}
        blob, check = row[5], row[6]
        if not isinstance(blob, bytes) or hashlib.sha256(_state_bytes(path, stamp) + blob).digest() != check:
            self._warn("an entry is damaged")
            return {}
        return {name: bytes.fromhex(digest) for name, digest in json.loads(blob).items()}

    def put(self, path: Path, stamp: FileStamp, algorithm: str, digests: Mapping[str, bytes]) -> None:
        """Remembers the digests of a file's tensors in place of what was remembered for its path."""
        import hashlib
        import sqlite3

        blob = json.dumps({name: digest.hex() for name, digest in digests.items()}).encode()
        check = hashlib.sha256(_state_bytes(path, stamp) + blob).digest()
        try:
            with self._open() as connection:
                connection.execute(
                    "INSERT OR REPLACE INTO file_digests_v1 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (_key(path), algorithm, *_state(stamp), blob, check),
                )
                connection.execute(
                    "DELETE FROM file_digests_v1 WHERE rowid NOT IN "
                    "(SELECT rowid FROM file_digests_v1 ORDER BY rowid DESC LIMIT ?)",
                    (MAX_ENTRIES,),
                )
        except (sqlite3.Error, OSError) as error:
            self._warn(error)

    def close(self) -> None:
        """Closes the file; it is opened again when needed."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    def __enter__(self) -> DigestCache:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            import sqlite3

            os.makedirs(self.path.parent, mode=0o700, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS)
            try:
                connection.execute(_SCHEMA)
            except sqlite3.Error:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _warn(self, error: Any) -> None:
        text = f"digest cache '{self.path}' not used: {error}"
        if text not in self.warnings:
            self.warnings.append(text)


def cached_checkpoint_digests(
    checkpoint: Checkpoint,
    *,
    algorithm: str = DEFAULT,
    names: Collection[str] | None = None,
    threads: int = 2,
    progress: Progress | None = None,
    cache: DigestCache | None = None,
) -> dict[str, bytes]:
    """Returns what ``digest_checkpoint`` does, but computes only what is not cached.

    Args:
        checkpoint: what ``open_checkpoint`` returned.
        algorithm: one of ``digest.ALGORITHMS``.
        names: the tensors wanted; all if not given.
        threads: how many tensors are read at once.
        progress: told of what is read; of nothing if all was cached.
        cache: where digests are remembered; nowhere if not given.

    Raises:
        UnsupportedError: unknown algorithm.
        StoreError: a file cannot be read, or was changed since the checkpoint was opened.
        KeyError: a name that the checkpoint does not hold.
    """
    wanted = set(checkpoint.tensors if names is None else names)
    if checkpoint.is_remote:
        cache = None  # its files have no path and no state to remember them by
    known: dict[str, dict[str, bytes]] = {}
    if cache is not None:
        for file in sorted({checkpoint.tensors[name].file for name in wanted}):
            checkpoint.open(file).close()  # refuses a file that was changed since
            path, stamp = checkpoint.paths[file], checkpoint.stamps[file]
            found = cache.get(path, stamp, algorithm)
            held = checkpoint.headers[file].tensors
            known[file] = {
                name: digest for name, digest in found.items() if name in held and len(digest) == 32
            }
    have = {name: digest for digests in known.values() for name, digest in digests.items() if name in wanted}
    missing = wanted - have.keys()
    if missing:
        began_ns = time.time_ns()
        fresh = digest_checkpoint(
            checkpoint, algorithm=algorithm, names=missing, threads=threads, progress=progress
        )
        have.update(fresh)
        if cache is not None:
            for file in sorted({checkpoint.tensors[name].file for name in missing}):
                stamp = checkpoint.stamps[file]
                if began_ns - max(stamp.mtime_ns, stamp.ctime_ns) < SETTLED_NS:
                    continue
                of_file = {n: d for n, d in fresh.items() if checkpoint.tensors[n].file == file}
                cache.put(checkpoint.paths[file], stamp, algorithm, {**known[file], **of_file})
    return {name: have[name] for name in sorted(wanted)}


def _key(path: Path) -> str:
    return os.fsencode(os.path.realpath(path)).hex() if _odd(path) else os.path.realpath(path)


def _odd(path: Path) -> bool:
    """Returns whether a path holds bytes that are not UTF-8, which SQLite's text cannot hold."""
    return any("\ud800" <= char <= "\udfff" for char in os.path.realpath(path))


def _state(stamp: FileStamp) -> tuple[str, str, str, str, str]:
    # As text: an inode or device number may exceed SQLite's signed 64 bits.
    numbers = (stamp.device, stamp.inode, stamp.size, stamp.mtime_ns, stamp.ctime_ns)
    return (str(numbers[0]), str(numbers[1]), str(numbers[2]), str(numbers[3]), str(numbers[4]))


def _state_bytes(path: Path, stamp: FileStamp) -> bytes:
    return " ".join((_key(path), *_state(stamp), "")).encode()
