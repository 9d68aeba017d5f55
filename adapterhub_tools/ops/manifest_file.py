"""The manifest on disk: which files it lists, reading it, and putting a new one in its place at once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from adapterhub_tools.errors import FormatError, Problem, StoreError, escape
from adapterhub_tools.model.manifest import MANIFEST_NAME, FileRecord, Manifest, is_listed
from adapterhub_tools.store.digest import file_sha256
from adapterhub_tools.store.files import is_folder, resolve_inside, store_error
from adapterhub_tools.store.strict_json import read_json


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
    final = root / MANIFEST_NAME
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{MANIFEST_NAME}.", dir=root)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(manifest.to_bytes())
            stream.flush()
            os.fchmod(stream.fileno(), 0o666 & ~_umask())
            os.fsync(stream.fileno())
        if replace or not _link(temporary, final):
            temporary.replace(final)
        _sync_folder(root)
    except FileExistsError as error:
        raise exists_error() from error
    except OSError as error:
        raise store_error(error, "write the manifest", final) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return final


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
        FormatError: one is not a regular file, or a link leads out of the folder.
        StoreError: one cannot be read.
    """
    return tuple(_record(root, path) for path in list_files(root))


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


def _record(root: Path, path: str) -> FileRecord:
    real = resolve_inside(root, path)
    digest = file_sha256(real)
    return FileRecord(path=path, size=real.stat().st_size, sha256=digest)


def _link(temporary: Path, final: Path) -> bool:
    """Gives the file its name, which fails where the name exists; False where no links are possible."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError:
        if final.exists():
            raise FileExistsError(final) from None
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(root: Path) -> None:
    descriptor = os.open(root, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
