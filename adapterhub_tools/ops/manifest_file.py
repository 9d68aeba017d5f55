"""The manifest on disk: which files it lists, reading it, and putting a new one in its place at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from adapterhub_tools.errors import FormatError, Problem, StoreError, escape
from adapterhub_tools.model.manifest import MANIFEST_NAME, FileRecord, Manifest, is_listed, path_problem
from adapterhub_tools.store.digest import file_sha256
from adapterhub_tools.store.files import is_folder, resolve_inside, store_error
from adapterhub_tools.store.strict_json import read_json
from adapterhub_tools.store.whole_file import put_whole


def manifest_path(path: Path) -> Path:
    """Returns where the manifest of an adapter lies, given its folder or a file in it."""
    return (path if is_folder(path) else path.parent) / MANIFEST_NAME


def load_manifest(path: Path) -> Manifest:
    """Reads a manifest.

    Args:
        path: the manifest, or the folder of its adapter.

    Raises:
        UnsupportedVersionError: its major version is newer.
        FormatError: it is broken; every problem.
        StoreError: it cannot be read.
    """
    file = path / MANIFEST_NAME if is_folder(path) else path
    return Manifest.from_json(read_json(file), file=file.name)


def write_manifest(root: Path, manifest: Manifest, *, replace: bool) -> Path:
    """Writes a manifest into an adapter's folder: a reader sees the old one or all of the new one.

    Args:
        root: the folder.
        manifest: what to write.
        replace: whether an existing one may be replaced.

    Raises:
        StoreError: there is one already, or it cannot be written.
    """
    try:
        return put_whole(root, MANIFEST_NAME, manifest.to_bytes(), replace=replace)
    except FileExistsError as error:
        raise exists_error() from error
    except OSError as error:
        raise store_error(error, "write the manifest", root / MANIFEST_NAME) from error


def exists_error() -> StoreError:
    """Returns the error for a manifest that is there already."""
    return StoreError(
        Problem(
            kind="exists",
            message="the adapter has a manifest already.",
            file=MANIFEST_NAME,
            remedy="Give --replace to write a new one; its training, licence, tags and history are kept.",
        )
    )


def list_files(root: Path) -> list[str]:
    """Returns the files that a manifest of this folder lists, sorted by path; linked folders are not entered.

    Raises:
        StoreError: the folder cannot be read.
    """

    def failed(error: OSError) -> None:
        raise store_error(error, "list the folder", root)

    found = []
    for folder, folders, files in os.walk(root, onerror=failed):
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        folders[:] = [name for name in folders if is_listed(prefix + name)]
        found += [prefix + name for name in files if is_listed(prefix + name)]
    return sorted(found)


def record_files(root: Path) -> tuple[FileRecord, ...]:
    """Returns the records of all files that a manifest of this folder lists.

    Raises:
        FormatError: one is not a regular file, a link leads out of the folder, or a name may not stand in a
            manifest.
        StoreError: one cannot be read.
    """
    paths = list_files(root)
    problems = [
        Problem(
            kind="file-name",
            message=f"its name {reason}; no manifest can list it.",
            file=escape(path),
            remedy="Rename or remove the file.",
        )
        for path in paths
        if (reason := path_problem(path) or _encoding_problem(path))
    ]
    if problems:
        raise FormatError(*problems)
    return tuple(_record(root, path) for path in paths)


def file_problems(root: Path, records: tuple[FileRecord, ...]) -> Iterator[Problem]:
    """Yields what differs between a manifest's file list and the folder; sizes are compared before digests.

    Raises:
        StoreError: a file cannot be read.
    """
    present = set(list_files(root))
    for record in records:
        if record.path not in present:
            yield file_problem("missing-file", "is listed in the manifest, but missing.", record.path)
            continue
        present.discard(record.path)
        try:
            found = _record(root, record.path)
        except FormatError as error:
            yield from error.problems
            continue
        if found.size != record.size:
            message = f"has {found.size:,} bytes; the manifest says {record.size:,}."
            yield file_problem("file-size", message, record.path)
        elif found.sha256 != record.sha256:
            message = f"has SHA-256 {found.sha256}; the manifest says {record.sha256}."
            yield file_problem("file-digest", message, record.path)
    for path in sorted(present):
        yield file_problem("unlisted-file", "is in the folder, but the manifest does not list it.", path)


def file_problem(kind: str, message: str, path: str) -> Problem:
    """Returns the problem that a file is not what a manifest's file list says."""
    remedy = (
        "Get the adapter again from its source, or run `adaptertool init --replace` if the change is yours."
    )
    return Problem(kind=kind, message=message, file=escape(path), remedy=remedy)


def _encoding_problem(path: str) -> str:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "is not UTF-8"
    return ""


def _record(root: Path, path: str) -> FileRecord:
    real = resolve_inside(root, path)
    digest = file_sha256(real)
    return FileRecord(path=path, size=real.stat().st_size, sha256=digest)
