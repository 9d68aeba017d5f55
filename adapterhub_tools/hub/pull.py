"""Brings an adapter here: pinned to a commit, each file checked, the folder there whole or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_tools.errors import FormatError, IntegrityError, Problem, UnsupportedError, escape
from adapterhub_tools.hub.chain import Link, follow
from adapterhub_tools.hub.origin import ORIGIN_NAME, Origin
from adapterhub_tools.hub.received import StagedFile
from adapterhub_tools.hub.selection import CARD_NAME, is_signature, select_adapter
from adapterhub_tools.hub.snapshot import Snapshot, fetch_small
from adapterhub_tools.hub.trees import RemoteFile
from adapterhub_tools.model.manifest import MANIFEST_NAME, FileRecord, Manifest
from adapterhub_tools.model.protocols import Progress, SilentProgress
from adapterhub_tools.ops.scan_file import file_findings
from adapterhub_tools.ops.scan_files import list_files
from adapterhub_tools.ops.scan_send import sift
from adapterhub_tools.ops.validation_report import Finding
from adapterhub_tools.store.adapter_files import CONFIG_FILE, open_adapter_files
from adapterhub_tools.store.destination import check_destination, check_space
from adapterhub_tools.store.directory import stage
from adapterhub_tools.store.folder import PICKLE_SUFFIXES
from adapterhub_tools.store.strict_json import parse_json

_INCOMPLETE = "Ask its publisher to push the adapter again, or pull another revision."


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledFile:
    """A file that was brought.

    Attributes:
        path: in the folder.
        size: bytes.
        sha256: of its content; in a dry run None where the server does not say.
    """

    path: str
    size: int
    sha256: str | None

    def to_json(self) -> dict[str, Any]:
        """Returns the record as a JSON object."""
        return {"path": self.path, "size": self.size, "sha256": self.sha256}


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """What a pull brought, or with ``dry_run`` would bring.

    Attributes:
        ref: what was asked for.
        endpoint: where it came from.
        commit: the commit that it was pinned to, or a registry's ``"sha256:…"``.
        out: the folder.
        dry_run: True if nothing was written.
        files: what was brought.
        verified_by_manifest: whether every file was compared with the manifest, beside the commit's digests.
        digest: the adapter digest that the manifest records.
        left: files that were not brought, each with the reason.
        chain: what the adapter was trained on, as far as it could be followed; the base stands last.
        base: what was done about the base: a line; None if nothing was asked.
        notes: what else should be known.
    """

    ref: str
    endpoint: str
    commit: str
    out: str
    dry_run: bool
    files: tuple[PulledFile, ...]
    verified_by_manifest: bool
    digest: str | None = None
    left: tuple[tuple[str, str], ...] = ()
    chain: tuple[Link, ...] = ()
    base: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def summary(self) -> str:
        """One line that proves what was done."""
        what = f"{len(self.files)} files, {self.nbytes:,} bytes, {self.commit}"
        if self.dry_run:
            return f"dry run: {what} would be pulled; nothing was written"
        how = (
            "verified by commit and manifest" if self.verified_by_manifest else "unverified by manifest: none"
        )
        return f"pulled: {what}, {how}, {self.out}"

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return {
            "ref": self.ref,
            "endpoint": self.endpoint,
            "commit": self.commit,
            "out": self.out,
            "dry_run": self.dry_run,
            "files": [file.to_json() for file in self.files],
            "bytes": self.nbytes,
            "verified_by_manifest": self.verified_by_manifest,
            "digest": self.digest,
            "left": [list(pair) for pair in self.left],
            "chain": [link.to_json() for link in self.chain],
            "base": self.base,
            "notes": list(self.notes),
            "summary": self.summary,
        }


def pull(
    snapshot: Snapshot,
    out: Path,
    *,
    include: Sequence[str] = (),
    replace: bool = False,
    allow_replace_gap: bool = False,
    dry_run: bool = False,
    follow_chain: bool = True,
    progress: Progress | None = None,
) -> PullReport:
    """Brings an adapter into a folder.

    Args:
        snapshot: what to bring.
        out: the folder to make.
        include: files to bring although they are not on the list of files of an adapter.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.
        dry_run: whether only to look.
        follow_chain: whether to look up what the adapter was trained on.
        progress: told the bytes received.

    Raises:
        HubError: it cannot be had.
        IntegrityError: bytes differ from the digests of the commit or of the manifest.
        FormatError: it is no adapter, its manifest or config is broken, or a scan found a disguise.
        UnsupportedError: a scan found code in it.
        StoreError: the folder cannot be written; what was there is untouched.
    """
    if not dry_run:
        check_destination(out, inputs=[], replace=replace)
    progress = progress or SilentProgress()
    names = {file.path: file for file in snapshot.files}
    missing = [name for name in include if name not in names]
    if missing:
        message = f"{snapshot.reference} has no {escape(', '.join(missing))}."
        raise FormatError.of(
            "no-file", message, loc="--include", remedy="Check the path inside the repository."
        )
    selected = select_adapter(names, include)
    small: dict[str, bytes] = {}
    manifest = _manifest(snapshot, names, small)
    taken, left = _by_manifest(selected.taken, selected.left, manifest, include)
    files = [names[name] for name in taken]
    expected = {record.path: record for record in manifest.files} if manifest else {}
    notes = list(_promised(expected, names, taken))
    _check_is_adapter(snapshot, taken, names)
    chain = follow(snapshot, manifest, _config(snapshot, names, small)) if follow_chain else ()
    report = PullReport(
        ref=snapshot.reference,
        endpoint=snapshot.endpoint,
        commit=snapshot.version,
        out=str(out),
        dry_run=dry_run,
        files=tuple(PulledFile(path=f.path, size=f.size, sha256=f.sha256) for f in files),
        verified_by_manifest=manifest is not None and not notes,
        digest=None if manifest is None else manifest.digest,
        left=left,
        chain=chain,
        notes=tuple(notes),
    )
    if dry_run:
        return report
    check_space(out.absolute().parent, sum(file.size for file in files))
    pulled: list[PulledFile] = []
    with stage(out, inputs=[], replace=replace, allow_replace_gap=allow_replace_gap) as staged:
        progress.start("pulling", sum(file.size for file in files))
        for file in files:
            with StagedFile(staged, file.path) as sink:
                if file.path in small:
                    sink.write(small[file.path])
                    sha256 = _sha256(small[file.path])
                    progress.advance(file.size)
                else:
                    sha256 = snapshot.fetch(file, sink, advance=progress.advance)
            _compare(expected.get(file.path), file, sha256)
            pulled.append(PulledFile(path=file.path, size=file.size, sha256=sha256))
        open_adapter_files(staged.path)  # refuses files that are not what they claim
        scanned = _scan(staged.path, include)
        origin = Origin(
            reference=snapshot.reference,
            endpoint=snapshot.endpoint,
            version=snapshot.version,
            files={file.path: file.sha256 or "" for file in pulled},
            verified_by_manifest=report.verified_by_manifest,
        )
        staged.commit((ORIGIN_NAME, origin.to_bytes()))
        progress.finish()
    return dataclasses.replace(report, files=tuple(pulled), notes=report.notes + scanned)


def _scan(folder: Path, include: Sequence[str]) -> tuple[str, ...]:
    """Holds what came against the rules of a scan; returns what is worth a note.

    Raises:
        FormatError: a disguise, a polyglot, a template that reaches for code; every problem.
        UnsupportedError: code in a file that is on the list.
    """
    found: list[Finding | Problem] = []
    for file in list_files(folder).files:
        with file.open() as source:
            found.extend(file_findings(file.path, source))
    return sift(found, accepted=include, refuse_secrets=False)


def _manifest(snapshot: Snapshot, names: dict[str, RemoteFile], small: dict[str, bytes]) -> Manifest | None:
    """Reads the manifest first: it says what belongs to the adapter."""
    if MANIFEST_NAME not in names:
        return None
    small[MANIFEST_NAME] = fetch_small(snapshot, names[MANIFEST_NAME])
    return Manifest.from_json(parse_json(small[MANIFEST_NAME], file=MANIFEST_NAME))


def _config(
    snapshot: Snapshot, names: dict[str, RemoteFile], small: dict[str, bytes]
) -> dict[str, Any] | None:
    if CONFIG_FILE not in names:
        return None
    small[CONFIG_FILE] = fetch_small(snapshot, names[CONFIG_FILE])
    data = parse_json(small[CONFIG_FILE], file=CONFIG_FILE)
    return data if isinstance(data, dict) else None


def _by_manifest(
    taken: tuple[str, ...],
    left: tuple[tuple[str, str], ...],
    manifest: Manifest | None,
    include: Sequence[str],
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Leaves what the manifest does not list: nobody vouches for it."""
    if manifest is None:
        return taken, left
    listed = {record.path for record in manifest.files}
    own = {MANIFEST_NAME, CARD_NAME, *include}
    stay = {name for name in taken if name not in listed | own and not is_signature(name)}
    more = tuple((name, "the manifest does not list it") for name in sorted(stay))
    return tuple(name for name in taken if name not in stay), tuple(sorted(left + more))


