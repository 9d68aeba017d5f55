"""What an adapter was trained on: a base, or another adapter, and what that was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub_tools.errors import AdapterError, FormatError, escape
from adapterhub_tools.hub.reference import HubReference, check_id, check_revision
from adapterhub_tools.hub.snapshot import HubSnapshot, Snapshot, fetch_small
from adapterhub_tools.model.manifest import MANIFEST_NAME, Manifest
from adapterhub_tools.store.adapter_files import CONFIG_FILE
from adapterhub_tools.store.strict_json import parse_json

MAX_LINKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Something that an adapter was trained on.

    Attributes:
        id: as the config or manifest names it.
        kind: ``"adapter"``, ``"base"``, or ``"unknown"`` where it could not be looked up.
        revision: the revision recorded, if one is.
        commit: what it was pinned to now; None where it was not looked up.
        note: why it was not followed any further; empty if there is nothing to follow.
    """

    id: str
    kind: str
    revision: str | None = None
    commit: str | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the link as a JSON object."""
        return {name: getattr(self, name) for name in self.__slots__}


def base_of(manifest: Manifest | None, config: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """Returns the id and the revision of what an adapter was trained on, as its manifest or config says."""
    if manifest is not None and manifest.base.id is not None:
        return manifest.base.id, manifest.base.revision
    known = config or {}
    name, revision = known.get("base_model_name_or_path"), known.get("revision")
    return (name if isinstance(name, str) and name else None), (
        revision if isinstance(revision, str) else None
    )


def follow(
    snapshot: Snapshot, manifest: Manifest | None, config: Mapping[str, Any] | None
) -> tuple[Link, ...]:
    """Follows an adapter to its base. What cannot be looked up ends the chain and says why.

    Args:
        snapshot: the adapter; links are looked up at its Hub, and not at all for a registry.
        manifest: its manifest.
        config: its config.

    Raises:
        FormatError: the chain is a circle.
    """
    links: list[Link] = []
    seen: set[str] = set()
    id, revision = base_of(manifest, config)
    while id is not None:
        if id in seen:
            message = f"{escape(id)} is an adapter that was trained on itself, through {len(links)} others."
            raise FormatError.of("circular-chain", message, remedy="Correct base_model_name_or_path.")
        seen.add(id)
        if len(links) == MAX_LINKS:
            links.append(Link(id=id, kind="unknown", revision=revision, note="the chain is too long"))
            break
        link, id, revision = _look_up(snapshot, id, revision)
        links.append(link)
    return tuple(links)


def _look_up(snapshot: Snapshot, id: str, revision: str | None) -> tuple[Link, str | None, str | None]:
    """Returns a link, and what it was trained on in turn."""
    if not isinstance(snapshot, HubSnapshot):
        note = "not looked up: the adapter is not on a Hub"
        return Link(id=id, kind="unknown", revision=revision, note=note), None, None
    try:
        reference = HubReference(
            id=check_id(id), revision=None if revision is None else check_revision(revision)
        )
    except FormatError:
        note = "not looked up: a local path, a URL, or no id of a Hub"
        return Link(id=id, kind="unknown", revision=revision, note=note), None, None
    try:
        from adapterhub_tools.hub.repository import Repository

        below = HubSnapshot(reference, Repository(reference.id, snapshot.repository.transport))
        names = {file.path: file for file in below.files}
        if CONFIG_FILE not in names:
            return Link(id=id, kind="base", revision=revision, commit=below.version), None, None
        config = parse_json(fetch_small(below, names[CONFIG_FILE]), file=CONFIG_FILE)
        manifest = None
        if MANIFEST_NAME in names:
            data = parse_json(fetch_small(below, names[MANIFEST_NAME]), file=MANIFEST_NAME)
            manifest = Manifest.from_json(data)
    except AdapterError as error:
        note = f"not looked up: {error.problems[0].message}"
        return Link(id=id, kind="unknown", revision=revision, note=note), None, None
    next_id, next_revision = base_of(manifest, config if isinstance(config, dict) else None)
    return Link(id=id, kind="adapter", revision=revision, commit=below.version), next_id, next_revision
