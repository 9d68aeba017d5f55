"""What an adapter's folder sends: validated, on the list, free of secrets, and described by its manifest."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from adapterhub_tools.errors import FormatError, Problem, StoreError, UnsupportedError, escape
from adapterhub_tools.hub.selection import CARD_NAME, is_signature, select_adapter
from adapterhub_tools.hub.trees import git_blob_id
from adapterhub_tools.hub.upload import Outgoing
from adapterhub_tools.model.manifest import MANIFEST_NAME, Manifest
from adapterhub_tools.ops.init import new_manifest
from adapterhub_tools.ops.manifest_file import load_manifest, write_manifest
from adapterhub_tools.ops.scan_file import file_findings
from adapterhub_tools.ops.scan_send import sift
from adapterhub_tools.ops.validate import validate
from adapterhub_tools.store.digest import file_sha256
from adapterhub_tools.store.files import LocalFile, store_error
from adapterhub_tools.store.folder import names_in

MAX_REGULAR_BYTES = 16 << 20
"""A file that is larger is sent as a large one, whatever the server says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """An adapter that is ready to be sent.

    Attributes:
        manifest: as it is sent; its file list is that of the files sent.
        files: everything but the card, sorted by path.
        card: the text of the folder's own README.md, if there is one.
        left: files that are not sent, each with the reason.
        notes: what else should be known.
    """

    manifest: Manifest
    files: tuple[Outgoing, ...]
    card: str | None
    left: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


@contextmanager
def open_package(adapter: Path, *, include: Sequence[str] = (), write: bool) -> Iterator[Package]:
    """Validates an adapter and opens the files that it sends.

    Args:
        adapter: its folder.
        include: files to send although they are not on the list of files of an adapter.
        write: whether a manifest that is missing may be written into the folder; where it cannot be, it is
            only sent.

    Raises:
        FormatError: it is not valid, or a scan found a secret or a disguise; every problem.
        IntegrityError: its files differ from its manifest.
        UnsupportedError: a file that would be sent is a symbolic link, a pickle or other code, or there is
            only a pickle.
        StoreError: a file cannot be read.
    """
    if adapter.is_file():
        raise UnsupportedError.of(
            "not-a-folder",
            "an adapter is pushed as a folder.",
            file=adapter.name,
            remedy="Put the file into a folder of its own, with its config, and give the folder.",
        )
    validate(adapter, accept_embeddings=True).raise_for_problems()
    manifest, notes, is_new = _complete_manifest(adapter)
    names = tuple(_walk(adapter))
    absent = [name for name in include if name not in names]
    if absent:
        message = f"the folder has no {escape(', '.join(absent))}."
        raise FormatError.of("no-file", message, loc="--include", remedy="Give paths relative to the folder.")
    selected = select_adapter(names, include)
    _refuse_links(adapter, [name for name in selected.taken if name in names])
    with ExitStack() as stack:
        opened = {
            name: stack.enter_context(LocalFile(adapter / name, name=name))
            for name in selected.taken
            if name != MANIFEST_NAME
        }
        scanned = _scan(opened, include)
        sent = replace(manifest, files=tuple(file for file in manifest.files if file.path in opened))
        unchanged = (adapter / MANIFEST_NAME).exists() and sent == manifest
        data = (adapter / MANIFEST_NAME).read_bytes() if unchanged else sent.to_bytes()
        _check_signatures(opened, unchanged)
        if is_new:
            # Only now: one that a refused push left behind would not describe what is corrected after it.
            notes = (*notes, _leave_manifest(adapter, manifest, write))
        known = {file.path: file.sha256 for file in sent.files}
        files = [
            _outgoing(name, source, known.get(name)) for name, source in opened.items() if name != CARD_NAME
        ]
        files.append(outgoing_bytes(MANIFEST_NAME, data))
        card = opened.get(CARD_NAME)
        yield Package(
            manifest=sent,
            files=tuple(sorted(files, key=lambda file: file.path)),
            card=None if card is None else _card_text(card),
            left=selected.left,
            notes=notes + scanned,
        )


