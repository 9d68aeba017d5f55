"""A registry of one's own: adapters in a folder or an object store, without a server.

Layout below the registry's root::

    registry.json                                   says that this is one
    blobs/sha256/<hex>                              content, named by its digest
    adapters/<owner>/<name>/versions/00000001.json  a version: its files by digest, and the version before
    adapters/<owner>/<name>/tags/<tag>.json         a name for a version

Content is stored first and the version last, in a step that fails where that number is taken. So a reader
sees a version whole or not at all, two writers never overwrite each other, and nothing that was published
changes. A version is pinned by the SHA-256 of its record, which pins every file in turn.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from adapterhub_tools.errors import FormatError, HubError, escape
from adapterhub_tools.hub.object_store import MAX_RECORD_BYTES, ObjectStore
from adapterhub_tools.hub.reference import RegistryReference, check_id, is_id
from adapterhub_tools.hub.registry_place import check_registry, prepare_registry
from adapterhub_tools.hub.trees import RemoteFile
from adapterhub_tools.hub.upload import Outgoing
from adapterhub_tools.model.canonical import canonical_json
from adapterhub_tools.store.files import path_reason
from adapterhub_tools.store.strict_json import parse_json

_ATTEMPTS = 100
_NUMBER = re.compile(r"(\d{8})\.json")
_TAG = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]{0,127})\.json")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version of an adapter.

    Attributes:
        id: ``"sha256:<hex>"`` of its record.
        number: 1 for the first.
        parent: the id of the version before; None for the first.
        created: when it was made, ISO 8601 in UTC.
        message: what its publisher said.
        digest: the adapter digest.
        files: its files.
    """

    id: str
    number: int
    parent: str | None
    created: str
    message: str
    digest: str | None
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its files."""
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Returns what a listing says of it."""
        return {
            "id": self.id,
            "number": self.number,
            "parent": self.parent,
            "created": self.created,
            "message": self.message,
            "digest": self.digest,
            "files": len(self.files),
            "bytes": self.nbytes,
        }


