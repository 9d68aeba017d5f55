"""Reads the receipt in a merged folder."""

from __future__ import annotations

from pathlib import Path

from adapterhub_tools.errors import FormatError, IntegrityError, UnsupportedVersionError, escape, raise_for
from adapterhub_tools.model.receipt import RECEIPT_FILE, Receipt
from adapterhub_tools.store import schemas
from adapterhub_tools.store.files import resolve_inside
from adapterhub_tools.store.strict_json import read_json_object

SCHEMA = "merge-receipt-1.0"


def load_receipt(folder: Path) -> Receipt:
    """Reads and checks a receipt.

    Args:
        folder: the merged folder, or the receipt itself.

    Raises:
        FormatError: there is none, or it does not obey its schema.
        UnsupportedVersionError: its major version is newer.
        StoreError: it cannot be read.
    """
    if folder.is_dir():
        if not (folder / RECEIPT_FILE).is_file():
            raise FormatError.of(
                "no-receipt",
                f"the folder has no {RECEIPT_FILE}, so nothing says how it was made.",
                file=str(folder),
                remedy="Give a folder that `adaptertool merge` wrote.",
            )
        data = read_json_object(resolve_inside(folder, RECEIPT_FILE), file=RECEIPT_FILE)
    else:
        data = read_json_object(folder, file=folder.name)
    version = data.get("schema_version")
    if isinstance(version, str) and version.partition(".")[0].isdigit() and not version.startswith("1."):
        raise UnsupportedVersionError.of(
            "version",
            f"the receipt's version is {escape(version)}, this version of adaptertool reads 1.x.",
            file=RECEIPT_FILE,
            remedy="Use a newer version of adaptertool.",
        )
    raise_for(schemas.check(data, SCHEMA, RECEIPT_FILE), FormatError)
    receipt = Receipt.from_json(data)
    _check_root(receipt)
    return receipt


def _check_root(receipt: Receipt) -> None:
    """Checks that the digest of the whole follows from those of the tensors."""
    from adapterhub_tools.store.digest import root_digest, split_digest

    algorithm, _ = split_digest(receipt.digest, file=RECEIPT_FILE, loc="/output/digest")
    digests = {tensor.name: bytes.fromhex(tensor.digest) for tensor in receipt.tensors}
    found = root_digest(algorithm, digests)
    if found != receipt.digest:
        raise IntegrityError.of(
            "receipt",
            f"the tensors listed give {found}, but the receipt says {receipt.digest}.",
            file=RECEIPT_FILE,
            loc="/output/digest",
            remedy="The receipt was edited or damaged: get the folder again.",
        )
