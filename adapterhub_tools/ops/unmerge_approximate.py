"""Comes close to the base of a merge without an undo file: subtracts, and says how far off that is.

What rounding the merged weight lost cannot be computed back; how much that is: engine/subtraction_error.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adapterhub_tools import registry
from adapterhub_tools.errors import IntegrityError, LossyError, UnsupportedError
from adapterhub_tools.model.combination import CombinationChoice
from adapterhub_tools.model.protocols import Progress, SilentProgress
from adapterhub_tools.model.receipt import RECEIPT_FILE, EarlierMerge, Receipt
from adapterhub_tools.ops.adapter_reader import OpenedAdapter
from adapterhub_tools.ops.combine_plan import combined_parts
from adapterhub_tools.ops.device import device_of
from adapterhub_tools.ops.merge import merge
from adapterhub_tools.ops.merge_base import settle_base
from adapterhub_tools.ops.merge_inputs import open_mergeable
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_plan import plan_merge
from adapterhub_tools.ops.module_kinds import is_additive
from adapterhub_tools.ops.unmerge_report import UnmergeOptions, UnmergeReport
from adapterhub_tools.store.checkpoint import open_checkpoint
from adapterhub_tools.store.digest import digest_checkpoint, root_digest, split_digest

_REMEDY = "Use the base itself; or merge with --undo next time."
_NARROW = ("bfloat16", "float16")


def approximate(
    merged: Path,
    adapters: Sequence[OpenedAdapter],
    out: Path | None,
    receipt: Receipt,
    last: EarlierMerge,
    options: UnmergeOptions,
    progress: Progress | None,
) -> UnmergeReport:
    """Writes round(W' − Δ), and a receipt that calls it approximate.

    Args:
        merged: the merged folder.
        adapters: those of ``last``, in its order.
        out: the folder to make; None only with ``dry_run``.
        receipt: of the merged folder.
        last: the merge to take off.
        options: see UnmergeOptions.
        progress: told the bytes read.

    Raises:
        LossyError: the merge replaced tensors, or cast them to a narrower dtype: what was there is gone.
        UnsupportedError: one of the methods is not a sum, so that its delta cannot be subtracted; or the
            merge wrote a quantised base.
        IntegrityError: the merged model was changed after the merge.
    """
    _refuse(receipt, last, adapters)
    paths = [item.files.root for item in adapters]
    _check_unchanged(merged, receipt, options)
    asked = MergeOptions(
        scales=tuple(-adapter.scale for adapter in last.adapters),
        replace=options.replace,
        allow_replace_gap=options.allow_replace_gap,
        device=options.device,
        threads=options.threads,
        dry_run=options.dry_run,
        check_base="off",
        accept_embeddings=True,
        onto="original",  # the merged weights as they are, whatever the adapters were trained on
        combination=_negated(last.combination),
        approximates=receipt.digest,
    )
    wrong, largest = _error(merged, paths, asked, progress or SilentProgress())
    report = merge(merged, paths, out, asked, progress)
    return UnmergeReport(
        out=report.out,
        dry_run=report.dry_run,
        exact=False,
        restored=report.changed,
        tensors=report.tensors,
        nbytes=report.nbytes,
        digest=report.digest,
        expected_wrong=wrong,
        largest_error=largest,
        notes=("this is an approximation, not the base", *report.notes),
    )


def _refuse(receipt: Receipt, last: EarlierMerge, adapters: Sequence[OpenedAdapter]) -> None:
    if last.options.get("onto") == "quantized":
        raise UnsupportedError.of(
            "undo-quantised",
            "the merge quantised its weights again, in steps too wide for a difference to be taken back.",
            loc="--approximate",
            remedy="Use the base itself.",
        )
    full = sum(adapter.full for adapter in last.adapters)
    if full:
        raise LossyError.of(
            "replaced",
            f"the merge replaced {full} tensors (or rows of them); what was there before is gone.",
            loc="--approximate",
            remedy=_REMEDY,
        )
    # The base's dtype is not recorded: that nothing was cast shows in tensors that were copied.
    actions = {tensor.action for tensor in receipt.tensors} if last == receipt.own else set()
    if last.options["dtype"] in _NARROW and ("cast" in actions or "copy" not in actions):
        raise LossyError.of(
            "cast",
            f"the merge wrote {last.options['dtype']} weights by --dtype; what the base's had beyond that is "
            "gone.",
            loc="--approximate",
            remedy=_REMEDY,
        )
    methods = {adapter.method for adapter in last.adapters}
    methods |= {module.method for item in adapters for module in item.adapter.modules}
    for method in sorted(methods):
        if not is_additive(method):
            raise UnsupportedError.of(
                "not-additive",
                f"{method} does not add a delta that could be subtracted.",
                loc="--approximate",
                remedy=_REMEDY,
            )


def _check_unchanged(merged: Path, receipt: Receipt, options: UnmergeOptions) -> None:
    algorithm, _ = split_digest(receipt.digest, file=RECEIPT_FILE, loc="/output/digest")
    digests = digest_checkpoint(open_checkpoint(merged), algorithm=algorithm, threads=options.threads or 2)
    found = root_digest(algorithm, digests)
    if found != receipt.digest:
        raise IntegrityError.of(
            "merged",
            f"its weights are {found}, but the receipt records {receipt.digest}.",
            file=str(merged),
            remedy="The merged model was changed after the merge: get it again.",
        )


def _negated(choice: CombinationChoice | None) -> CombinationChoice | None:
    """Returns a combination that subtracts what another added.

    Raises:
        UnsupportedError: it was no sum.
    """
    if choice is None:
        return None
    made = registry.load("combine", choice.method).IMPLEMENTATION
    if not hasattr(made, "coefficients") or getattr(made, "needs_angles", False):
        raise UnsupportedError.of(
            "combined",
            f"the adapters were combined by {choice.method}, which is no sum that could be subtracted.",
            loc="--approximate",
            remedy=_REMEDY,
        )
    weights = {pattern: tuple(-weight for weight in found) for pattern, found in choice.weights.items()}
    return replace(choice, weights=weights)


def _error(
    merged: Path, adapters: Sequence[Path], options: MergeOptions, progress: Progress
) -> tuple[int, float]:
    """Returns how many weights are expected to be wrong, and a bound on the error in units of their ulp."""
    from adapterhub_tools.engine.run import default_threads
    from adapterhub_tools.engine.subtraction_error import subtraction_error

    opened = [open_mergeable(path, options) for path in adapters]
    started = settle_base(open_checkpoint(merged), opened, adapters, options.scales, options)
    parts = combined_parts(started.parts, options.combination)
    planned = plan_merge(started.checkpoint, parts, options, lambda _: 0)
    return subtraction_error(
        planned.plan,
        planned.sources,
        threads=options.threads or default_threads(),
        device=device_of(options.device),
        progress=progress,
    )
