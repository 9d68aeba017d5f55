"""What a merge tells of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_tools.model.loss import LossReport
from adapterhub_tools.model.receipt import Receipt
from adapterhub_tools.ops.merge_outputs import SideOutputs
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.merge_plan import MergePlan
from adapterhub_tools.ops.random_tensors import checked_random_digest


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
        loss: how much of the change the output's dtype holds; None if it was not measured.
        signed: whether the folder is signed.
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
    loss: LossReport | None = None
    signed: bool = False

    @property
    def summary(self) -> str:
        """One line that proves what was done."""
        what = f"{self.changed} of {self.expected} target tensors changed, {self.nbytes:,} bytes"
        if self.dry_run:
            return (
                f"dry run: {what} would be written; {self.peak_bytes:,} bytes of buffers; nothing was written"
            )
        return f"merged{' and signed' * self.signed}: {what}, {self.digest}, {self.out}"

    def to_json(self) -> dict[str, Any]:
        """Returns the report without the receipt, which is a file of its own."""
        data = {name: getattr(self, name) for name in self.__slots__ if name != "receipt"}
        data |= {"notes": list(self.notes), "loss": None if self.loss is None else self.loss.to_json()}
        return {"schema_version": "1.0", "operation": "merge", **data}


def merge_notes(parts: Sequence[Part], planned: MergePlan, side: SideOutputs) -> tuple[str, ...]:
    """Returns what was decided by rule, and what is left behind."""
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


def report_of(
    out: Path | None,
    planned: MergePlan,
    parts: Sequence[Part],
    notes: tuple[str, ...],
    *,
    receipt: Receipt | None,
    resolved: int,
    same: frozenset[str] = frozenset(),
    loss: LossReport | None = None,
    signed: bool = False,
) -> MergeReport:
    """Returns the report of a merge.

    Args:
        out: the output folder, if one was given.
        planned: the plan.
        parts: the adapters.
        notes: what was decided by rule.
        receipt: what was written; None in a dry run.
        resolved: how many values were decided by exact arithmetic.
        same: the tensors whose digest is the base's.
        loss: how much of the change the output holds, if that was measured.
        signed: whether the folder is signed.
    """
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
        tensors=sum(len(step.written) for step in planned.plan.steps),
        nbytes=planned.plan.written_bytes,
        peak_bytes=planned.plan.peak_bytes,
        digest=None if receipt is None else receipt.digest,
        base_digest=None if receipt is None else receipt.base.digest,
        resolved=resolved,
        notes=notes,
        receipt=receipt,
        undo_bytes=None if receipt is None or receipt.undo is None else receipt.undo.size,
        loss=loss,
        signed=signed,
    )