def _promised(
    expected: dict[str, FileRecord], names: dict[str, RemoteFile], taken: Sequence[str]
) -> list[str]:
    """Checks before any download that what the manifest lists is there, in the size that it says.

    Returns:
        Remarks on files that the manifest lists and that are not brought.
    """
    problems, notes = [], []
    for path, record in expected.items():
        file = names.get(path)
        if file is None:
            message = "is listed in the manifest, but missing."
            problems.append(Problem(kind="missing-file", message=message, file=path, remedy=_INCOMPLETE))
        elif file.size != record.size:
            message = f"has {file.size:,} bytes; the manifest says {record.size:,}."
            problems.append(Problem(kind="file-size", message=message, file=path, remedy=_INCOMPLETE))
        elif path not in taken:
            notes.append(f"not pulled although the manifest lists it: {path}")
    if problems:
        raise IntegrityError(*problems)
    return notes


def _check_is_adapter(snapshot: Snapshot, taken: Sequence[str], names: dict[str, RemoteFile]) -> None:
    if any(name.endswith(".safetensors") for name in taken) and (
        CONFIG_FILE in names or MANIFEST_NAME in names or "adapter_model.safetensors" in names
    ):
        return
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES) and "/" not in name]
    if CONFIG_FILE in names and pickles:
        raise UnsupportedError.of(
            "pickle",
            "its weights are a pickle, which can run code when it is read.",
            file=escape(pickles[0]),
            remedy="Ask its publisher for safetensors, or convert it in a place you trust.",
        )
    raise FormatError.of(
        "no-adapter",
        f"{escape(snapshot.reference)} holds no adapter: it needs {CONFIG_FILE} and a .safetensors file.",
        remedy="Check the reference; a folder inside a repository is written hf://owner/name/folder.",
    )


def _compare(record: FileRecord | None, file: RemoteFile, sha256: str) -> None:
    if record is not None and record.sha256 != sha256:
        raise IntegrityError.of(
            "file-digest",
            f"has SHA-256 {sha256}; the manifest says {record.sha256}.",
            file=escape(file.path),
            remedy=_INCOMPLETE,
        )


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
