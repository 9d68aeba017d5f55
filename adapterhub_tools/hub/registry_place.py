"""Where a registry lies, and where one may be made: a marker says that a place is one."""

from __future__ import annotations

from adapterhub_tools.errors import AdapterError, FormatError, StoreError, UnsupportedVersionError, escape
from adapterhub_tools.hub.object_store import MAX_RECORD_BYTES, ObjectStore
from adapterhub_tools.model.canonical import canonical_json
from adapterhub_tools.store.strict_json import parse_json

MARKER = "registry.json"
LAYOUT = "adaptertool-registry"


def is_registry(place: ObjectStore) -> bool:
    """Returns whether there is a registry, of whatever version.

    Raises:
        StoreError: a folder cannot be read.
        HubError: an object store cannot be read.
    """
    return place.read(MARKER, MAX_RECORD_BYTES) is not None


def check_registry(place: ObjectStore) -> None:
    """Checks that there is a registry.

    Raises:
        StoreError: there is none.
        UnsupportedVersionError: it is of a newer layout.
    """
    data = place.read(MARKER, MAX_RECORD_BYTES)
    if data is None:
        outer = _registry_around(place)
        raise StoreError.of(
            "no-registry",
            f"there is no registry: it has no {MARKER}.",
            file=place.url,
            remedy=_inside(outer) if outer else "Check the URL; the first push makes a registry.",
        )
    found = parse_json(data, file=MARKER)
    known = found if isinstance(found, dict) else {}
    if known.get("layout") != LAYOUT or not str(known.get("version", "")).startswith("1."):
        raise UnsupportedVersionError.of(
            "registry-version",
            f"found {escape(known.get('layout'))} {escape(known.get('version'))}, expected {LAYOUT} 1.x.",
            file=f"{place.url}/{MARKER}",
            remedy="Use a version of adaptertool that knows this layout.",
        )


def check_place(place: ObjectStore) -> None:
    """Checks that there is a registry, or that one can be made.

    Raises:
        StoreError: something else is there.
        FormatError: the place is inside a registry.
    """
    if is_registry(place):
        return
    outer = _registry_around(place)
    if outer:
        # No listing of the outer registry would show the inner one.
        message = f"{escape(place.url)} is no registry and lies in one."
        raise FormatError.of("registry-inside", message, remedy=_inside(outer))
    others = place.names("")
    # Another writer makes the marker first of all, perhaps just now.
    if others and not is_registry(place):
        raise StoreError.of(
            "no-registry",
            f"holds other things ({escape(others[0])}) and no {MARKER}: it is no registry.",
            file=place.url,
            remedy="Choose an empty or new place.",
        )


def prepare_registry(place: ObjectStore) -> None:
    """Makes the registry if nothing is there yet.

    Raises:
        StoreError: something else is there, or it cannot be written.
        FormatError: the place is inside a registry.
        UnsupportedVersionError: it is of a newer layout.
        HubError: an object store cannot be read or written.
    """
    check_place(place)
    if not is_registry(place):
        place.create(MARKER, canonical_json({"layout": LAYOUT, "version": "1.0"}).encode())
    check_registry(place)


def _registry_around(place: ObjectStore) -> str:
    """Returns the URL of the registry that a place is inside of; empty if there is none."""
    for outer in place.above():
        try:
            data = outer.read(MARKER, MAX_RECORD_BYTES)
            found = None if data is None else parse_json(data, file=MARKER)
        except AdapterError:
            continue  # what may not be read, or is no JSON, is no registry of this user
        if isinstance(found, dict) and found.get("layout") == LAYOUT:
            return outer.url
    return ""


def _inside(outer: str) -> str:
    return f"The registry is {escape(outer)}: write {escape(outer)}/owner/name, a name of two parts."
