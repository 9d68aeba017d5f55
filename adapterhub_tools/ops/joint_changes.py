"""What several adapters do to one tensor must fit together; each was checked against the base alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapterhub_tools.errors import MismatchError, Problem
from adapterhub_tools.ops.merge_parts import Change, Part
from adapterhub_tools.store.checkpoint import Checkpoint

_ONE_ALONE = "Merge one of them, and the other into the result if that is what is meant."


def check_joint(checkpoint: Checkpoint, parts: Sequence[Part], changes: Mapping[str, Change]) -> None:
    """Compares what the adapters change with what the others make of the same tensors.

    Raises:
        MismatchError: a delta or a row is for another number of rows than the tensor will have, or one
            adapter replaces rows that another changes.
    """
    problems = []
    for name, change in changes.items():
        if name in checkpoint.tensors:
            shape = checkpoint.tensors[name].spec.shape
        elif change.start is not None:
            shape = change.start.spec.shape
        else:
            continue
        final = shape if change.start is None else change.start.spec.shape
        starter = None if change.start is None else change.start.uri
        for part in parts:
            problems += _misfits(part, name, final, starter)
        if change.patch is None:
            continue
        if max(change.patch.rows, default=-1) >= final[0]:
            problems.append(
                Problem(
                    kind="rows",
                    loc=name,
                    message=f"row {max(change.patch.rows)} is trained, but it will have {final[0]} rows.",
                    remedy=_ONE_ALONE,
                )
            )
        others = {p.label for p in parts if p.uri != change.patch.source.uri and _changes(p, name)}
        if others:
            problems.append(
                Problem(
                    kind="rows",
                    loc=name,
                    message=f"one adapter replaces rows, and {', '.join(sorted(others))} changes it too.",
                    remedy=_ONE_ALONE,
                )
            )
    if problems:
        raise MismatchError(*problems)


def _misfits(part: Part, name: str, final: tuple[int, ...], starter: str | None) -> list[Problem]:
    """Returns the modules of one adapter whose delta does not fit what another makes of the tensor."""
    if starter is None or starter == part.uri:
        return []
    return [
        Problem(
            kind="shape",
            file=part.label,
            loc=module.path,
            message=f"its delta is for a shape of {list(module.base_shape)}, but another adapter resizes "
            f"{name} to {list(final)}.",
            remedy="Merge the adapter that resizes first; the other may not fit the result.",
        )
        for module in part.fit.modules
        if module.path in part.fit.placements
        and part.fit.placements[module.path].base_tensor == name
        and module.base_shape is not None
        and module.base_shape != final
    ]


def _changes(part: Part, name: str) -> bool:
    return any(place.base_tensor == name for place in part.fit.placements.values()) or any(
        item.base_tensor == name for item in part.fit.full
    )
