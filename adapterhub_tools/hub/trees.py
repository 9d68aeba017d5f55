r"""Files of a commit, how their content is checked, and how two trees are compared.

A regular file is named by its git blob SHA-1 (over ``"blob <size>\0"`` and the content), a large one by the
SHA-256 of its content, as git-lfs records it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from adapterhub_tools.errors import IntegrityError, escape


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file of a commit.

    Attributes:
        path: inside the repository.
        size: bytes.
        blob_id: the git blob SHA-1; that of the pointer for a large file. Empty in a registry.
        sha256: the SHA-256 of the content of a large file; None for a regular one.
    """

    path: str
    size: int
    blob_id: str
    sha256: str | None = None

    @property
    def identity(self) -> str:
        """What tells its content: the digest of its own kind."""
        return f"sha256:{self.sha256}" if self.sha256 is not None else f"git:{self.blob_id}"


class Updatable(Protocol):
    """A hash being computed."""

    def update(self, data: Any, /) -> None:
        """Takes bytes."""
        ...

    def hexdigest(self) -> str:
        """Returns the digest."""
        ...


def git_blob_id(data: bytes) -> str:
    """Returns the git blob SHA-1 of content."""
    made = new_blob_hash(len(data))
    made.update(data)
    return made.hexdigest()


def new_blob_hash(size: int) -> Updatable:
    """Returns a hash that gives the git blob SHA-1 of ``size`` bytes of content."""
    made = hashlib.sha1(usedforsecurity=False)
    made.update(b"blob %d\0" % size)
    return made


class ContentCheck:
    """Digests the bytes of a file as they come, and compares them with what the commit says.

    Attributes:
        size: bytes taken so far.
    """

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._blob = None if file.sha256 is not None else new_blob_hash(file.size)
        self.size: int = 0

    def update(self, data: bytes | memoryview) -> None:
        """Takes the next bytes."""
        self._sha256.update(data)
        if self._blob is not None:
            self._blob.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """The SHA-256 of what was taken."""
        return self._sha256.hexdigest()

    def raise_if_other(self) -> None:
        """Compares.

        Raises:
            IntegrityError: it is other content than the commit names.
        """
        file = self._file
        found, expected = f"sha256:{self.sha256}", f"sha256:{file.sha256}"
        if self._blob is not None:
            found, expected = f"git:{self._blob.hexdigest()}", f"git:{file.blob_id}"
        if self.size != file.size or found != expected:
            raise IntegrityError.of(
                "content",
                f"received {self.size:,} bytes, {found}; the commit says {file.size:,} bytes, {expected}.",
                file=escape(file.path),
                remedy="Try again; if it stays so, the server or a cache before it gives damaged content.",
            )


def holds(tree: Iterable[RemoteFile], wanted: Mapping[str, Iterable[str]], deleted: Iterable[str]) -> bool:
    """Returns whether a tree is what a push meant.

    Args:
        tree: the remote files.
        wanted: path -> the identities that its content may have (large or regular is the server's choice).
        deleted: paths that must not be there.
    """
    there = {file.path: file.identity for file in tree}
    return all(there.get(path) in set(names) for path, names in wanted.items()) and not any(
        path in there for path in deleted
    )
