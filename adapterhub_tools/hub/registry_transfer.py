"""Push to and pull from a registry: the same guarantees as a Hub's, pinned by digest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from adapterhub_tools.errors import FormatError, IntegrityError, UnsupportedError, escape
from adapterhub_tools.hub import card
from adapterhub_tools.hub.directory_store import DirectoryStore
from adapterhub_tools.hub.download import Sink
from adapterhub_tools.hub.fsspec_store import FsspecStore
from adapterhub_tools.hub.package import open_package, outgoing_bytes
from adapterhub_tools.hub.push import PushedFile, PushReport
from adapterhub_tools.hub.reference import RegistryReference, check_tag
from adapterhub_tools.hub.registry_place import check_place
from adapterhub_tools.hub.selection import CARD_NAME
from adapterhub_tools.hub.trees import ContentCheck, RemoteFile
from adapterhub_tools.hub.versions import Registry, tag_exists
from adapterhub_tools.model.protocols import Progress, SilentProgress

_TRIES_FOR_CONTENT = 2


def open_registry(root: str) -> Registry:
    """Returns the registry at a URL."""
    return Registry(DirectoryStore(root) if root.startswith("file:") else FsspecStore(root))


class RegistrySnapshot:
    """A version in a registry; see Snapshot."""

    def __init__(self, reference: RegistryReference) -> None:
        """Pins the reference to a version.

        Raises:
            HubError: there is none.
            StoreError: there is no registry.
        """
        self.reference: str = str(reference)
        self.endpoint: str = reference.root
        self.registry: Registry = open_registry(reference.root)
        found = self.registry.find(reference)
        self.version: str = found.id
        self.files: tuple[RemoteFile, ...] = found.files

    def fetch(self, file: RemoteFile, sink: Sink, *, advance: Callable[[int], None] | None = None) -> str:
        """Brings a file's content; see Snapshot."""
        for left in reversed(range(_TRIES_FOR_CONTENT)):
            check = ContentCheck(file)
            for piece in self.registry.objects.pieces(f"blobs/sha256/{file.sha256}"):
                check.update(piece)
                sink.write(piece)
                if advance is not None:
                    advance(len(piece))
                if check.size > file.size:
                    break
            try:
                check.raise_if_other()
            except IntegrityError:
                if left == 0:
                    raise
                sink.restart()
            else:
                return check.sha256
        raise AssertionError("unreachable")


def push_to_registry(
    adapter: Path,
    reference: RegistryReference,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    include: Sequence[str] = (),
    message: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Adds a version of an adapter to a registry; the arguments are those of ``push_to_hub``.

    Raises:
        UnsupportedError: an option that only a Hub has.
        FormatError: the adapter is not valid.
        StoreError: the registry, or a file of the adapter, cannot be read or written.
        HubError: a remote store failed.
    """
    given = {"--private": private, "--create-pr": create_pr, "--revision": revision}
    for option, value in given.items():
        if value:
            raise UnsupportedError.of(
                "registry-option",
                "a registry has versions and tags; access is that of its folder or bucket.",
                loc=option,
                remedy="Leave the option out, or push to hf://owner/name.",
            )
    if reference.version is not None:
        raise FormatError.of(
            "reference",
            f"{escape(reference)}: a push makes a new version.",
            remedy="Leave out what stands after '@'; --tag gives the new version a name.",
        )
    if tag is not None:
        check_tag(tag)
    progress = progress or SilentProgress()
    registry = open_registry(reference.root)
    check_place(registry.objects)
    with open_package(adapter, include=include, write=not dry_run) as package:
        numbers = registry.numbers(reference.name)
        before = registry.version(reference.name, numbers[-1]) if numbers else None
        text = package.card
        rendered = card.render(package.manifest, str(reference), text)
        files = sorted(
            (*package.files, outgoing_bytes(CARD_NAME, rendered.encode("utf-8"))), key=lambda file: file.path
        )
        there = {file.path: file.sha256 for file in before.files} if before else {}
        rows = [
            PushedFile(
                path=file.path,
                size=file.size,
                sha256=file.sha256,
                change="add"
                if file.path not in there
                else "same"
                if there[file.path] == file.sha256
                else "change",
            )
            for file in files
        ]
        gone = sorted(there.keys() - {file.path for file in files})
        rows += [PushedFile(path=path, size=0, sha256=None, change="delete") for path in gone]
        report = PushReport(
            ref=str(reference),
            endpoint=reference.root,
            commit=None,
            parent=before.id if before else None,
            created_commit=False,
            dry_run=dry_run,
            files=tuple(rows),
            digest=package.manifest.digest,
            left=package.left,
            notes=package.notes,
        )
        if dry_run:
            return report
        changed = any(row.change != "same" for row in rows)
        named = registry.tags(reference.name).get(tag) if tag is not None else None
        if tag is not None and named is not None and (changed or before is None or named != before.id):
            raise tag_exists(reference.name, tag)  # before anything is sent
        progress.start("pushing", sum(file.size for file in files))
        version, made = registry.publish(
            reference.name,
            files,
            digest=package.manifest.digest,
            message=message or "",
            advance=progress.advance,
        )
        progress.finish()
        if tag is not None:
            registry.tag(reference.name, tag, version)
        return replace(report, commit=version.id, created_commit=made, parent=version.parent, tag=tag)
