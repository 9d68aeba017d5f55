"""Merges adapters into a base: opens, fits, plans, runs, and leaves a receipt.

Everything structural is refused before the first byte is written; what only the data can show (another
base, NaN, overflow) ends the run while the output is still invisible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adapterhub_tools.errors import MismatchError
from adapterhub_tools.model.canonical import canonical_json
from adapterhub_tools.model.protocols import Progress, SilentProgress
from adapterhub_tools.model.receipt import (
    RECEIPT_FILE,
    EarlierMerge,
    Receipt,
    ReceiptAdapter,
    ReceiptTensor,
)
from adapterhub_tools.model.version import VERSION
from adapterhub_tools.ops.combine_plan import combined_parts
from adapterhub_tools.ops.device import device_of
from adapterhub_tools.ops.earlier_merges import earlier_merges, of_these_weights
from adapterhub_tools.ops.merge_base import MergeBase, settle_base
from adapterhub_tools.ops.merge_base_check import (
    check_records,
    compare_base,
    recorded_algorithm,
)
from adapterhub_tools.ops.merge_inputs import open_mergeable
from adapterhub_tools.ops.merge_loss import measured_loss
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_outputs import SideOutputs, index_text, side_outputs
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.merge_plan import MergePlan, plan_merge
from adapterhub_tools.ops.merge_replay import compare_replay, replayed
from adapterhub_tools.ops.merge_report import MergeReport, merge_notes, report_of
from adapterhub_tools.ops.module_kinds import guarantee_of
from adapterhub_tools.ops.option_checks import check_output
from adapterhub_tools.ops.part_digest import checked_digest
from adapterhub_tools.ops.requantised_plan import requantised
from adapterhub_tools.ops.sign import commit_signed
from adapterhub_tools.ops.undo_plan import plan_undo, undo_notes
from adapterhub_tools.ops.undo_record import UndoRecording, recording
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.destination import check_space
from adapterhub_tools.store.digest import root_digest
from adapterhub_tools.store.directory import StagedDirectory, stage
from adapterhub_tools.store.signature import Signer


def merge(
    base: Path | Checkpoint,
    adapters: Sequence[Path],
    out: Path | None,
    options: MergeOptions,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes the base with the adapters merged into it.

    W' = round(W + Σ scale·ΔW), every value correctly rounded once (docs/numerics.md). The memory is that of
    a few buffers and of one module's factors for each thread, whatever the size of the base.

    Args:
        base: the base model's folder, or its single safetensors file, or one that is open already.
        adapters: the adapters' folders, at least one.
        out: the folder to make; None only with ``dry_run``.
        options: see MergeOptions.
        progress: told the bytes read.

    Raises:
        FormatError: a file is not what it claims, or holds NaN or infinities where it is computed with.
        UnsupportedError: an adapter of a sort that cannot be merged; the message says why and what to do.
        MismatchError: an adapter does not fit the base, or two do not fit each other.
        IntegrityError: the base is not the one that an adapter's manifest records, or the result is not that
            of the merge to replay.
        LossyError: a result overflows the output's dtype.
        StoreError: the output cannot be written; nothing is at ``out`` that was not there before.
        DeviceError: the device is not here.
    """
    options.check_values()
    device = device_of(options.device)
    if not adapters:
        raise MismatchError.of("no-adapter", "no adapter was given.", remedy="Give at least one.")
    inputs = [base.root if isinstance(base, Checkpoint) else base, *adapters]
    check_output(out, inputs, replace=options.replace, dry_run=options.dry_run)
    opened = [open_mergeable(path, options) for path in adapters]
    options, wanted = replayed(options, adapters, opened)
    scales = options.scale_of_each(len(adapters))
    started = settle_base(open_checkpoint(base), opened, adapters, scales, options)
    checkpoint = started.checkpoint
    parts = combined_parts(started.parts, options.combination)
    check_records(parts, checkpoint, options)
    algorithm = recorded_algorithm(opened)
    signer = None if options.sign is None else Signer(options.sign)

    from adapterhub_tools.engine.run import buffer_bytes, default_threads

    # A base that comes over a network is read from front to back; the bytes are the same.
    default = default_threads(combining=options.combination is not None)
    threads = 1 if checkpoint.is_remote else options.threads or default
    planned = plan_merge(checkpoint, parts, options, lambda steps: buffer_bytes(steps, threads))
    if started.onto == "quantized":
        planned = requantised(planned, checkpoint.on_disk, started.weights, options)
    side = side_outputs(started, planned, parts, options)
    earlier, told = earlier_merges(checkpoint)
    notes = started.notes + told + merge_notes(parts, planned, side)
    digests = [checked_digest(part) for part in parts]
    undo = plan_undo(checkpoint, planned, side, parts, options)
    if out is not None:
        kept = 0 if undo is None else undo.nbytes
        check_space(out.absolute().parent, planned.plan.written_bytes + side.nbytes + kept)
    loss = measured_loss(
        planned,
        options,
        remote=checkpoint.is_remote,
        quantised=started.onto == "quantized",
        threads=threads,
        device=device,
        progress=progress or SilentProgress(),
    )
    if options.dry_run or out is None:
        return report_of(out, planned, parts, notes, receipt=None, resolved=0, loss=loss)
    with (
        stage(
            out, inputs=inputs, replace=options.replace, allow_replace_gap=options.allow_replace_gap
        ) as staged,
        recording(staged, undo, checkpoint) as record,
    ):
        receipt, resolved, kept_values = _write(
            staged,
            record,
            planned,
            side,
            parts,
            digests,
            notes,
            started,
            earlier,
            options,
            algorithm,
            device,
            threads,
            progress,
        )
        compare_replay(receipt, wanted)
        last = (RECEIPT_FILE, canonical_json(receipt.to_json()).encode("utf-8"))
        commit_signed(staged, last, signer, out.absolute().name)
    left = tuple(f"could not be removed: {name}" for name in staged.left)
    notes += left + undo_notes(undo)
    return report_of(
        out,
        planned,
        parts,
        notes,
        receipt=receipt,
        resolved=resolved,
        same=kept_values,
        loss=loss,
        signed=signer is not None,
    )


