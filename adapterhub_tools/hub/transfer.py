"""Push, pull and list by reference: the Hub and registries of one's own behind the same three verbs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapterhub_tools.errors import FormatError, escape
from adapterhub_tools.hub.base_pull import provide_base
from adapterhub_tools.hub.listing import ListReport, list_registry, list_versions
from adapterhub_tools.hub.pull import PullReport
from adapterhub_tools.hub.pull import pull as pull_snapshot
from adapterhub_tools.hub.push import PushReport, push_to_hub
from adapterhub_tools.hub.reference import (
    HubReference,
    Reference,
    RegistryReference,
    is_remote,
    parse_reference,
    parse_registry,
)
from adapterhub_tools.hub.registry_place import is_registry
from adapterhub_tools.hub.registry_transfer import RegistrySnapshot, open_registry, push_to_registry
from adapterhub_tools.hub.snapshot import HubSnapshot, Snapshot
from adapterhub_tools.model.protocols import Progress

REGISTRY_VARIABLE = "ADAPTERTOOL_REGISTRY"


def default_registry() -> str | None:
    """Returns the URL of the registry that the environment names (a path or a URL); None without one."""
    text = os.environ.get(REGISTRY_VARIABLE, "")
    if not text:
        return None
    return text if is_remote(text) else Path(text).expanduser().absolute().as_uri()


def parse(text: str) -> Reference:
    """Reads a reference; ``owner/name`` is in the environment's registry if it names one, else on the Hub."""
    return parse_reference(text, registry=default_registry())


def open_snapshot(reference: Reference) -> Snapshot:
    """Pins what a reference names."""
    if isinstance(reference, HubReference):
        return HubSnapshot(reference)
    return RegistrySnapshot(reference)


def push(adapter: Path, ref: str, **options: Any) -> PushReport:
    """Publishes an adapter; the options are those of ``push_to_hub``."""
    reference = parse(ref)
    if isinstance(reference, HubReference):
        return push_to_hub(adapter, reference, **options)
    return push_to_registry(adapter, reference, **options)


def pull(
    ref: str,
    out: Path,
    *,
    base: Path | None = None,
    include: Sequence[str] = (),
    replace: bool = False,
    allow_replace_gap: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PullReport:
    """Brings an adapter, and its base if a folder for that is given.

    Args:
        ref: what to bring.
        out: the folder to make.
        base: a folder. What is in it is checked to be the adapter's base; if nothing is, the base is pulled.
        include: see ``hub.pull.pull``, as for the other options.
        replace: likewise.
        allow_replace_gap: likewise.
        dry_run: likewise.
        progress: likewise.
    """
    report = pull_snapshot(
        open_snapshot(parse(ref)),
        out,
        include=include,
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        dry_run=dry_run,
        progress=progress,
    )
    if base is None:
        return report
    return provide_base(report, out, base, dry_run=dry_run, progress=progress)


def _is_registry(root: str) -> bool:
    return is_registry(open_registry(root).objects)


def _may_be_adapter(url: str) -> bool:
    """Returns whether what stands before the last two parts of a URL is a registry."""
    try:
        reference = parse(url)
    except FormatError:
        return False
    return isinstance(reference, RegistryReference) and _is_registry(reference.root)


def list_adapters(ref: str | None) -> ListReport:
    """Lists a registry, or the versions of one adapter.

    Args:
        ref: the URL of a registry, a reference to one adapter, or None for the registry of the environment.

    Raises:
        FormatError: nothing is given, and the environment names no registry.
    """
    if ref is None:
        registry = default_registry()
        if registry is None:
            raise FormatError.of(
                "no-registry",
                "no registry is given.",
                loc="REF",
                remedy=f"Give one (file:///folder), or set {REGISTRY_VARIABLE} to a folder or URL.",
            )
        return list_registry(parse_registry(registry))
    if is_remote(ref) and not ref.lower().startswith("hf://"):
        whole = parse_registry(ref)
        if "@" not in ref and (_is_registry(whole.root) or not _may_be_adapter(ref)):
            return list_registry(whole)  # which says so where there is none
    try:
        return list_versions(parse(ref))
    except FormatError as error:
        if is_remote(ref) or "/" in ref:
            raise
        message = f"{escape(ref)!r} is neither owner/name nor a URL."
        raise FormatError.of("reference", message, remedy="Write owner/name or a URL.") from error