def outgoing_bytes(path: str, data: bytes) -> Outgoing:
    """Returns a file to send whose content is in memory."""
    import hashlib

    return Outgoing(
        path=path,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        blob_id=git_blob_id(data),
        content=data,
    )


def _complete_manifest(adapter: Path) -> tuple[Manifest, tuple[str, ...], bool]:
    """Returns the manifest of the folder, or one made for it; what to say of that; whether it is new."""
    if (adapter / MANIFEST_NAME).exists():
        return load_manifest(adapter), (), False
    return *new_manifest(adapter), True


def _leave_manifest(adapter: Path, manifest: Manifest, write: bool) -> str:
    """Writes a new manifest into the folder; one that cannot be written, such as an image, is sent as it is.

    Returns:
        a remark on what was done.

    Raises:
        StoreError: somebody else wrote one meanwhile.
    """
    if not write:
        return f"{MANIFEST_NAME} would be written into the folder"
    try:
        write_manifest(adapter, manifest, replace=False)
    except StoreError as error:
        problem = error.problems[0]
        if problem.kind == "exists":
            raise
        return f"{MANIFEST_NAME} is sent, but not written into the folder: {problem.message}"
    return f"{MANIFEST_NAME} was written into the folder"


def _walk(root: Path, below: str = "") -> Iterator[str]:
    """Yields every file of the folder; a folder that is a link is named, not entered."""
    for name in names_in(root / below if below else root):
        path = f"{below}{name}"
        if (root / path).is_dir() and not (root / path).is_symlink():
            yield from _walk(root, path + "/")
        else:
            yield path


def _refuse_links(root: Path, names: Sequence[str]) -> None:
    problems = []
    for name in names:
        try:
            mode = (root / name).lstat().st_mode
        except OSError as error:
            raise store_error(error, "examine it", name) from error
        if not stat.S_ISREG(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
            remedy = "Put the file itself into the folder, for example with `cp -rL`."
            problems.append(
                Problem(kind="symlink", message=f"is {kind}; it is not sent.", file=name, remedy=remedy)
            )
    if problems:
        raise UnsupportedError(*problems)


def _scan(opened: dict[str, LocalFile], include: Sequence[str]) -> tuple[str, ...]:
    """Holds what would be sent against the rules of a scan; returns what is worth a note.

    Raises:
        FormatError: a secret, a disguise, a template that reaches for code; every problem.
        UnsupportedError: a pickle or other code.
    """
    return sift(
        (found for name, source in opened.items() for found in file_findings(name, source)), accepted=include
    )


def _check_signatures(opened: dict[str, LocalFile], unchanged: bool) -> None:
    signatures = [name for name in opened if is_signature(name)]
    if signatures and not unchanged:
        raise UnsupportedError.of(
            "signature",
            "it signs the manifest, which has to change: it lists files that are not sent.",
            file=signatures[0],
            remedy="Remove what is not sent, run `adaptertool init --replace`, and sign again.",
        )


def _outgoing(name: str, source: LocalFile, sha256: str | None) -> Outgoing:
    """Describes an open file; its SHA-256 was computed a moment ago where the manifest lists it."""
    small = source.length <= MAX_REGULAR_BYTES and not name.endswith(".safetensors")
    if source.length <= 1 << 20:
        small = True
    return Outgoing(
        path=name,
        size=source.length,
        sha256=sha256 or file_sha256(source.path),
        blob_id=git_blob_id(source.read(0, source.length)) if small else None,
        content=source,
    )


def _card_text(source: LocalFile) -> str:
    try:
        return source.read(0, source.length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError.of(
            "not-utf8", "is not UTF-8 text.", file=CARD_NAME, remedy="Save it as UTF-8."
        ) from error
