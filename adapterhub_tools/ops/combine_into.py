"""Combines adapters straight into a base: no rank is lost, and every check and promise of a merge holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import MismatchError, escape
from adapterhub_tools.model.combination import CombinationChoice
from adapterhub_tools.model.plan import Step
from adapterhub_tools.ops.combine_options import implementation
from adapterhub_tools.ops.combine_weights import Weights
from adapterhub_tools.ops.merge import merge
from adapterhub_tools.ops.merge_base import settle_base
from adapterhub_tools.ops.merge_inputs import open_mergeable
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.merge_plan import changes_of
from adapterhub_tools.ops.module_kinds import is_additive
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Progress
    from adapterhub_tools.ops.merge_report import MergeReport


def combine_into(
    base: Path | Checkpoint,
    adapters: Sequence[Path],
    out: Path | None,
    *,
    method: str,
    weights: Weights,
    hparams: Mapping[str, Any] | None = None,
    seed: int = 0,
    allow_disjoint: bool = False,
    options: MergeOptions | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes the base with the combined delta of several adapters.

    W' = round(W + D), D being what the method makes of the adapters' true deltas in float64; the sum is
    rounded once, and not through float64. Methods that add the deltas up are merged from the exact sum. The
    receipt has every adapter with its weight, the method and its hyperparameters.

    Args:
        base: the base's folder or file, or one that is open already.
        adapters: their folders, at least two.
        out: the folder to make; None only with ``options.dry_run``.
        method: a name of the registry ``combine``.
        weights: what each adapter counts.
        hparams: the method's options that were given, by name.
        seed: for methods that draw random numbers.
        allow_disjoint: whether an adapter may share no target tensor with any other.
        options: of the merge, without scales and combination.
        progress: told the bytes read.

    Raises:
        FormatError: a file is broken, or holds NaN or infinities.
        UnsupportedError: an adapter of a sort that cannot be merged, or an unknown method.
        MismatchError: an adapter does not fit the base, they do not belong together, or an option does not
            fit.
        IntegrityError: the base is not the one that an adapter's manifest records.
        LossyError: a result overflows the output's dtype.
        StoreError: the output cannot be written; nothing is at ``out`` that was not there before.
    """
    options = options or MergeOptions()
    if len(adapters) < 2:
        raise MismatchError.of(
            "adapters",
            f"{len(adapters)} adapters were given; a combination needs two or more.",
            remedy="Give at least two. To merge one, use `merge`.",
        )
    if method == "svd":
        raise MismatchError.of(
            "option",
            "svd cuts the sum of the deltas to a rank, and a base has none.",
            loc="--method",
            remedy="Use linear, which is the whole sum; or combine to an adapter first.",
        )
    made = implementation(method, hparams or {}, seed, count=len(adapters))
    _check_weights(made, weights, len(adapters))
    checkpoint = open_checkpoint(base)
    opened = [open_mergeable(path, options) for path in adapters]
    started = settle_base(checkpoint, opened, adapters, (1.0,) * len(adapters), options)
    if not allow_disjoint:
        _refuse_disjoint(started.parts)
    for part in started.parts:
        _refuse_zero(part, started.checkpoint)
    choice = CombinationChoice(method=method, hparams=made.to_json(), weights=weights.patterns)
    return merge(
        checkpoint,
        adapters,
        out,
        replace(options, scales=weights.default, combination=choice),
        progress,
    )


def _check_weights(made: Any, weights: Weights, count: int) -> None:
    every = [weights.default, *weights.patterns.values()]
    if any(len(found) != count for found in every):
        raise MismatchError.of(
            "weights",
            f"there are {min(map(len, every))} weights for {count} adapters.",
            loc="--weights",
            remedy="Give one number for each adapter, in their order.",
        )
    check = getattr(made, "check_weights", None)
    try:
        for found in every if check is not None else []:
            check(found)  # type: ignore[misc]
    except ValueError as error:
        raise MismatchError.of(
            "weights", f"{escape(str(error))}.", loc="--weights", remedy="Give two weights of at least 0."
        ) from error
    if not any(any(found) for found in every):
        raise MismatchError.of(
            "zero-delta",
            "every weight is 0, so nothing would be combined.",
            loc="--weights",
            remedy="Give at least one weight other than 0.",
        )


def _refuse_disjoint(parts: Sequence[Part]) -> None:
    """Refuses an adapter that changes no tensor that another changes.

    Raises:
        MismatchError: there is one.
    """
    targets = [set(part.fit.changed_names) for part in parts]
    for number, (part, own) in enumerate(zip(parts, targets, strict=True)):
        others = set().union(*targets[:number], *targets[number + 1 :])
        if not own & others:
            raise MismatchError.of(
                "no-common-targets",
                f"it shares no target tensor with any other adapter: it changes {_first(own)}; the others "
                f"change {_first(others)}.",
                file=part.label,
                remedy="If they were trained on different modules of the base, give --allow-disjoint.",
            )


def _first(names: set[str]) -> str:
    return f"{escape(min(names))} and {len(names) - 1} more" if names else "none"


def _refuse_zero(part: Part, checkpoint: Checkpoint) -> None:
    """Refuses an adapter whose every delta is exactly zero; the first that is not ends the search.

    Raises:
        MismatchError: it is one.
    """
    from adapterhub_tools.engine.formula import formula

    if part.fit.full:
        return
    with part.open() as source:
        for name, change in changes_of(part).items():
            if not all(is_additive(term.method) for term in change.terms):
                return
            start = change.start or checkpoint.range_of(part.fit.stored(name))
            step = Step(
                action="merge", start=start, output=start.spec, file="", offset=0, terms=tuple(change.terms)
            )
            if not formula(step, lambda _: source).identity:
                return
    raise MismatchError.of(
        "zero-delta",
        "every delta of it is exactly zero, so there is nothing to combine.",
        file=part.label,
        remedy="It was saved before training, or training did not reach it; use a later checkpoint.",
    )
