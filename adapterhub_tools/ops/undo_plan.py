"""What a merge keeps so that it can be undone, decided before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterhub_tools.errors import UnsupportedError
from adapterhub_tools.model.plan import ByteRange, Step, Term
from adapterhub_tools.model.receipt import RECEIPT_FILE
from adapterhub_tools.model.undo import (
    COPY,
    MERGED,
    NEGATED_SUM,
    SCALED,
    UNDO_FILE,
    ZERO,
    UndoTensor,
    UndoTerm,
)
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_outputs import SideOutputs
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.merge_plan import MergePlan
from adapterhub_tools.store.checkpoint import Checkpoint
from adapterhub_tools.store.files import resolve_inside
from adapterhub_tools.store.side_files import classify, side_file_names

_SHARE = 0.04
"""Of a predicted tensor's bytes, what its records may need; only for the check of the space on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoPlan:
    """What is kept.

    Attributes:
        headers: weight file of the base -> blob.
        tensors: base tensor -> how it will come back.
        bases: base tensor -> its bytes, for those that are not copied.
        files: other file of the base -> blob, or None where the merged model has it unchanged.
        left: files of the base that do not go along.
        nbytes: about how large the undo file will be.
    """

    headers: dict[str, str]
    tensors: dict[str, UndoTensor]
    bases: dict[str, ByteRange]
    files: dict[str, str | None]
    left: tuple[str, ...]
    nbytes: int


def plan_undo(
    checkpoint: Checkpoint,
    planned: MergePlan,
    side: SideOutputs,
    parts: Sequence[Part],
    options: MergeOptions,
) -> UndoPlan | None:
    """Returns what ``--undo`` keeps; None if it was not asked for.

    Raises:
        UnsupportedError: the base's digest is not computed, so that nothing could check the way back; or the
            base has a file of the name that the undo file has.
    """
    if not options.undo:
        return None
    if options.check_base != "full":
        raise UnsupportedError.of(
            "undo-unchecked",
            f"with --check-base {options.check_base} the digest of the base is not computed, so that nothing "
            "could check that it came back.",
            loc="--undo",
            remedy="Leave --check-base out (full), or leave --undo out.",
        )
    numbers = iter(range(3 * (len(checkpoint.tensors) + len(checkpoint.files)) + 10_000))
    headers = {file: str(next(numbers)) for file in checkpoint.files}
    steps = {step.output.name: step for step in planned.plan.steps}
    uris = {part.uri: number for number, part in enumerate(parts)}
    tensors: dict[str, UndoTensor] = {}
    bases: dict[str, ByteRange] = {}
    nbytes = 0
    for name, stored in checkpoint.tensors.items():
        step = steps[name]
        predictor = _predictor(step, name)
        if predictor == COPY:
            tensors[name] = UndoTensor(predictor=COPY)
            continue
        predicted = predictor in (NEGATED_SUM, SCALED)
        terms = tuple(_term(term, uris) for term in step.terms) if predicted else ()
        blob, gains = str(next(numbers)), str(next(numbers)) if predictor == SCALED else None
        tensors[name] = UndoTensor(predictor=predictor, blob=blob, terms=terms, gains=gains)
        bases[name] = ByteRange(uri=checkpoint.uri(stored.file), offset=stored.offset, spec=stored.spec)
        nbytes += int(stored.nbytes * (_SHARE if predicted else 1))
    files, left = _files(checkpoint, side, numbers)
    kept = [name for name, blob in files.items() if blob is not None]
    nbytes += sum(resolve_inside(checkpoint.root, name).stat().st_size for name in kept)
    return UndoPlan(
        headers=headers,
        tensors=tensors,
        bases=bases,
        files=files,
        left=left,
        nbytes=nbytes,
    )


def undo_notes(plan: UndoPlan | None) -> tuple[str, ...]:
    """Returns what predicts how many tensors, for the report of a merge, with the names of some."""
    groups: dict[str, list[str]] = {}
    for name, tensor in () if plan is None else plan.tensors.items():
        if tensor.predictor != COPY:
            groups.setdefault(tensor.predictor, []).append(name)
    notes = []
    for predictor, names in sorted(groups.items()):
        shown = ""
        if predictor in (MERGED, ZERO):
            shown = f": {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
        how = "stored as they are" if predictor == ZERO else "predicted"
        notes.append(f"undo: {len(names)} tensors {how} ({predictor}){shown}")
    return tuple(notes)


def _predictor(step: Step, name: str) -> str:
    from adapterhub_tools.engine.undo_keep import predictor_of

    if step.base_name != name:
        return ZERO  # the adapter's tensor stands there now
    if step.action == "copy":
        return COPY
    return predictor_of(step) if step.terms else MERGED


def _term(term: Term, uris: dict[str, int]) -> UndoTerm:
    number = {uris[item.uri] for item in term.factors.values()}
    return UndoTerm(
        module=term.module,
        method=term.method,
        hparams=term.hparams,
        adapter=number.pop(),
        factors={role: item.spec for role, item in term.factors.items()},
        placement=term.placement,
    )


def _files(
    checkpoint: Checkpoint, side: SideOutputs, numbers: object
) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """Returns the base's other files that will come back, and those that will not."""
    root = checkpoint.root
    weights = set(checkpoint.files)
    names = {name for name in classify(root).copy if name not in weights}
    names |= {name for name in (checkpoint.config_file, checkpoint.index_file) if name is not None}
    present = side_file_names(root)
    names |= {name for name in (RECEIPT_FILE, UNDO_FILE) if name in present}
    files: dict[str, str | None] = {}
    for name in sorted(names):
        source = resolve_inside(root, name)
        same = side.copied.get(name) == source
        files[name] = None if same else str(next(numbers))  # type: ignore[call-overload]
    return files, tuple(name for name in present if name not in names | weights)
