"""Combining adapters, in the Python face."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from adapterhub_tools.api.low_rank import policy_choices
from adapterhub_tools.api.paths import Reference, optional_path

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Progress
    from adapterhub_tools.ops.combine_report import CombineReport
    from adapterhub_tools.ops.merge_report import MergeReport


def combine_adapters(
    adapters: Sequence[Reference],
    *,
    out: Reference | None,
    weights: str | Sequence[str | float],
    method: str = "linear",
    density: float | None = None,
    gamma: float | None = None,
    epsilon: float | None = None,
    majority_sign: str | None = None,
    seed: int = 0,
    rank: int | str | Sequence[int | str] | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    budget: str | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    sv_fro: float | None = None,
    base: Reference | None = None,
    into: Reference | None = None,
    undo: bool = False,
    space: str = "deltas",
    full: str = "delta",
    allow_disjoint: bool = False,
    dtype: str | None = None,
    replace: bool = False,
    allow_replace_gap: bool = False,
    threads: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CombineReport | MergeReport:
    """Combines adapters into one that does what they do together.

    Deltas are combined, not factors, and each as it acts: scales, rsLoRA, patterns, different ranks and
    targets, and what DoRA and other methods do to their base. docs/combine.md has the formula and the source
    of every method, and how much memory it takes.

    Args:
        adapters: the adapters' folders or ``.safetensors`` files, at least two.
        out: the folder to write; None only with ``dry_run``.
        weights: one number for each adapter, in their order; a negative one subtracts. Or texts as on the
            command line: ``"0.7,0.3"``, and ``"PATTERN=1,0"`` for modules whose path ends in a pattern.
        method: ``"linear"``, ``"cat"``, ``"svd"``, ``"slerp"``, ``"ties"``, ``"dare_linear"``,
            ``"dare_ties"``, ``"magnitude_prune"``, ``"della"`` or ``"breadcrumbs"``; for ``space="factors"``
            one of PEFT's combination types.
        density: the share of each delta's values that a method keeps.
        gamma: the share of largest values that breadcrumbs leaves out.
        epsilon: how much the share that della keeps varies with the size of a value.
        majority_sign: ``"total"`` or ``"frequency"``: how methods with an election of signs count.
        seed: of random masks and sketches.
        rank: one rank for all modules, ``"PATTERN=RANK"`` for those whose path ends in a pattern, or several.
        energy: the share of the squared singular values that each module keeps.
        max_error: the relative error that each module may have, in the Frobenius norm.
        budget: the size of the whole adapter, ``"2M"`` parameters or ``"8MiB"``; or ``"50%"`` of the factors
            of all inputs.
        sv_ratio: singular values above the largest over this are kept.
        sv_cumulative: the share of the sum of singular values that each module keeps.
        sv_fro: the share of the Frobenius norm that each module keeps.
        base: the base, where what an adapter does depends on it.
        into: a base: the result is this base with the combined deltas, rounded once, and not an adapter; no
            rank is lost.
        undo: with ``into``, whether to write also what brings the base back, bit for bit; see ``unmerge``.
        space: ``"deltas"``, or ``"factors"`` to repeat PEFT's ``add_weighted_adapter``, for comparison.
        full: what becomes of tensors that are carried in full: ``"delta"``, ``"average"`` or ``"drop"``.
        allow_disjoint: whether an adapter may share no target module with any other.
        dtype: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"`` for the factors; None takes the
            widest of the inputs. With ``into`` for the base, of which None keeps its own.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.
        threads: the number of workers; None chooses.
        dry_run: whether to compute and report without writing.
        progress: told how far it is.

    Returns:
        What was done: a CombineReport; with ``into`` the MergeReport of what was written.

    Raises:
        FormatError: an adapter is broken, or holds NaN or infinities.
        UnsupportedError: an adapter that cannot be combined, or no such method.
        MismatchError: adapters that do not belong together, nothing left of them, or options that do not fit.
        IntegrityError: an adapter differs from its manifest, or the base from what a manifest records.
        LossyError: a value overflows the dtype of the factors.
        StoreError: could not read or write; the destination is untouched.
        ValueError: a value that an option does not have, or no ``out`` without ``dry_run``.

    Example:
        >>> at.combine_adapters(["style", "facts"], out="both", weights=[0.7, 0.3])
        >>> at.combine_adapters(["a", "b"], out="merged", weights=[1, 1], method="ties", into="base")
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import combine as op
    from adapterhub_tools.ops.combine_options import CombineOptions, refuse_with_into
    from adapterhub_tools.ops.combine_weights import Weights
    from adapterhub_tools.ops.rank_policy import RankPolicy

    choices = policy_choices(
        rank=rank,
        energy=energy,
        max_error=max_error,
        budget=budget,
        sv_ratio=sv_ratio,
        sv_cumulative=sv_cumulative,
        sv_fro=sv_fro,
    )
    asked = any(value is not None for value in choices.values())
    hparams = {"density": density, "gamma": gamma, "epsilon": epsilon, "majority_sign": majority_sign}
    given = {name: value for name, value in hparams.items() if value is not None}
    counts = Weights.parse(_entries(weights), len(adapters))
    if into is not None:
        from adapterhub_tools.ops.combine_into import combine_into
        from adapterhub_tools.ops.merge_options import MergeOptions

        refuse_with_into(policy=asked, base=base is not None, space=space != "deltas", full=full != "delta")
        merging = MergeOptions(
            dtype=dtype,
            replace=replace,
            allow_replace_gap=allow_replace_gap,
            threads=threads,
            dry_run=dry_run,
            undo=undo,
        )
        with resolve.adapter_folders(adapters) as folders:
            return resolve.merged(
                into,
                lambda target: combine_into(
                    target,
                    folders,
                    optional_path(out),
                    method=method,
                    weights=counts,
                    hparams=given,
                    seed=seed,
                    allow_disjoint=allow_disjoint,
                    options=merging,
                    progress=progress,
                ),
                dry_run=dry_run,
            )
    if undo:
        refuse_with_into(undo_without_into=True)
    with ExitStack() as stack:
        folders = stack.enter_context(resolve.adapter_folders(adapters))
        options = CombineOptions(
            method=method,
            weights=counts,
            hparams=given,
            policy=RankPolicy.of(**choices) if asked else None,
            policy_options=choices if asked else {},
            base=None if base is None else stack.enter_context(resolve.base_folder(base)),
            space=space,
            full=full,
            allow_disjoint=allow_disjoint,
            dtype=dtype,
            seed=seed,
            replace=replace,
            allow_replace_gap=allow_replace_gap,
            threads=threads,
            dry_run=dry_run,
        )
        return op.combine(folders, optional_path(out), options, progress)


def _entries(weights: str | Sequence[str | float]) -> list[str]:
    """Returns weights in the words of the command line: numbers stand for one entry."""
    if isinstance(weights, str):
        return [weights]
    numbers = [weight for weight in weights if not isinstance(weight, str)]
    texts = [weight for weight in weights if isinstance(weight, str)]
    return ([",".join(repr(float(number)) for number in numbers)] if numbers else []) + texts
