"""Takes a merge back: the base, bit for bit, from the merged model, its undo file and the adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapterhub_tools.errors import IntegrityError
from adapterhub_tools.model.plan import ByteRange, OutputFile
from adapterhub_tools.model.protocols import OpenSource, Progress, SilentProgress
from adapterhub_tools.model.receipt import Receipt
from adapterhub_tools.model.undo import COPY, MERGED, NEGATED_SUM, SCALED, UNDO_FILE, ZERO
from adapterhub_tools.ops.adapter_reader import OpenedAdapter
from adapterhub_tools.ops.device import device_of
from adapterhub_tools.ops.option_checks import check_output
from adapterhub_tools.ops.receipt_file import load_receipt
from adapterhub_tools.ops.undo_file import OpenedUndo, open_undo
from adapterhub_tools.ops.unmerge_order import last_merge, match_adapters
from adapterhub_tools.ops.unmerge_report import UnmergeOptions, UnmergeReport
from adapterhub_tools.ops.unmerge_terms import contradiction, terms_of
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.destination import check_space
from adapterhub_tools.store.digest import root_digest, split_digest
from adapterhub_tools.store.directory import StagedDirectory, stage
from adapterhub_tools.store.files import LocalFile, resolve_inside
from adapterhub_tools.store.header import SafetensorsHeader, read_header


def unmerge(
    merged: Path,
    adapters: Sequence[Path],
    out: Path | None,
    options: UnmergeOptions,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Writes the base that a merged model was made from.

    W = P ⊕ d with the prediction P = round(W' − Δ), the same on every machine, and the difference d that the
    undo file holds. The digest of all that was written is compared with the base's before the output appears.

    Args:
        merged: a folder that ``merge --undo`` wrote.
        adapters: the adapters of that merge, in any order.
        out: the folder to make; None only with ``dry_run``.
        options: see UnmergeOptions.
        progress: told the bytes written.

    Raises:
        FormatError: there is no receipt or undo file, or a file is broken.
        MismatchError: an adapter of the merge is not given, or one that was not part of it is.
        IntegrityError: the merged model or the undo file is not the one that the receipt records.
        StoreError: the output cannot be written; nothing is at ``out`` that was not there before.
        DeviceError: the device is not here.
    """
    device = device_of(options.device)
    inputs = [merged, *adapters]
    check_output(out, inputs, replace=options.replace, dry_run=options.dry_run)
    receipt = load_receipt(merged)
    last = last_merge(receipt)
    opened = match_adapters(receipt, adapters)
    if options.approximate:
        from adapterhub_tools.ops.unmerge_approximate import approximate

        return approximate(merged, opened, out, receipt, last, options, progress)
    checkpoint = open_checkpoint(merged)
    with open_undo(merged, receipt) as undo:
        headers = {file: _base_header(undo, file, blob) for file, blob in undo.undo.headers.items()}
        files = tuple(
            OutputFile(name=file, header=raw, length=header.length) for file, (raw, header) in headers.items()
        )
        items = _restores(undo, receipt, checkpoint, opened, {f: h for f, (_, h) in headers.items()})
        notes = tuple(f"does not come back: {name}" for name in undo.undo.left)
        nbytes = sum(file.length for file in files)
        changed = sum(tensor.predictor != COPY for tensor in undo.undo.tensors.values())
        digest = None
        if out is not None and not options.dry_run:
            check_space(out.absolute().parent, nbytes)
            with stage(
                out, inputs=inputs, replace=options.replace, allow_replace_gap=options.allow_replace_gap
            ) as staged:
                digest = _write(
                    staged, undo, receipt, checkpoint, opened, items, files, options, device, progress
                )
                staged.commit(None)
            notes += tuple(f"could not be removed: {name}" for name in staged.left)
    return UnmergeReport(
        out=None if out is None else str(out),
        dry_run=digest is None,
        exact=True,
        restored=changed,
        tensors=len(undo.undo.tensors),
        nbytes=nbytes,
        digest=digest,
        notes=notes,
    )


def _base_header(undo: OpenedUndo, file: str, blob: str) -> tuple[bytes, SafetensorsHeader]:
    raw = b"".join(undo.unpack(blob))
    header = read_header(_Bytes(raw, file))
    return raw, header


class _Bytes:
    """The bytes before the data of a file, as a Source of the whole file's length."""

    def __init__(self, data: bytes, name: str) -> None:
        import json

        self.name = name
        self._data = data
        self.length = len(data)
        try:
            entries = json.loads(data[8:])
            ends = [item["data_offsets"][1] for key, item in entries.items() if key != "__metadata__"]
            self.length += max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            pass  # read_header says what is wrong

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


