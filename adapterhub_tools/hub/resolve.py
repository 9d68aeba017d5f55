"""The seam between references and files: what the operations read, wherever it is.

A local path is passed on as it is. A remote adapter is pulled into a temporary folder, verified; a remote
base is streamed by range; to describe either, only headers are read.

For a local path nothing else of this package is loaded.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adapterhub_tools.errors import (
    AdapterError,
    FormatError,
    IntegrityError,
    StoreError,
    UnsupportedError,
    escape,
)
from adapterhub_tools.hub.reference import HubReference, is_id, is_remote
from adapterhub_tools.model.quant_scheme import REMOTE_QUANTISED

if TYPE_CHECKING:
    from adapterhub_tools.hub.snapshot import HubSnapshot
    from adapterhub_tools.ops.merge_report import MergeReport
    from adapterhub_tools.ops.scan_files import Listing
    from adapterhub_tools.store.adapter_files import AdapterFiles
    from adapterhub_tools.store.checkpoint import Checkpoint

R = TypeVar("R")
Given = str | PathLike[str]


@contextmanager
def adapter_folder(reference: Given) -> Iterator[Path]:
    """Yields the folder of an adapter; a remote one is pulled, verified, and removed afterwards.

    Raises:
        AdapterError: it cannot be had; see ``hub.pull.pull``.
    """
    with adapter_or_refusal(reference) as found:
        if isinstance(found, AdapterError):
            raise found
        yield found


@contextmanager
def adapter_or_refusal(reference: Given) -> Iterator[Path | AdapterError]:
    """Yields what ``adapter_folder`` does, or why what is there was refused, for who reports problems.

    Raises:
        AdapterError: the reference is none, or nothing could be had.
    """
    text = fspath(reference)
    if not is_remote(text):
        yield _local(text)
        return
    from adapterhub_tools.hub.pull import pull
    from adapterhub_tools.hub.transfer import open_snapshot, parse

    snapshot = open_snapshot(parse(text))
    with _scratch() as scratch:
        folder = scratch / _short_name(text, "adapter")
        found: Path | AdapterError = folder
        try:
            pull(snapshot, folder, follow_chain=False)
        except (FormatError, IntegrityError, UnsupportedError) as error:
            found = error
        yield found


@contextmanager
def base_files(reference: Given) -> Iterator[Path | Checkpoint]:
    """Yields the path of a base, or a remote one opened to be read once, from front to back.

    Raises:
        AdapterError: it cannot be had.
    """
    text = fspath(reference)
    if not is_remote(text):
        yield _local(text)
        return
    from adapterhub_tools.hub.remote_folder import stream_base

    snapshot = _on_hub(text)
    with _scratch() as scratch, _pool() as pool:
        yield stream_base(snapshot, _named_folder(scratch, text, "base"), pool)


@contextmanager
def base_folder(reference: Given) -> Iterator[Path]:
    """Yields the folder of a model that is read more than once; a remote one is brought and later removed.

    Raises:
        AdapterError: it cannot be had; see ``hub.base_pull.pull_base``.
    """
    text = fspath(reference)
    if not is_remote(text):
        yield _local(text)
        return
    from adapterhub_tools.hub.base_pull import pull_base

    snapshot = _on_hub(text)
    with _scratch() as scratch:
        folder = scratch / _short_name(text, "base")
        pull_base(snapshot, folder)
        yield folder


@contextmanager
def described(reference: Given) -> Iterator[Path | Checkpoint | AdapterFiles]:
    """Yields a path, or a remote adapter or base opened by its headers.

    Raises:
        AdapterError: it cannot be had.
    """
    text = fspath(reference)
    if not is_remote(text):
        yield _local(text)
        return
    from adapterhub_tools.hub.remote_folder import describe_adapter, describe_base, is_adapter
    from adapterhub_tools.hub.snapshot import HubSnapshot
    from adapterhub_tools.hub.transfer import parse

    parsed = parse(text)
    if not isinstance(parsed, HubReference):
        with adapter_folder(text) as folder:
            yield folder
        return
    snapshot = HubSnapshot(parsed)
    with _scratch() as scratch:
        folder = _named_folder(scratch, text, "model")
        yield describe_adapter(snapshot, folder) if is_adapter(snapshot) else describe_base(snapshot, folder)


@contextmanager
def adapter_folders(references: Iterable[Given]) -> Iterator[list[Path]]:
    """Yields the folders of several adapters; see ``adapter_folder``."""
    with ExitStack() as stack:
        yield [stack.enter_context(adapter_folder(reference)) for reference in references]


@contextmanager
def optional_base(reference: Given | None) -> Iterator[Path | Checkpoint | None]:
    """Yields a base as ``base_files`` does, or None for None."""
    if reference is None:
        yield None
        return
    with base_files(reference) as base:
        yield base


@contextmanager
def described_base(reference: Given | None) -> Iterator[Path | Checkpoint | None]:
    """Yields a base as ``described`` does, or None for None; an adapter is refused like a local one."""
    if reference is None:
        yield None
        return
    from adapterhub_tools.store.adapter_files import AdapterFiles

    with described(reference) as found:
        yield found.root if isinstance(found, AdapterFiles) else found


def scanned(reference: Given) -> Listing:
    """Returns the files of a path or of a reference, whatever they are.

    Raises:
        StoreError: the path cannot be read.
        HubError: the reference cannot be had.
    """
    from adapterhub_tools.ops.scan_files import list_files

    text = fspath(reference)
    if not is_remote(text):
        return list_files(_local(text))
    from adapterhub_tools.hub.scan_remote import remote_listing
    from adapterhub_tools.hub.transfer import open_snapshot, parse

    return remote_listing(open_snapshot(parse(text)))


def named(report: R, reference: Given) -> R:
    """Returns a report whose ``path`` is the reference, not the temporary folder that stood for it."""
    text = fspath(reference)
    if not is_remote(text):
        return report
    changed: Any = report
    return dataclasses.replace(changed, path=text)  # type: ignore[no-any-return]


def merged(base: Given, merge: Callable[[Path | Checkpoint], MergeReport], *, dry_run: bool) -> MergeReport:
    """Merges onto a base that may be remote, and says in the report how it was read.

    It is streamed; one whose weights are dequantised is read more than once, and is brought into a temporary
    folder.

    Args:
        base: the base.
        merge: what merges onto its path, or onto one that is open already.
        dry_run: whether nothing is written, so that a base is read only if it must be.

    Raises:
        AdapterError: the base cannot be had; whatever ``merge`` raises.
    """
    text, way = fspath(base), "streamed from"
    try:
        with base_files(base) as opened:
            report = merge(opened)
        if dry_run or not is_remote(text):
            return report
    except UnsupportedError as error:
        if all(problem.kind != REMOTE_QUANTISED for problem in error.problems):
            raise
        way = "brought into a temporary folder from"
        from adapterhub_tools.hub.origin import ORIGIN_NAME

        with base_folder(base) as folder:
            (folder / ORIGIN_NAME).unlink(missing_ok=True)  # what a pull leaves is no part of the model
            report = merge(folder)
    note = f"the base was {way} {escape(text)}; each file had the digest that the commit names"
    return dataclasses.replace(report, notes=(*report.notes, note))


def _local(text: str) -> Path:
    """Returns the path; one that is not there, but could be an id of the Hub, is refused with that remedy."""
    path = Path(text)
    if "/" in text and is_id(text) and not os.path.lexists(path):
        raise StoreError.of(
            "not-found",
            "there is nothing at this path.",
            file=text,
            remedy=f"Check the path; what lies on the Hub is written hf://{text}, in a registry file:///….",
        )
    return path


def _on_hub(text: str) -> HubSnapshot:
    from adapterhub_tools.hub.snapshot import HubSnapshot
    from adapterhub_tools.hub.transfer import parse

    reference = parse(text)
    if not isinstance(reference, HubReference):
        raise UnsupportedError.of(
            "registry-base",
            f"{escape(text)!r}: a registry holds adapters, not bases.",
            remedy="Give the base as a local folder or hf://owner/name.",
        )
    return HubSnapshot(reference)


def _short_name(text: str, default: str) -> str:
    """Returns the last part of a reference: what reports and messages call what lies there."""
    return text.split("@")[0].rstrip("/").rpartition("/")[2] or default


def _named_folder(scratch: Path, text: str, default: str) -> Path:
    folder = scratch / _short_name(text, default)
    folder.mkdir()
    return folder


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="adaptertool-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    from adapterhub_tools.hub.remote_folder import READERS

    pool = ThreadPoolExecutor(READERS, thread_name_prefix="adaptertool-range")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
