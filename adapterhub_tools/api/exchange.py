"""Push, pull and list: adapters on the Hub and in registries of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterhub_tools.api.paths import Reference, local_path, optional_path

if TYPE_CHECKING:
    from adapterhub_tools.hub.listing import ListReport
    from adapterhub_tools.hub.pull import PullReport
    from adapterhub_tools.hub.push import PushReport
    from adapterhub_tools.model.protocols import Progress


def push(
    adapter: Reference,
    ref: str,
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
    """Publishes an adapter: validated, in one commit with its manifest and card, never twice.

    Args:
        adapter: the adapter's folder.
        ref: ``hf://owner/name``, with ``/folder`` behind it for a folder; or an adapter in a registry.
        private: whether a new repository is private; an existing public one is refused then.
        revision: the branch; made if it is not there.
        create_pr: whether to open a pull request instead of changing the branch.
        tag: a tag for the commit or version.
        include: files to send although they are not on the list of files of an adapter.
        message: the title of the commit.
        dry_run: whether only to say what would change.
        progress: told the bytes sent.

    Raises:
        FormatError: the adapter is not valid, or holds a secret; every problem.
        UnsupportedError: a symbolic link, a pickle alone, or an option that a registry does not have.
        HubError: it could not be pushed; the remote holds what it held, or all of the new.
        StoreError: a file cannot be read or was changed meanwhile.

    Example:
        >>> at.push("my-adapter", "hf://me/my-adapter", tag="v1.0", dry_run=True).summary
    """
    from adapterhub_tools.hub import transfer

    return transfer.push(
        local_path(adapter),
        ref,
        private=private,
        revision=revision,
        create_pr=create_pr,
        tag=tag,
        include=include,
        message=message,
        dry_run=dry_run,
        progress=progress,
    )


def pull(
    ref: str,
    out: Reference,
    *,
    base: Reference | None = None,
    include: Sequence[str] = (),
    replace: bool = False,
    allow_replace_gap: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PullReport:
    """Brings an adapter here: pinned to a commit, every file checked, the folder there whole or not at all.

    Args:
        ref: ``hf://owner/name@revision/folder``, or an adapter in a registry.
        out: the folder to make.
        base: a folder for the base: what is there is checked; if nothing is, the base is pulled into it.
        include: files to bring although they are not on the list of files of an adapter.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.
        dry_run: whether only to say what would be brought.
        progress: told the bytes received.

    Raises:
        HubError: it cannot be had.
        IntegrityError: bytes differ from the digests of the commit or of the manifest.
        FormatError: it is no adapter, or its manifest or config is broken.
        StoreError: the folder cannot be written; what was there is untouched.

    Example:
        >>> at.pull("hf://me/my-adapter@v1.0", "my-adapter", base="base").summary
    """
    from adapterhub_tools.hub import transfer

    return transfer.pull(
        ref,
        local_path(out),
        base=optional_path(base),
        include=include,
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        dry_run=dry_run,
        progress=progress,
    )


def list_adapters(ref: str | None = None) -> ListReport:
    """Says what a registry holds, or which versions and tags one adapter has.

    Args:
        ref: the URL of a registry, a reference to one adapter, or None for the registry that
            ``ADAPTERTOOL_REGISTRY`` names.

    Raises:
        FormatError: nothing is given and the environment names no registry, or a record is broken.
        StoreError: there is no registry.
        HubError: it cannot be read.

    Example:
        >>> at.list_adapters("file:///registry").adapters
    """
    from adapterhub_tools.hub import transfer

    return transfer.list_adapters(ref)
