"""Reads the undo file of a merged folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapterhub_tools.errors import FormatError, IntegrityError, Problem, escape, raise_for
from adapterhub_tools.model.plan import ByteRange
from adapterhub_tools.model.receipt import Receipt, ReceiptUndo
from adapterhub_tools.model.undo import DOCUMENT, FRAME, PIECE_BYTES, UNDO_FILE, UNDO_SCHEMA, Undo
from adapterhub_tools.store import schemas
from adapterhub_tools.store.files import LocalFile, path_reason, resolve_inside
from adapterhub_tools.store.header import SafetensorsHeader, read_header
from adapterhub_tools.store.strict_json import parse_json

_MAX_DOCUMENT = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedUndo:
    """An undo file that belongs to its receipt.

    Attributes:
        undo: the description.
        header: where the blobs are.
        source: the open file.
    """

    undo: Undo
    header: SafetensorsHeader
    source: LocalFile

    def blob(self, name: str) -> ByteRange:
        """Returns where a blob is.

        Raises:
            FormatError: the description names one that is not there.
        """
        spec = self.header.tensors.get(name)
        if spec is None or spec.dtype != "U8":
            raise _broken(f"it has no blob {name!r}")
        return ByteRange(uri=str(self.source.path), offset=self.header.offsets[name], spec=spec)

    def unpack(self, name: str) -> Iterator[bytes]:
        """Yields the content of a packed blob.

        Raises:
            FormatError: it is broken.
        """
        yield from _unpack(self.source, self.blob(name))


@contextmanager
def open_undo(folder: Path, receipt: Receipt) -> Iterator[OpenedUndo]:
    """Opens the undo file of a merged folder, which must be the one that the receipt names.

    Raises:
        FormatError: there is none, or it is broken.
        IntegrityError: it belongs to another merge, or was changed.
        StoreError: it cannot be read.
    """
    path = folder / UNDO_FILE
    if receipt.undo is None or not path.is_file():
        why = "the receipt names none" if receipt.undo is None else "the file is missing"
        # Merges onto quantised weights have no undo file (ops/merge_base.py).
        onto = receipt.options.get("onto")
        close = "come close with --approximate."
        remedies = {
            "quantized": "Use the base itself.",
            "dequantized": f"Use the base itself; or, to its dequantised weights, {close}",
        }
        raise FormatError.of(
            "no-undo",
            f"this merge cannot be undone exactly: {why}.",
            file=UNDO_FILE,
            remedy=remedies.get(str(onto), f"Merge with --undo; or {close}"),
        )
    with LocalFile(resolve_inside(folder, UNDO_FILE), name=UNDO_FILE) as source:
        _check_sha256(source, receipt.undo)
        header = read_header(source)
        opened = _description(source, header)
        data = parse_json(b"".join(opened), file=UNDO_FILE, max_bytes=_MAX_DOCUMENT)
        raise_for(schemas.check(data, UNDO_SCHEMA, UNDO_FILE), FormatError)
        undo = Undo.from_json(data)
        for name in (*undo.headers, *undo.files):
            if reason := path_reason(name):
                raise _broken(f"the path {escape(name)} {reason}")
        if undo.output_digest != receipt.digest:
            raise IntegrityError.of(
                "other-undo",
                f"it undoes the merge with the digest {undo.output_digest}, but this is {receipt.digest}.",
                file=UNDO_FILE,
                remedy="Give the merged folder that this undo file was written with.",
            )
        yield OpenedUndo(undo=undo, header=header, source=source)


def _description(source: LocalFile, header: SafetensorsHeader) -> Iterator[bytes]:
    spec = header.tensors.get(DOCUMENT)
    if spec is None or spec.dtype != "U8":
        raise _broken("it has no description")
    total = 0
    for piece in _unpack(source, ByteRange(uri=UNDO_FILE, offset=header.offsets[DOCUMENT], spec=spec)):
        total += len(piece)
        if total > _MAX_DOCUMENT:
            raise _broken("its description is too large")
        yield piece


def _unpack(source: LocalFile, item: ByteRange) -> Iterator[bytes]:
    from adapterhub_tools.engine.undo_coding import decompress

    at, end = item.offset, item.offset + item.spec.nbytes
    while at < end:
        if at + FRAME.size > end:
            raise _broken(f"the blob {item.spec.name} ends early")
        packed, size = FRAME.unpack(source.read(at, FRAME.size))
        at += FRAME.size
        if at + packed > end or size > PIECE_BYTES:
            raise _broken(f"a piece of the blob {item.spec.name} has impossible sizes")
        data = decompress(source.read(at, packed), PIECE_BYTES)
        if len(data) != size:
            raise _broken(f"a piece of the blob {item.spec.name} does not have its size")
        yield data
        at += packed


def _check_sha256(source: LocalFile, recorded: ReceiptUndo) -> None:
    digest = hashlib.sha256()
    for at in range(0, source.length, PIECE_BYTES):
        digest.update(source.read(at, min(PIECE_BYTES, source.length - at)))
    if source.length != recorded.size or digest.hexdigest() != recorded.sha256:
        raise IntegrityError(
            Problem(
                kind="undo-digest",
                message=f"it has {source.length:,} bytes and the SHA-256 {digest.hexdigest()}; the receipt "
                f"records {recorded.size:,} and {recorded.sha256}.",
                file=UNDO_FILE,
                remedy="It is damaged, cut off, or that of another merge: get the folder again.",
            )
        )


def _broken(what: str) -> FormatError:
    return FormatError.of(
        "undo-file", f"{what}.", file=UNDO_FILE, remedy="The file is damaged: get it again."
    )
