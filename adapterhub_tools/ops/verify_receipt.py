"""Checks a merged folder against its receipt: digests alone, without base or adapter."""

from __future__ import annotations

from pathlib import Path

from adapterhub_tools.errors import FormatError, IntegrityError, Problem
from adapterhub_tools.model.protocols import Progress
from adapterhub_tools.model.receipt import RECEIPT_FILE, Receipt
from adapterhub_tools.model.undo import UNDO_FILE
from adapterhub_tools.ops.receipt_file import load_receipt
from adapterhub_tools.ops.verify_report import TensorVerdict, VerifyReport
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.digest import config_digest, digest_checkpoint, file_sha256, split_digest
from adapterhub_tools.store.files import resolve_inside
from adapterhub_tools.store.side_files import side_file_names
from adapterhub_tools.store.signature import NOT_COVERED

TENSOR_KINDS = ("tensor-digest", "missing-tensor", "extra-tensor")
"""The kinds of problems that are about single tensors."""
_CHANGED = "The folder was changed after the merge: get it again, or merge again."


def verify_receipt(merged: Path, *, threads: int | None, progress: Progress | None) -> VerifyReport:
    """Compares every tensor and file of a merged folder with its receipt.

    Args:
        merged: the folder.
        threads: the number of workers; None takes two.
        progress: told the bytes read.

    Raises:
        StoreError: a file cannot be read.
    """
    try:
        receipt = load_receipt(merged)
        checkpoint = open_checkpoint(merged)
    except (FormatError, IntegrityError) as error:
        return VerifyReport(
            path=str(merged), mode="receipt", device="cpu", tensors=(), problems=error.problems
        )
    algorithm, _ = split_digest(receipt.digest, file=RECEIPT_FILE, loc="/output/digest")
    found = digest_checkpoint(checkpoint, algorithm=algorithm, threads=threads or 2, progress=progress)
    problems: list[Problem] = []
    tensors = _tensors(receipt, checkpoint, found, problems)
    _files(receipt, checkpoint, merged, problems)
    return VerifyReport(
        path=str(merged),
        mode="receipt",
        device="cpu",
        tensors=tensors,
        problems=tuple(problems),
        notes=(
            f"base {receipt.base.digest or receipt.base.targets_digest or 'not recorded'}",
            *(f"adapter {adapter.digest}" for adapter in receipt.adapters),
            "this shows that nothing changed since the merge, not that the merge was right: "
            "for that, give base and adapter too",
        ),
    )


def onto_problem(receipt: Receipt) -> Problem:
    """Returns why a merge onto quantised weights is not verified from samples, and what checks it."""
    return Problem(
        kind="onto",
        file=RECEIPT_FILE,
        loc="/options/onto",
        message=f"it was merged onto {receipt.options['onto']} weights of a quantised base, which are made "
        "as they are read; this check does not make them.",
        remedy="Repeat the merge with `adaptertool merge --replay`, which compares every tensor; "
        "`adaptertool verify --receipt` finds later changes.",
    )


def _tensors(
    receipt: Receipt, checkpoint: Checkpoint, found: dict[str, bytes], problems: list[Problem]
) -> tuple[TensorVerdict, ...]:
    verdicts = []
    for tensor in receipt.tensors:
        rows = tensor.shape[0] if tensor.shape else 1
        digest = found.get(tensor.name)
        spec = None if digest is None else checkpoint.tensors[tensor.name].spec
        same = digest is not None and digest.hex() == tensor.digest
        same = same and spec is not None and (spec.dtype, spec.shape) == (tensor.dtype, tensor.shape)
        cause = ""
        if digest is None or spec is None:
            cause = "it is missing"
        elif not same:
            cause = f"its digest is {digest.hex()}, the receipt records {tensor.digest}"
            if (spec.dtype, spec.shape) != (tensor.dtype, tensor.shape):
                cause = f"it is {spec.dtype} {list(spec.shape)}, the receipt records {tensor.dtype} "
                cause += f"{list(tensor.shape)}"
        verdicts.append(
            TensorVerdict(
                name=tensor.name,
                verdict="digest" if same else "wrong",
                arithmetic="bytes",
                rows=rows,
                rows_checked=0 if digest is None else rows,
                cause=cause,
            )
        )
        if not same:
            problems.append(
                Problem(
                    kind="tensor-digest" if digest is not None else "missing-tensor",
                    message=f"{cause}.",
                    file="" if digest is None else checkpoint.tensors[tensor.name].file,
                    loc=tensor.name,
                    remedy=_CHANGED,
                )
            )
    listed = {tensor.name for tensor in receipt.tensors}
    problems += [
        Problem(kind="extra-tensor", message="the receipt does not list it.", loc=name, remedy=_CHANGED)
        for name in found
        if name not in listed
    ]
    return tuple(verdicts)


def _files(receipt: Receipt, checkpoint: Checkpoint, merged: Path, problems: list[Problem]) -> None:
    def add(kind: str, file: str, message: str) -> None:
        problems.append(Problem(kind=kind, message=message, file=file, remedy=_CHANGED))

    def inside(name: str) -> Path | None:
        try:
            return resolve_inside(merged, name)
        except FormatError as error:
            problems.extend(error.problems)
            return None

    for name, size in receipt.files.items():
        path = inside(name)
        if path is None:
            continue
        held = path.stat().st_size if path.is_file() else None
        if held != size:
            add("file-size", name, f"it has {held} bytes, the receipt records {size}.")
    recorded = dict(receipt.side_files)
    if receipt.undo is not None:
        recorded[UNDO_FILE] = receipt.undo.sha256
    for name, digest in recorded.items():
        path = inside(name)
        if path is None:
            continue
        if not path.is_file():
            add("missing-file", name, "the receipt lists it, but it is missing.")
        elif (found := file_sha256(path)) != digest:
            add("file-digest", name, f"its SHA-256 is {found}, the receipt records {digest}.")
    listed = {*receipt.files, *recorded, RECEIPT_FILE, checkpoint.index_file}
    for name in side_file_names(merged):
        if name not in listed and name.rstrip("/") not in NOT_COVERED:
            add("extra-file", name, "the receipt does not list it: it was added after the merge.")
    own = None if checkpoint.config is None else config_digest(checkpoint.config)
    if own != receipt.config_digest:
        add("config-digest", "config.json", f"it is {own}, the receipt records {receipt.config_digest}.")