def _write(
    staged: StagedDirectory,
    record: UndoRecording,
    planned: MergePlan,
    side: SideOutputs,
    parts: Sequence[Part],
    digests: Sequence[str],
    notes: tuple[str, ...],
    started: MergeBase,
    earlier: tuple[EarlierMerge, ...],
    options: MergeOptions,
    algorithm: str,
    device: str,
    threads: int,
    progress: Progress | None,
) -> tuple[Receipt, int, frozenset[str]]:
    from adapterhub_tools.engine.run import run

    checks = {
        "full": lambda _: True,
        "targets": set(planned.targets).__contains__,
        "off": lambda _: False,
    }
    try:
        result = run(
            planned.plan,
            folder=staged.path,
            sources=planned.sources,
            hash_base=checks[options.check_base],
            algorithm=algorithm,
            threads=threads,
            device=device,
            progress=progress or SilentProgress(),
            undo=record.jobs,
        )
    except OSError as error:
        raise staged.error(error, "write the weights", "") from error
    for file in planned.plan.files:
        staged.mark_synced(file.name)
    checkpoint = started.checkpoint
    base = compare_base(result.base, planned, parts, checkpoint, options, algorithm)
    side_files = {name: staged.copy_file(source, name)[1] for name, source in side.copied.items()}
    for name, data in side.written.items():
        staged.write_bytes(name, data)
        side_files[name] = _sha256(data)
    if checkpoint.index_file is not None:
        staged.write_bytes(checkpoint.index_file, index_text(checkpoint, planned.plan))
    digest = root_digest(algorithm, result.outputs)
    guarantee = guarantee_of(part.opened.adapter.method for part in parts)
    if any(step.combination is not None for step in planned.plan.steps):
        guarantee = "tolerance"
    receipt = Receipt(
        tool_version=VERSION,
        base=replace(base, earlier=of_these_weights(earlier, base.digest)),
        adapters=tuple(
            ReceiptAdapter(
                digest=digest,
                method=part.opened.adapter.method,
                scale=part.scale,
                targets=len(part.fit.modules),
                full=len(part.fit.full),
                guarantee=guarantee_of((part.opened.adapter.method,)),
            )
            for part, digest in zip(parts, digests, strict=True)
        ),
        options={
            "dtype": options.dtype,
            "accept_embeddings": options.accept_embeddings,
            "adapter_tokenizer": options.adapter_tokenizer,
            **started.receipt_options,
            **({} if options.approximates is None else {"approximates_base_of": options.approximates}),
            **({} if options.combination is None else {"combination": options.combination.to_json()}),
        },
        guarantee=guarantee,
        digest=digest,
        config_digest=side.config_digest,
        files={file.name: file.length for file in planned.plan.files},
        side_files=side_files,
        tensors=tuple(
            ReceiptTensor(
                name=spec.name,
                dtype=spec.dtype,
                shape=spec.shape,
                digest=result.outputs[spec.name].hex(),
                action=step.action,
            )
            for step in planned.plan.steps
            for spec, _ in step.written
        ),
        notes=notes,
        undo=record.write(base, digest, digests),
    )
    same = frozenset(
        step.output.name
        for step in planned.plan.steps
        if all(result.base.get(spec.name) == result.outputs[spec.name] for spec, _ in step.written)
    )
    return receipt, result.resolved, same


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
