"""Merges adapters into a base: opens, fits, plans, runs, and leaves a receipt.

Everything structural is refused before the first byte is written; what only the data can show (another
base, NaN, overflow) ends the run while the output is still invisible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_tools import registry
from adapterhub_tools.errors import (
    FormatError,
    MismatchError,
    Problem,
    UnsupportedError,
    raise_for,
)
from adapterhub_tools.model.canonical import canonical_json
from adapterhub_tools.model.protocols import Progress, SilentProgress
from adapterhub_tools.model.receipt import RECEIPT_FILE, Receipt, ReceiptAdapter, ReceiptTensor
from adapterhub_tools.model.version import VERSION
from adapterhub_tools.ops.adapter_reader import OpenedAdapter, examine_adapter
from adapterhub_tools.ops.fit import fit
from adapterhub_tools.ops.merge_base_check import (
    check_records,
    checked_digest,
    compare_base,
    recorded_algorithm,
)
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_outputs import SideOutputs, index_text, side_outputs
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.merge_plan import MergePlan, plan_merge
from adapterhub_tools.ops.merge_replay import compare_replay, replayed
from adapterhub_tools.ops.module_kinds import guarantee_of
from adapterhub_tools.ops.random_tensors import checked_random_digest
from adapterhub_tools.ops.undo_plan import plan_undo
from adapterhub_tools.ops.undo_record import UndoRecording, recording
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.destination import check_destination, check_space
from adapterhub_tools.store.digest import root_digest
from adapterhub_tools.store.directory import StagedDirectory, stage


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did, or with ``dry_run`` would do.

    Attributes:
        out: the output folder; None in a dry run without one.
        dry_run: True if nothing was written.
        changed: how many target tensors have other bytes now, by their digests; in a dry run, and with
            ``check_base="off"``, how many are computed.
        expected: how many the adapters target.
        modules: how many target modules the adapters have.
        tensors: how many tensors the output has.
        nbytes: bytes of the weight files.
        peak_bytes: the planned memory for buffers and factors, start-up excluded.
        digest: the content digest of the output; None in a dry run.
        base_digest: that of the base, where it was computed.
        resolved: how many values were decided by exact arithmetic.
        notes: what was decided by rule, and what was left behind.
        receipt: the receipt; None in a dry run.
        undo_bytes: the size of the undo file; None without one.
    """

    out: str | None
    dry_run: bool
    changed: int
    expected: int
    modules: int
    tensors: int
    nbytes: int
    peak_bytes: int
    digest: str | None
    base_digest: str | None
    resolved: int
    notes: tuple[str, ...]
    receipt: Receipt | None
    undo_bytes: int | None = None

    @property
    def summary(self) -> str:
        """One line that proves what was done."""
        what = f"{self.changed} of {self.expected} target tensors changed, {self.nbytes:,} bytes"
        if self.dry_run:
            return (
                f"dry run: {what} would be written; {self.peak_bytes:,} bytes of buffers; nothing was written"
            )
        return f"merged: {what}, {self.digest}, {self.out}"

    def to_json(self) -> dict[str, Any]:
        """Returns the report without the receipt, which is a file of its own."""
        data = {name: getattr(self, name) for name in self.__slots__ if name != "receipt"}
        return {"schema_version": "1.0", "operation": "merge", **data, "notes": list(self.notes)}


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
    """
    options.check_values()
    if not adapters:
        raise MismatchError.of("no-adapter", "no adapter was given.", remedy="Give at least one.")
    inputs = [base.root if isinstance(base, Checkpoint) else base, *adapters]
    if out is not None:
        check_destination(out, inputs=inputs, replace=options.replace)
    elif not options.dry_run:
        raise ValueError("out may be None only in a dry run")
    opened = [_open_mergeable(path, options) for path in adapters]
    options, wanted = replayed(options, adapters, opened)
    scales = options.scale_of_each(len(adapters))
    checkpoint = open_checkpoint(base)
    parts = _fit_all(opened, adapters, scales, checkpoint)
    check_records(parts, checkpoint, options)
    algorithm = recorded_algorithm(opened)
    device = _device(options.device)

    from adapterhub_tools.engine.run import buffer_bytes, default_threads

    # A base that comes over a network is read from front to back; the bytes are the same.
    threads = 1 if checkpoint.is_remote else options.threads or default_threads()
    planned = plan_merge(checkpoint, parts, options, lambda steps: buffer_bytes(steps, threads))
    side = side_outputs(checkpoint, planned, parts, options)
    notes = _notes(parts, planned, side)
    digests = [checked_digest(part) for part in parts]
    undo = plan_undo(checkpoint, planned, side, parts, options)
    if out is not None:
        kept = 0 if undo is None else undo.nbytes
        check_space(out.absolute().parent, planned.plan.written_bytes + side.nbytes + kept)
    if options.dry_run or out is None:
        return _report(out, planned, parts, notes, receipt=None, resolved=0)
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
            checkpoint,
            options,
            algorithm,
            device,
            threads,
            progress,
        )
        compare_replay(receipt, wanted)
        staged.commit((RECEIPT_FILE, canonical_json(receipt.to_json()).encode("utf-8")))
    left = tuple(f"could not be removed: {name}" for name in staged.left)
    return _report(out, planned, parts, notes + left, receipt=receipt, resolved=resolved, same=kept_values)


def _open_mergeable(path: Path, options: MergeOptions) -> OpenedAdapter:
    opened = examine_adapter(path)
    if opened.files.pickles and opened.files.header is None:
        raise UnsupportedError.of(
            "pickle",
            "its weights are a pickle, which can run code when it is read.",
            file=opened.files.pickles[0],
            remedy="Load it with PEFT in a place you trust and save it again; that writes safetensors.",
        )
    if opened.adapter.blockers:
        raise UnsupportedError(
            *(
                Problem(kind=kind, file=str(path), message=message, remedy=remedy)
                for kind, message, remedy in opened.adapter.blockers
            )
        )
    problems = opened.problems
    if options.accept_embeddings:
        problems = tuple(problem for problem in problems if problem.kind != "saved-embedding")
    raise_for(problems, FormatError)
    methods = {module.method for module in opened.adapter.modules} - set(registry.names("methods"))
    if methods:
        raise UnsupportedError.of(
            "method",
            f"adapters of type {', '.join(sorted(methods))} cannot be merged by this version.",
            file=str(path),
            remedy="Merge it with PEFT's merge_and_unload, or use a later version of adaptertool.",
        )
    if not opened.adapter.modules and not opened.adapter.full:
        raise UnsupportedError.of(
            "empty",
            "the adapter changes no weight.",
            file=str(path),
            remedy="Save it again; the file holds no tensors that belong to a module.",
        )
    return opened


def _fit_all(
    opened: Sequence[OpenedAdapter], paths: Sequence[Path], scales: Sequence[float], checkpoint: Checkpoint
) -> list[Part]:
    parts = []
    for item, path, scale in zip(opened, paths, scales, strict=True):
        fitted = fit(item.adapter, checkpoint)
        fitted.raise_for_problems()
        parts.append(Part(opened=item, fit=fitted, scale=scale, label=path.name or str(path)))
    return parts


def _device(asked: str) -> str:
    if asked != "cuda":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError.of(
            "device",
            "there is no CUDA device here.",
            loc="--device",
            remedy="Use --device cpu; the bytes are the same.",
        )
    return "cuda"


def _write(
    staged: StagedDirectory,
    record: UndoRecording,
    planned: MergePlan,
    side: SideOutputs,
    parts: Sequence[Part],
    digests: Sequence[str],
    notes: tuple[str, ...],
    checkpoint: Checkpoint,
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
    base = compare_base(result.base, planned, parts, checkpoint, options, algorithm)
    side_files = {name: staged.copy_file(source, name)[1] for name, source in side.copied.items()}
    for name, data in side.written.items():
        staged.write_bytes(name, data)
        side_files[name] = _sha256(data)
    if checkpoint.index_file is not None:
        staged.write_bytes(checkpoint.index_file, index_text(checkpoint, planned.plan))
    digest = root_digest(algorithm, result.outputs)
    receipt = Receipt(
        tool_version=VERSION,
        base=base,
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
            **({} if options.approximates is None else {"approximates_base_of": options.approximates}),
        },
        guarantee=guarantee_of(part.opened.adapter.method for part in parts),
        digest=digest,
        config_digest=side.config_digest,
        files={file.name: file.length for file in planned.plan.files},
        side_files=side_files,
        tensors=tuple(
            ReceiptTensor(
                name=step.output.name,
                dtype=step.output.dtype,
                shape=step.output.shape,
                digest=result.outputs[step.output.name].hex(),
                action=step.action,
            )
            for step in planned.plan.steps
        ),
        notes=notes,
        undo=record.write(base, digest, digests),
    )
    same = frozenset(name for name, digest in result.outputs.items() if result.base.get(name) == digest)
    return receipt, result.resolved, same


def _notes(parts: Sequence[Part], planned: MergePlan, side: SideOutputs) -> tuple[str, ...]:
    notes = []
    for part in parts:
        prefix = f"{part.label}: " if len(parts) > 1 else ""
        notes += [f"{prefix}{note}" for note in (*part.opened.adapter.notes, *part.fit.notes)]
        notes += [f"{prefix}{problem}" for problem in part.opened.problems if problem.severity != "error"]
        made = checked_random_digest(part.fit, part.opened.manifest, part.label)
        if made is not None:
            notes.append(f"{prefix}random tensors made again from the seed: {made}")
        if part.scale != 1.0 and part.fit.full:
            notes.append(
                f"{prefix}the scale {part.scale:g} does not apply to the {len(part.fit.full)} full tensors"
            )
    if planned.ties.note:
        notes.append(planned.ties.note)
    if planned.rows is not None:
        notes.append(f"the vocabulary has {planned.rows} rows now, and the config says so")
    notes += [f"added, the base has no such tensor: {name}" for name in planned.added]
    return tuple(dict.fromkeys((*notes, *side.notes)))


def _report(
    out: Path | None,
    planned: MergePlan,
    parts: Sequence[Part],
    notes: tuple[str, ...],
    *,
    receipt: Receipt | None,
    resolved: int,
    same: frozenset[str] = frozenset(),
) -> MergeReport:
    names = {step.output.name for step in planned.plan.steps if step.action in ("merge", "replace")} - same
    # A head that stays tied to the embedding and is not stored is changed there.
    expected = {
        name if planned.ties.untied else part.fit.stored(name)
        for part in parts
        for name in part.fit.changed_names
    }
    return MergeReport(
        out=None if out is None else str(out),
        dry_run=receipt is None,
        changed=len(names & expected),
        expected=len(expected),
        modules=sum(len(part.fit.modules) for part in parts),
        tensors=len(planned.plan.steps),
        nbytes=planned.plan.written_bytes,
        peak_bytes=planned.plan.peak_bytes,
        digest=None if receipt is None else receipt.digest,
        base_digest=None if receipt is None else receipt.base.digest,
        resolved=resolved,
        notes=notes,
        receipt=receipt,
        undo_bytes=None if receipt is None or receipt.undo is None else receipt.undo.size,
    )


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