class Registry:
    """A registry in an object store.

    Attributes:
        objects: the store.
    """

    def __init__(self, objects: ObjectStore) -> None:
        self.objects = objects

    def names(self) -> tuple[str, ...]:
        """Returns the adapters, ``"owner/name"``, sorted; what file managers leave is passed over."""
        return tuple(
            f"{owner}/{name}"
            for owner in self.objects.names("adapters")
            for name in self.objects.names(f"adapters/{owner}")
            if is_id(f"{owner}/{name}")
        )

    def numbers(self, name: str) -> tuple[int, ...]:
        """Returns the numbers of an adapter's versions, oldest first."""
        found = (_NUMBER.fullmatch(entry) for entry in self.objects.names(f"{_home(name)}/versions"))
        return tuple(int(match[1]) for match in found if match)

    def version(self, name: str, number: int) -> Version:
        """Returns a version.

        Raises:
            FormatError: its record is broken.
            HubError: there is none.
        """
        key = _version_key(name, number)
        data = self.objects.read(key, MAX_RECORD_BYTES)
        if data is None:
            raise _no_version(name, str(number))
        return _parse(data, key, number)

    def tags(self, name: str) -> dict[str, str]:
        """Returns tag -> version id."""
        found = (_TAG.fullmatch(entry) for entry in self.objects.names(f"{_home(name)}/tags"))
        return {match[1]: self._tagged(name, match[1])[0] for match in found if match}

    def find(self, reference: RegistryReference) -> Version:
        """Returns the version that a reference names.

        Raises:
            HubError: there is no such adapter or version.
        """
        check_registry(self.objects)
        name, wanted = check_id(reference.name), reference.version
        numbers = self.numbers(name)
        if not numbers:
            raise HubError.of(
                "not-found",
                f"{escape(self.objects.url)} has no adapter {escape(name)}.",
                remedy="Look at `adaptertool list`.",
            )
        if wanted is None:
            return self.version(name, numbers[-1])
        if wanted.startswith("sha256:"):
            for number in reversed(numbers):
                found = self.version(name, number)
                if found.id == wanted:
                    return found
            raise _no_version(name, wanted)
        if wanted.isascii() and wanted.isdigit():
            return self.version(name, int(wanted))
        id, number = self._tagged(name, wanted)
        found = self.version(name, number)
        if found.id != id:
            raise FormatError.of(
                "tag",
                f"names {id} as version {number}, which is {found.id}.",
                file=_tag_key(name, wanted),
                remedy="The registry was changed by hand; restore it.",
            )
        return found

    def publish(
        self,
        name: str,
        files: Sequence[Outgoing],
        *,
        digest: str | None,
        message: str,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[Version, bool]:
        """Adds a version, unless the latest one has the same files.

        Returns:
            The version that holds the files, and whether it was made.

        Raises:
            StoreError: a file was changed meanwhile, or a local registry cannot be written.
            HubError: a remote one cannot be written.
        """
        prepare_registry(self.objects)
        for _ in range(_ATTEMPTS):
            numbers = self.numbers(name)
            latest = self.version(name, numbers[-1]) if numbers else None
            if latest is not None and _same(latest.files, files):
                return latest, False
            for file in files:
                self.objects.store(f"blobs/sha256/{file.sha256}", file, advance)
                file.check_unchanged()
            advance = None  # told once, even if another writer makes this one try again
            number = (numbers[-1] if numbers else 0) + 1
            record = {
                "schema_version": "1.0",
                "name": name,
                "number": number,
                "parent": latest.id if latest else None,
                "created": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
                "message": message,
                "digest": digest,
                "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in files],
            }
            data = canonical_json(record).encode("utf-8")
            key = _version_key(name, number)
            if self.objects.create(key, data):
                return _parse(data, key, number), True
        raise HubError.of(
            "conflict",
            f"others pushed {escape(name)} {_ATTEMPTS} times meanwhile.",
            remedy="Push again when they are done.",
        )

    def tag(self, name: str, tag: str, version: Version) -> None:
        """Makes a tag; one that names the same version already stays.

        Raises:
            HubError: it names another version.
        """
        data = canonical_json({"version": version.id, "number": version.number}).encode()
        if not self.objects.create(_tag_key(name, tag), data):
            raise tag_exists(name, tag)

    def _tagged(self, name: str, tag: str) -> tuple[str, int]:
        key = _tag_key(name, tag)
        data = self.objects.read(key, MAX_RECORD_BYTES)
        if data is None:
            raise _no_version(name, tag)
        found = parse_json(data, file=key)
        known = found if isinstance(found, dict) else {}
        id, number = known.get("version"), known.get("number")
        if not isinstance(id, str) or not isinstance(number, int) or not 0 < number < 10**8:
            raise _broken(key, "it names no version")
        return id, number


def tag_exists(name: str, tag: str) -> HubError:
    """Returns the error for a tag that names another version."""
    return HubError.of(
        "tag-exists",
        f"the tag {escape(tag)!r} of {escape(name)} names another version already.",
        remedy="Choose another tag.",
    )


def _parse(data: bytes, key: str, number: int) -> Version:
    found = parse_json(data, file=key)
    if not isinstance(found, dict) or not str(found.get("schema_version", "")).startswith("1."):
        raise _broken(key, "it is no record of a version")
    entries = found.get("files")
    if found.get("number") != number or not isinstance(entries, list):
        raise _broken(key, "its number or its file list is wrong")
    parent, digest = found.get("parent"), found.get("digest")
    return Version(
        id=f"sha256:{hashlib.sha256(data).hexdigest()}",
        number=number,
        parent=parent if isinstance(parent, str) else None,
        created=str(found.get("created", "")),
        message=str(found.get("message", "")),
        digest=digest if isinstance(digest, str) else None,
        files=tuple(_file(entry, key) for entry in entries),
    )


def _file(entry: Any, key: str) -> RemoteFile:
    known: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    path, size, sha256 = known.get("path"), known.get("size"), known.get("sha256")
    if not isinstance(path, str) or path_reason(path) or not path.isprintable():
        raise _broken(key, f"the path {escape(path)!r} may not be used")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise _broken(key, f"{escape(path)!r} has no size")
    if not isinstance(sha256, str) or not _HEX.fullmatch(sha256):
        raise _broken(key, f"{escape(path)!r} has no SHA-256")
    return RemoteFile(path=path, size=size, blob_id="", sha256=sha256)


def _same(there: Sequence[RemoteFile], files: Sequence[Outgoing]) -> bool:
    return {file.path: file.sha256 for file in there} == {file.path: file.sha256 for file in files}


def _home(name: str) -> str:
    return f"adapters/{check_id(name)}"


def _version_key(name: str, number: int) -> str:
    return f"{_home(name)}/versions/{number:08d}.json"


def _tag_key(name: str, tag: str) -> str:
    return f"{_home(name)}/tags/{tag}.json"


def _no_version(name: str, wanted: str) -> HubError:
    return HubError.of(
        "no-revision",
        f"{escape(name)} has no version {escape(wanted)}.",
        remedy=f"Look at `adaptertool list {escape(name)}`.",
    )


def _broken(key: str, reason: str) -> FormatError:
    return FormatError.of("registry", f"{reason}.", file=escape(key), remedy="Restore it from a copy.")
