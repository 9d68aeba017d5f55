"""One version of an adapter or a model somewhere else: its files, pinned, and how content is brought."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from adapterhub_tools.errors import FormatError, HubError, escape
from adapterhub_tools.hub.download import MemorySink, Sink, fetch
from adapterhub_tools.hub.reference import HubReference
from adapterhub_tools.hub.repository import Repository
from adapterhub_tools.hub.trees import RemoteFile

MAX_SMALL_FILE_BYTES = 16 << 20
"""A config, a manifest or an index that is larger is not read."""


class Snapshot(Protocol):
    """A pinned version.

    Attributes:
        reference: how it was asked for, without what it was pinned to.
        endpoint: where it is.
        version: the commit, or a registry's ``"sha256:…"``.
        files: its files, paths relative to the folder asked for.
    """

    reference: str
    endpoint: str
    version: str
    files: tuple[RemoteFile, ...]

    def fetch(self, file: RemoteFile, sink: Sink, *, advance: Callable[[int], None] | None = None) -> str:
        """Brings a file's content into a sink, checked, and returns its SHA-256.

        Raises:
            IntegrityError: the content is not what the version names.
            HubError: it cannot be had.
        """
        ...


class HubSnapshot:
    """A commit of a repository of the Hub, or a folder in it; see Snapshot.

    Attributes:
        repository: the repository.
        folder: the folder inside it.
    """

    def __init__(
        self,
        reference: HubReference,
        repository: Repository | None = None,
        *,
        commit: str | None = None,
        files: tuple[RemoteFile, ...] | None = None,
    ) -> None:
        """Pins the revision to a commit, and lists its files.

        Raises:
            HubError: there is no such repository, revision or folder, or it may not be read.
        """
        self.reference: str = str(reference)
        self.repository: Repository = repository or Repository.connect(reference.id)
        self.endpoint: str = self.repository.transport.endpoint.url
        self.folder: str = reference.folder
        if commit is None:
            found = self.repository.pin(reference.revision)
            if not found.id:
                raise HubError.of(
                    "no-revision", f"{escape(reference)} has no commit.", remedy="Push something to it first."
                )
            commit = found.id
        self.version: str = commit
        listed = self.repository.tree(commit, reference.folder) if files is None else files
        cut = len(reference.folder) + 1 if reference.folder else 0
        self._full = {file.path[cut:]: file for file in listed}
        self.files: tuple[RemoteFile, ...] = tuple(
            _renamed(file, path) for path, file in sorted(self._full.items())
        )

    @classmethod
    def of(cls, repository: Repository, commit: str, files: tuple[RemoteFile, ...]) -> HubSnapshot:
        """Returns some files of a commit that was pinned and listed before."""
        return cls(HubReference(id=repository.id), repository, commit=commit, files=files)

    def full(self, file: RemoteFile) -> RemoteFile:
        """Returns a file of ``files`` with its path in the repository."""
        return self._full[file.path]

    def fetch(self, file: RemoteFile, sink: Sink, *, advance: Callable[[int], None] | None = None) -> str:
        """Brings a file's content; see Snapshot."""
        return fetch(self.repository, self.version, self.full(file), sink, advance=advance)


def fetch_small(snapshot: Snapshot, file: RemoteFile) -> bytes:
    """Returns the content of a config, manifest or index.

    Raises:
        FormatError: it is larger than any such file.
        IntegrityError: it is not what the version names.
        HubError: it cannot be had.
    """
    if file.size > MAX_SMALL_FILE_BYTES:
        raise FormatError.of(
            "too-large",
            f"has {file.size:,} bytes; at most {MAX_SMALL_FILE_BYTES:,} are read.",
            file=escape(file.path),
            remedy="This is no such file; look at it where it was made.",
        )
    sink = MemorySink()
    snapshot.fetch(file, sink)
    return sink.value()


def _renamed(file: RemoteFile, path: str) -> RemoteFile:
    return RemoteFile(path=path, size=file.size, blob_id=file.blob_id, sha256=file.sha256)
