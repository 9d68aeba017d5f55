"""Checks the signature of a folder: whose it is, and that the files are those that were signed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adapterhub_tools.errors import UnsupportedError
from adapterhub_tools.ops.verify_report import VerifyReport
from adapterhub_tools.store.files import is_folder
from adapterhub_tools.store.signature import NOT_COVERED, check_signature, signature_name


def verify_signature(folder: Path, public_key: Path) -> VerifyReport:
    """Compares the files of a folder with the signature in it.

    Args:
        folder: a folder that was signed.
        public_key: the PEM file of the signer's public key.

    Raises:
        UnsupportedError: the extra ``[sign]`` is not installed; or it is not a folder.
        FormatError: the key is not a public key.
        StoreError: a file cannot be read.
    """
    if not is_folder(folder):
        raise UnsupportedError.of(
            "not-a-folder", "a signature is that of a folder.", file=str(folder), remedy="Give its folder."
        )
    covered, problems = check_signature(folder, public_key)
    signature = signature_name(folder)
    here = ", ".join(name for name in NOT_COVERED if name != signature and (folder / name).exists())
    return VerifyReport(
        path=str(folder),
        mode="signature",
        device="cpu",
        tensors=(),
        problems=problems,
        notes=(f"not covered by the signature: {here}",) if here and not problems else (),
        signed_files=covered,
    )


def with_signature(report: VerifyReport, signature: VerifyReport | None) -> VerifyReport:
    """Returns a report with what was found about the signature, if that was asked."""
    if signature is None:
        return report
    return replace(
        report,
        problems=signature.problems + report.problems,
        notes=report.notes + signature.notes,
        signed_files=signature.signed_files,
    )
