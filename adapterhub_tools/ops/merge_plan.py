"""From adapters that fit a base to a plan: what each output tensor is made of, and where it goes.

Everything that can be known without the tensors' data is decided and checked here, before anything is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from adapterhub_tools.errors import MismatchError, Problem, UnsupportedError
from adapterhub_tools.model.plan import ByteRange, OutputFile, Placement, Plan, RowPatch, Step, Term
from adapterhub_tools.model.protocols import OpenSource
from adapterhub_tools.model.tensor import DTYPE_NAMES, FLOAT_DTYPES, TensorSpec
from adapterhub_tools.ops.combine_plan import combined_steps
from adapterhub_tools.ops.fit import is_embedding, is_head_bias
from adapterhub_tools.ops.joint_changes import check_joint
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_parts import Change, Part
from adapterhub_tools.ops.module_kinds import bias_factors, is_additive
from adapterhub_tools.ops.tied import Tie
from adapterhub_tools.ops.tied_plan import Ties, equal_bytes, settle_ties
from adapterhub_tools.store.checkpoint import Checkpoint
from adapterhub_tools.store.layout import build_file

_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """A plan and what the merge needs around it.

    Attributes:
        plan: the steps.
        sources: uri -> how to open it.
        ties: what became of tied embeddings.
        rows: the number of rows of a resized vocabulary, or None.
        added: tensors that the base does not have.
        targets: the base tensors that are changed.
    """

    plan: Plan
    sources: dict[str, Callable[[], OpenSource]]
    ties: Ties
    rows: int | None
    added: tuple[str, ...]
    targets: tuple[str, ...]


def plan_merge(
    checkpoint: Checkpoint,
    parts: Sequence[Part],
    options: MergeOptions,
    peak: Callable[[tuple[Step, ...]], int],
) -> MergePlan:
    """Plans a merge.

    Args:
        checkpoint: the base.
        parts: the adapters, each fitted without problems.
        options: what was asked.
        peak: steps -> bytes of memory for their buffers.

    Raises:
        MismatchError: two adapters replace one tensor differently, or the vocabulary grows on one side only.
        UnsupportedError: tied embeddings of a sort that cannot be untied; or two adapters on one tensor of
            which one does not simply add to it.
    """
    changes: dict[str, Change] = {}
    problems: list[Problem] = []
    by_uri = {part.uri: part for part in parts}
    for part in parts:
        _add_terms(part, changes)
        _add_full(part, changes, problems, by_uri)
    if problems:
        raise MismatchError(*problems)
    if options.combination is None:
        _refuse_mixtures(changes)
    check_joint(checkpoint, parts, changes)
    base_range = checkpoint.range_of
    ties = settle_ties(parts, changes, base_range, checkpoint)
    rows = _grown_rows(checkpoint, parts, changes, ties)
    tie = parts[0].fit.tie if parts else None
    steps, files = _lay_out(checkpoint, changes, options, base_range, tie)
    steps = combined_steps(steps, parts, options.combination)
    read = {step.base_name for step in steps if step.base_name is not None}
    targets = sorted({n for part in parts for n in part.fit.target_names if n in checkpoint.tensors})
    stored = checkpoint.on_disk
    targets = list(checkpoint.stored_names(targets))
    wanted = {"full": list(stored.tensors), "targets": targets, "off": []}[options.check_base]
    sources: dict[str, Callable[[], OpenSource]] = {part.uri: part.open for part in parts}
    for shown in (checkpoint, stored):
        for file in shown.files:
            sources[shown.uri(file)] = _opener(shown, file)
    return MergePlan(
        plan=Plan(
            steps=steps,
            files=files,
            peak_bytes=peak(steps),
            digest_only=tuple(stored.range_of(name) for name in wanted if name not in read),
        ),
        sources=sources,
        ties=ties,
        rows=rows,
        added=tuple(name for name in changes if name not in checkpoint.tensors),
        targets=tuple(targets),
    )


def changes_of(part: Part) -> dict[str, Change]:
    """Returns what one adapter does to each base tensor, apart from ties: its terms, and what it replaces.

    Raises:
        MismatchError: it replaces one tensor twice.
    """
    changes: dict[str, Change] = {}
    problems: list[Problem] = []
    _add_terms(part, changes)
    _add_full(part, changes, problems, {part.uri: part})
    if problems:
        raise MismatchError(*problems)
    return changes


def _opener(checkpoint: Checkpoint, file: str) -> Callable[[], OpenSource]:
    return lambda: checkpoint.open(file)


def _add_terms(part: Part, changes: dict[str, Change]) -> None:
    shared = {role: part.range_of(spec) for role, spec in part.fit.shared.items()}
    for module in part.fit.modules:
        hparams = {**module.hparams, "multiplier": part.scale_of(module.path), "kind": module.kind}
        if part.fit.extent is not None:
            hparams["extent"] = list(part.fit.extent)
        place = part.fit.placements.get(module.path)
        if place is not None:
            own = {role: part.range_of(spec) for role, spec in module.factors.items() if role != "bias"}
            term = Term(
                module=module.path,
                method=module.method,
                hparams=hparams,
                factors={**shared, **own},
                placement=place,
            )
            changes.setdefault(place.base_tensor, Change()).terms.append(term)
        if module.path in part.fit.biases:
            name = part.fit.biases[module.path]
            term = Term(
                module=module.path,
                method=module.method,
                hparams={**hparams, "kind": "bias"},
                factors={role: part.range_of(spec) for role, spec in bias_factors(module).items()},
                placement=Placement(base_tensor=name),
            )
            changes.setdefault(name, Change()).terms.append(term)


def _refuse_mixtures(changes: Mapping[str, Change]) -> None:
    """Refuses two adapters on one tensor unless both add deltas; only those have a sum."""
    problems = []
    for name, change in changes.items():
        methods = sorted({term.method for term in change.terms if not is_additive(term.method)})
        if methods and len(change.terms) > 1:
            problems.append(
                Problem(
                    kind="not-additive",
                    loc=name,
                    message=f"{len(change.terms)} adapters change this tensor, and what {', '.join(methods)} "
                    "makes of it depends on the weight that it meets, so the order would decide.",
                    remedy="Merge one after the other: the output of one merge is the base of the next.",
                )
            )
    if problems:
        raise UnsupportedError(*problems[:_SHOWN])


def _add_full(
    part: Part, changes: dict[str, Change], problems: list[Problem], parts: Mapping[str, Part]
) -> None:
    for item in part.fit.full:
        change = changes.setdefault(item.base_tensor, Change())
        source = part.range_of(item.full.tensor)
        if item.full.rows is not None:
            taken = change.patch is not None
            change.patch = RowPatch(rows=item.full.rows, source=source)
        else:
            # PEFT saves an untouched embedding with each adapter that targets it: equal ones are one.
            taken = change.start is not None and not equal_bytes(change.start, source, parts)
            change.start = source
        if taken:
            problems.append(
                Problem(
                    kind="replaced-twice",
                    file=part.label,
                    loc=item.base_tensor,
                    message="two of the adapters replace this tensor; only deltas can be added.",
                    remedy="Merge one of them alone.",
                )
            )


def _grown_rows(
    checkpoint: Checkpoint, parts: Sequence[Part], changes: dict[str, Change], ties: Ties
) -> int | None:
    """Returns the rows of a resized vocabulary; its input and output sides must agree."""
    grown = {i.base_tensor: i.full.tensor.shape[0] for part in parts for i in part.fit.full if i.grown}
    tie = parts[0].fit.tie if parts else None
    source_of = (lambda name: name) if tie is None else tie.source_of
    for name in ties.names:
        rows = _rows_after(name, checkpoint, changes)
        if rows is not None and rows != checkpoint.tensors[source_of(name)].spec.shape[0]:
            grown[name] = rows
    if not grown:
        return None
    sizes = set(grown.values())
    before = {checkpoint.tensors[source_of(name)].spec.shape[:1] for name in grown}
    sides = {
        name
        for name, stored in checkpoint.tensors.items()
        if stored.spec.shape[:1] in before and is_embedding(name, tie, checkpoint)
    }
    sides |= set(ties.names)
    sizes |= {rows for name in sides if (rows := _rows_after(name, checkpoint, changes)) is not None}
    if len(sizes) > 1:
        raise MismatchError.of(
            "vocabulary",
            f"the adapter resizes {', '.join(f'{n} to {r} rows' for n, r in grown.items())}, "
            f"but the other side would keep {sorted(sizes - set(grown.values()))}.",
            loc=next(iter(grown)),
            remedy="Save the adapter with both embed_tokens and lm_head in modules_to_save.",
        )
    left = [
        name
        for name, stored in checkpoint.tensors.items()
        if name not in changes and (stored.spec.elements,) in before and is_head_bias(name, checkpoint)
    ]
    if left:
        raise MismatchError.of(
            "vocabulary",
            f"the adapter resizes the vocabulary to {sizes.pop()} rows, but it does not carry "
            f"{', '.join(left)}, which has one value for each token.",
            loc=left[0],
            remedy="Resize the base itself (resize_token_embeddings), save it, and merge into that.",
        )
    return sizes.pop()


def _rows_after(name: str, checkpoint: Checkpoint, changes: dict[str, Change]) -> int | None:
    change = changes.get(name)
    if change is not None and change.start is not None:
        return change.start.spec.shape[0]
    return checkpoint.tensors[name].spec.shape[0] if name in checkpoint.tensors else None


def _lay_out(
    checkpoint: Checkpoint,
    changes: dict[str, Change],
    options: MergeOptions,
    base_range: Callable[[str], ByteRange],
    tie: Tie | None,
) -> tuple[tuple[Step, ...], tuple[OutputFile, ...]]:
    """Keeps each tensor in its shard and order; what the base does not have ends the last shard.

    A tensor that was tied has the dtype of the one that held its values.
    """
    wanted = None if options.dtype is None else DTYPE_NAMES[options.dtype]
    steps: list[Step] = []
    files: list[OutputFile] = []
    for file in checkpoint.files:
        names = [name for name, stored in checkpoint.tensors.items() if stored.file == file]
        if file == checkpoint.files[-1]:
            names += [name for name in changes if name not in checkpoint.tensors]
        drafts = [
            _draft(name, changes.get(name), checkpoint, base_range, wanted, file, tie) for name in names
        ]
        header, offsets = build_file([draft.output for draft in drafts], {"format": "pt"})
        placed = sorted(
            (_place(draft, offsets[draft.output.name]) for draft in drafts), key=lambda s: s.offset
        )
        steps.extend(placed)
        length = max((s.offset + s.output.nbytes for s in placed), default=len(header))
        files.append(OutputFile(name=file, header=header, length=length))
    return tuple(steps), tuple(files)


def _place(step: Step, offset: int) -> Step:
    return Step(
        action=step.action,
        start=step.start,
        output=step.output,
        file=step.file,
        offset=offset,
        terms=step.terms,
        patch=step.patch,
        base_name=step.base_name,
    )


def _draft(
    name: str,
    change: Change | None,
    checkpoint: Checkpoint,
    base_range: Callable[[str], ByteRange],
    wanted: str | None,
    file: str,
    tie: Tie | None,
) -> Step:
    start = change.start if change is not None and change.start is not None else base_range(name)
    of_base = name in checkpoint.tensors and start == base_range(name)
    held = checkpoint.tensors.get(name if tie is None else tie.source_of(name))
    own = start.spec.dtype if held is None else held.spec.dtype
    dtype = wanted if wanted is not None and own in FLOAT_DTYPES else own
    output = TensorSpec(name=name, dtype=dtype, shape=start.spec.shape)
    if change is not None and (change.terms or change.patch is not None):
        action = "merge"
    elif not of_base and change is not None:
        action = "replace"
    elif dtype != start.spec.dtype:
        action = "cast"
    else:
        action = "copy"
    if start.spec.dtype not in FLOAT_DTYPES and action != "copy":
        if start.spec.dtype != dtype or action == "merge":
            raise MismatchError.of(
                "dtype",
                f"it would be written as {dtype}, but its values are {start.spec.dtype}.",
                loc=start.spec.name,
                remedy="Only floating-point tensors can be computed with.",
            )
        action = "copy"
    return Step(
        action=action,
        start=start,
        output=output,
        file=file,
        offset=0,
        terms=tuple(change.terms) if change is not None else (),
        patch=None if change is None else change.patch,
        base_name=name if of_base and not checkpoint.is_made(name) else None,
    )