def _restores(
    undo: OpenedUndo,
    receipt: Receipt,
    checkpoint: Checkpoint,
    adapters: Sequence[OpenedAdapter],
    headers: dict[str, SafetensorsHeader],
) -> list[Any]:
    from adapterhub_tools.engine.undo_step import Restore

    digests = {tensor.name: bytes.fromhex(tensor.digest) for tensor in receipt.tensors}
    listed = {name for header in headers.values() for name in header.tensors}
    if listed != set(undo.undo.tensors):
        raise contradiction("its headers and its tensors have different names")
    items = []
    for file, header in headers.items():
        for name, spec in header.tensors.items():
            tensor = undo.undo.tensors[name]
            merged = None
            if tensor.predictor != ZERO:
                stored = checkpoint.tensors.get(name)
                if stored is None or name not in digests:
                    raise IntegrityError.of(
                        "merged-tensor",
                        "the merged model does not have it any more.",
                        loc=name,
                        remedy="The merged model was changed after the merge: get it again.",
                    )
                if stored.spec.shape != spec.shape or (
                    tensor.predictor == COPY and stored.spec.dtype != spec.dtype
                ):
                    raise contradiction(f"{name} has another shape or dtype in the merged model")
                merged = ByteRange(uri=checkpoint.uri(stored.file), offset=stored.offset, spec=stored.spec)
            items.append(
                Restore(
                    predictor=tensor.predictor,
                    base=spec,
                    file=file,
                    offset=header.offsets[name],
                    merged=merged,
                    digest=None if merged is None else digests[name],
                    records=None if tensor.blob is None else undo.blob(tensor.blob),
                    terms=terms_of(tensor, spec, merged, adapters),
                    gains=None if tensor.gains is None else b"".join(undo.unpack(tensor.gains)),
                )
            )
            if tensor.predictor == SCALED and (len(tensor.terms) != 1 or tensor.gains is None):
                raise contradiction(f"{name} has no gains, or not one term")
            if tensor.predictor in (NEGATED_SUM, SCALED, MERGED) and spec.dtype not in (
                "F64",
                "F32",
                "BF16",
                "F16",
            ):
                raise contradiction(f"{name} is of a dtype that nothing predicts")
    return items


def _write(
    staged: StagedDirectory,
    undo: OpenedUndo,
    receipt: Receipt,
    checkpoint: Checkpoint,
    adapters: Sequence[OpenedAdapter],
    items: Sequence[Any],
    files: Sequence[OutputFile],
    options: UnmergeOptions,
    device: str,
    progress: Progress | None,
) -> str:
    from adapterhub_tools.engine.restore_run import restore_all
    from adapterhub_tools.engine.run import default_threads

    algorithm, _ = split_digest(undo.undo.base_digest, file=UNDO_FILE, loc="/base/digest")
    try:
        digests = restore_all(
            items,
            files,
            folder=staged.path,
            sources=_sources(undo, checkpoint, adapters),
            algorithm=algorithm,
            threads=options.threads or default_threads(),
            device=device,
            progress=progress or SilentProgress(),
        )
    except OSError as error:
        raise staged.error(error, "write the weights", "") from error
    for file in files:
        staged.mark_synced(file.name)
    digest = root_digest(algorithm, digests)
    if digest != undo.undo.base_digest or receipt.base.digest not in (None, digest):
        raise IntegrityError.of(
            "base",
            f"what was restored is {digest}, but the base was {receipt.base.digest}.",
            file=UNDO_FILE,
            remedy="The merged model, the adapter or the undo file was changed: get them again.",
        )
    for name, blob in undo.undo.files.items():
        if blob is None:
            _copy_side_file(staged, checkpoint.root, name, receipt)
        else:
            _unpack_file(staged, undo, name, blob)
    return digest


def _sources(
    undo: OpenedUndo, checkpoint: Checkpoint, adapters: Sequence[OpenedAdapter]
) -> dict[str, Callable[[], OpenSource]]:
    def opener(path: Path, name: str, expect: Any) -> Callable[[], OpenSource]:
        return lambda: LocalFile(path, name=name, expect=expect)

    sources = {
        checkpoint.uri(file): opener(checkpoint.paths[file], file, checkpoint.stamps[file])
        for file in checkpoint.files
    }
    sources[str(undo.source.path)] = opener(undo.source.path, UNDO_FILE, undo.source.stamp)
    for item in adapters:
        if item.files.path is not None:
            name = str(item.files.weights_file)
            sources[str(item.files.path)] = opener(item.files.path, name, item.files.stamp)
    return sources


def _copy_side_file(staged: StagedDirectory, root: Path, name: str, receipt: Receipt) -> None:
    source = resolve_inside(root, name)
    recorded = receipt.side_files.get(name)
    _, found = staged.copy_file(source, name)
    if recorded != found:
        raise IntegrityError.of(
            "side-file",
            f"its SHA-256 is {found}, but the receipt records {recorded}.",
            file=name,
            remedy="It was changed after the merge: get the merged folder again.",
        )


def _unpack_file(staged: StagedDirectory, undo: OpenedUndo, name: str, blob: str) -> None:
    import os

    from adapterhub_tools.store.directory import flush, write_all

    descriptor = staged.create(name)
    try:
        for piece in undo.unpack(blob):
            write_all(descriptor, piece)
        flush(descriptor)
    except OSError as error:
        raise staged.error(error, "write it", name) from error
    finally:
        os.close(descriptor)
    staged.mark_synced(name)
