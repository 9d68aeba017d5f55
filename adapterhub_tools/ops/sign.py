"""Signs a folder: a merged model, an adapter, or whatever else is to travel."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_tools.errors import StoreError, UnsupportedError
from adapterhub_tools.store.directory import StagedDirectory
from adapterhub_tools.store.files import is_folder, store_error
from adapterhub_tools.store.signature import SIGNATURE_FILE, Signer, covered_files, signature_name
from adapterhub_tools.store.whole_file import put_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class SignReport:
    """What was signed.

    Attributes:
        path: the signature.
        replaced: whether there was one before.
        files: the files that it covers.
    """

    path: str
    replaced: bool
    files: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One line."""
        return f"signed: {len(self.files)} files, {self.path}"

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return {
            "schema_version": "1.0",
            "operation": "sign",
            "path": self.path,
            "replaced": self.replaced,
            "files": list(self.files),
        }


def sign(folder: Path, key: Path, *, replace: bool = False) -> SignReport:
    """Signs every file of a folder, and writes the signature into it.

    Args:
        folder: the folder; see store/signature.py for the few files that are not covered.
        key: the PEM file of an elliptic-curve private key.
        replace: whether an existing signature may be replaced.

    Raises:
        UnsupportedError: the extra ``[sign]`` is not installed; it is not a folder; the key lies in it.
        FormatError: the key is none; or there is a symbolic link or a special file in the folder.
        StoreError: it is signed already, or a file cannot be read or written.
    """
    if not is_folder(folder):
        raise UnsupportedError.of(
            "not-a-folder", "a signature is that of a folder.", file=str(folder), remedy="Give its folder."
        )
    root = folder.resolve()
    signer = Signer(key)
    with contextlib.suppress(ValueError):
        inside = key.resolve().relative_to(root)
        raise UnsupportedError.of(
            "key-inside",
            f"the private key lies in the folder that is to be signed: {inside}.",
            file=str(key),
            remedy="Move it elsewhere before the folder is shared.",
        )
    name = signature_name(root)
    exists = (root / name).exists()
    if exists and not replace:
        raise _signed_already(name)
    data = signer.sign(root, folder.name or root.name)
    try:
        put_whole(root, name, data, replace=replace)
    except FileExistsError as error:
        raise _signed_already(name) from error
    except OSError as error:
        raise store_error(error, "write the signature", folder / name) from error
    return SignReport(path=str(folder / name), replaced=exists, files=covered_files(root))


def commit_signed(staged: StagedDirectory, last: tuple[str, bytes], signer: Signer | None, name: str) -> None:
    """Commits a folder, with a signature over all of it, its last file included, where there is a signer.

    Args:
        staged: the folder being built.
        last: name and content of the receipt.
        signer: who signs; None commits without a signature.
        name: what the signature calls the folder.

    Raises:
        StoreError: as ``StagedDirectory.commit``.
    """
    if signer is not None:
        # The receipt must not reach the device before what it vouches for, nor the signature before that.
        staged.sync_tree()
        staged.write_bytes(*last)
        last = (SIGNATURE_FILE, signer.sign(staged.path, name))
    staged.commit(last)


def _signed_already(name: str) -> StoreError:
    return StoreError.of(
        "exists", "the folder is signed already.", file=name, remedy="Give --replace to sign it again."
    )
