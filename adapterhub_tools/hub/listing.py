"""What a registry holds, and the history and tags of one adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapterhub_tools.hub.reference import HubReference, Reference, RegistryReference
from adapterhub_tools.hub.registry_place import check_registry
from adapterhub_tools.hub.registry_transfer import open_registry
from adapterhub_tools.hub.repository import DEFAULT_BRANCH, Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedAdapter:
    """An adapter of a registry.

    Attributes:
        name: ``"owner/name"``.
        versions: how many it has.
        latest: the id of the latest.
        created: when that was made.
        nbytes: bytes of its files.
        digest: its adapter digest.
        tags: the adapter's tags, sorted.
    """

    name: str
    versions: int
    latest: str
    created: str
    nbytes: int
    digest: str | None
    tags: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the entry as a JSON object."""
        data = {name: getattr(self, name) for name in self.__slots__ if name not in ("nbytes", "tags")}
        return {**data, "bytes": self.nbytes, "tags": list(self.tags)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedVersion:
    """A version of an adapter.

    Attributes:
        id: the commit, or a registry's ``"sha256:…"``.
        number: the number in a registry; None on a Hub.
        created: when it was made.
        message: its title.
        tags: tags that name it, sorted.
    """

    id: str
    number: int | None
    created: str
    message: str
    tags: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the entry as a JSON object."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "tags": list(self.tags)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ListReport:
    """What there is.

    Attributes:
        ref: what was asked for.
        adapters: the adapters of a registry, by name; empty where one adapter was asked for.
        versions: the versions of one adapter, newest first; empty where a registry was asked for.
    """

    ref: str
    adapters: tuple[ListedAdapter, ...] = ()
    versions: tuple[ListedVersion, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return {
            "ref": self.ref,
            "adapters": [item.to_json() for item in self.adapters],
            "versions": [item.to_json() for item in self.versions],
        }


def list_registry(reference: RegistryReference) -> ListReport:
    """Lists the adapters of a registry.

    Raises:
        StoreError: there is no registry.
        FormatError: a record is broken.
        HubError: a remote store failed.
    """
    registry = open_registry(reference.root)
    check_registry(registry.objects)
    found = []
    for name in registry.names():
        numbers = registry.numbers(name)
        if not numbers:
            continue
        latest = registry.version(name, numbers[-1])
        found.append(
            ListedAdapter(
                name=name,
                versions=len(numbers),
                latest=latest.id,
                created=latest.created,
                nbytes=latest.nbytes,
                digest=latest.digest,
                tags=tuple(sorted(registry.tags(name))),
            )
        )
    return ListReport(ref=str(reference), adapters=tuple(found))


def list_versions(reference: Reference) -> ListReport:
    """Lists the versions of one adapter, newest first, each with its tags.

    Raises:
        HubError: there is no such adapter, or it may not be read.
        FormatError: a record is broken.
    """
    if isinstance(reference, HubReference):
        return _hub_versions(reference)
    registry = open_registry(reference.root)
    registry.find(reference)
    tags = registry.tags(reference.name)
    versions = [registry.version(reference.name, number) for number in registry.numbers(reference.name)]
    return ListReport(
        ref=str(reference),
        versions=tuple(
            ListedVersion(
                id=version.id,
                number=version.number,
                created=version.created,
                message=version.message,
                tags=_names_of(tags, version.id),
            )
            for version in reversed(versions)
        ),
    )


def _hub_versions(reference: HubReference) -> ListReport:
    repository = Repository.connect(reference.id)
    changes = repository.history(reference.revision or DEFAULT_BRANCH)
    tags = repository.tags()
    return ListReport(
        ref=str(reference),
        versions=tuple(
            ListedVersion(
                id=change.id,
                number=None,
                created=change.date,
                message=change.title,
                tags=_names_of(tags, change.id),
            )
            for change in changes
        ),
    )


def _names_of(tags: dict[str, str], id: str) -> tuple[str, ...]:
    return tuple(sorted(tag for tag, named in tags.items() if named == id))
