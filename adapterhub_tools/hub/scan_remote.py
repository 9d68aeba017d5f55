"""The files of a remote version as a scan reads them: small ones whole and checked, large ones by range."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapterhub_tools.hub.range_source import RangeSource
from adapterhub_tools.hub.remote_folder import download
from adapterhub_tools.hub.snapshot import MAX_SMALL_FILE_BYTES, HubSnapshot, Snapshot, fetch_small
from adapterhub_tools.hub.trees import RemoteFile
from adapterhub_tools.model.protocols import Source
from adapterhub_tools.ops.scan_files import Listing, ScannedFile, name_findings
from adapterhub_tools.store.files import LocalFile


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFile:
    """Content that is in memory, as a Source.

    Attributes:
        name: what to call it in a message.
        data: the content.
    """

    name: str
    data: bytes

    @property
    def length(self) -> int:
        """The number of bytes."""
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        """Returns ``length`` bytes from ``offset``."""
        return self.data[offset : offset + length]


def remote_listing(snapshot: Snapshot) -> Listing:
    """Returns the files of a version; one is fetched when it is opened.

    Files above 16 MiB are read by range on a Hub, and brought into a temporary file from a registry.
    """

    def file_of(remote: RemoteFile) -> ScannedFile:
        def opened() -> AbstractContextManager[Source]:
            return _open(snapshot, remote)

        return ScannedFile(path=remote.path, size=remote.size, open=opened)

    found = Listing(files=[file_of(remote) for remote in snapshot.files])
    name_findings([file.path for file in found.files], found)
    return found


@contextmanager
def _open(snapshot: Snapshot, remote: RemoteFile) -> Iterator[Source]:
    if remote.size <= MAX_SMALL_FILE_BYTES:
        yield HeldFile(name=remote.path, data=fetch_small(snapshot, remote))
    elif isinstance(snapshot, HubSnapshot):
        yield RangeSource(snapshot.repository, snapshot.version, snapshot.full(remote), name=remote.path)
    else:
        with tempfile.TemporaryDirectory(prefix="adaptertool-") as folder:
            place = Path(folder) / "content"
            download(snapshot, remote, place)
            with LocalFile(place, name=remote.path) as source:
                yield source
