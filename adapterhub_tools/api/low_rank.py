"""The low-rank algebra of the Python face: shrink, convert and extract adapters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from adapterhub_tools.api.paths import Reference, optional_path

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Progress
    from adapterhub_tools.ops.shrink_report import LowRankReport


def svd_shrink(
    adapter: Reference,
    out: Reference | None,
    *,
    rank: int | str | Sequence[int | str] | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    budget: str | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    sv_fro: float | None = None,
    refit: Reference | None = None,
    dtype: str | None = None,
    plot: Reference | None = None,
    replace: bool = False,
    allow_replace_gap: bool = False,
    threads: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> LowRankReport:
    """Shrinks a LoRA or DoRA adapter to lower ranks; exactly one policy chooses them.

    Each delta s·B·A becomes its best approximation of the new rank in the Frobenius norm (Eckart and Young
    1936), in float64 and from the factors alone: nothing dense is formed. See docs/algebra.md.

    Memory: the factors of one module for each thread.

    Args:
        adapter: the adapter's folder or ``.safetensors`` file.
        out: the folder to write; None only with ``dry_run``.
        rank: one rank for all modules, ``"PATTERN=RANK"`` for those whose path ends in a pattern, or several.
        energy: the share of the squared singular values that each module keeps.
        max_error: the relative error that each module may have, in the Frobenius norm.
        budget: the size of the whole adapter, ``"2M"`` parameters or ``"8MiB"``; or ``"50%"`` of its factors.
        sv_ratio: singular values above the largest over this are kept.
        sv_cumulative: the share of the sum of singular values that each module keeps.
        sv_fro: the share of the Frobenius norm that each module keeps.
        refit: a base, on which DoRA's magnitudes are computed anew.
        dtype: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"`` for the factors; None keeps
            theirs.
        plot: a picture of the spectra, ``.png`` or ``.svg``.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.
        threads: the number of workers; None chooses.
        dry_run: whether to compute and report without writing.
        progress: told how far it is.

    Raises:
        FormatError: the adapter is broken, or holds NaN or infinities.
        UnsupportedError: it is neither LoRA nor DoRA; convert it first.
        MismatchError: no policy, or one that does not fit the adapter.
        StoreError: could not read or write; the destination is untouched.
        ValueError: an unknown dtype, or no ``out`` without ``dry_run``.

    Example:
        >>> at.svd_shrink("my-adapter", "small", energy=0.99).ranks
        >>> at.svd_shrink("my-adapter", None, rank=[8, "q_proj=4"], dry_run=True).summary
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import shrink as op
    from adapterhub_tools.ops.rank_policy import RankPolicy
    from adapterhub_tools.ops.shrink_options import ShrinkOptions

    choices = policy_choices(
        rank=rank,
        energy=energy,
        max_error=max_error,
        budget=budget,
        sv_ratio=sv_ratio,
        sv_cumulative=sv_cumulative,
        sv_fro=sv_fro,
    )
    options = ShrinkOptions(
        policy=RankPolicy.of(**choices),
        policy_options=choices,
        refit=optional_path(refit),
        dtype=dtype,
        plot=optional_path(plot),
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        threads=threads,
        dry_run=dry_run,
    )
    with resolve.adapter_folder(adapter) as folder:
        return op.svd_shrink(folder, optional_path(out), options, progress)


def convert(
    adapter: Reference,
    out: Reference | None,
    *,
    to: str,
    base: Reference | None = None,
    initial: Reference | None = None,
    rank: int | str | None = None,
    max_error: float = 0.01,
    allow_lossy: bool = False,
    fold_scale: bool = False,
    dtype: str | None = None,
    seed: int = 0,
    replace: bool = False,
    allow_replace_gap: bool = False,
    threads: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> LowRankReport:
    """Converts an adapter to plain LoRA or to DoRA.

    LoRA becomes DoRA exactly, but for one rounding of the magnitudes ‖W + s·B·A‖. Any mergeable method
    becomes LoRA by the best approximation of what it does to its base, f(W) − W, which is exact where that
    has the rank. See docs/algebra.md.

    Memory: the factors of one module for each thread, or blocks of its weight and a sketch.

    Args:
        adapter: the adapter's folder or ``.safetensors`` file.
        out: the folder to write; None only with ``dry_run``.
        to: ``"lora"`` or ``"dora"``.
        base: the base, where what the adapter does depends on it.
        initial: the adapter as it was saved before training, where its initialisation altered the base
            (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ).
        rank: the rank of the result, or ``"auto"`` for the smallest within ``max_error``.
        max_error: the relative error, in the Frobenius norm, that each module may have.
        allow_lossy: whether a larger error is allowed.
        fold_scale: whether alpha, rsLoRA and patterns go into the factors, so that every scale is 1.
        dtype: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"`` for computed factors; None keeps
            the adapter's.
        seed: of the random sketches.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.
        threads: the number of workers; None chooses.
        dry_run: whether to compute and report without writing.
        progress: told how far it is.

    Raises:
        FormatError: a file is broken, or holds NaN or infinities.
        UnsupportedError: a method that cannot be merged, or what the target cannot express.
        MismatchError: nothing to convert, or the base or the initial adapter is missing or does not fit.
        LossyError: the error of a module is above ``max_error``.
        StoreError: could not read or write; the destination is untouched.
        ValueError: another target, an unknown dtype, or no ``out`` without ``dry_run``.

    Example:
        >>> at.convert("my-oft", "my-lora", to="lora", base="base", rank="auto", max_error=0.01)
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import convert as op
    from adapterhub_tools.ops.convert_options import ConvertOptions

    with ExitStack() as stack:
        folder = stack.enter_context(resolve.adapter_folder(adapter))
        options = ConvertOptions(
            to=to,
            base=None if base is None else stack.enter_context(resolve.base_folder(base)),
            initial=None if initial is None else stack.enter_context(resolve.adapter_folder(initial)),
            rank=rank,
            max_error=max_error,
            allow_lossy=allow_lossy,
            fold_scale=fold_scale,
            dtype=dtype,
            seed=seed,
            replace=replace,
            allow_replace_gap=allow_replace_gap,
            threads=threads,
            dry_run=dry_run,
        )
        return op.convert(folder, optional_path(out), options, progress)


def extract(
    base: Reference,
    tuned: Reference,
    out: Reference | None,
    *,
    rank: int | str | Sequence[int | str] | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    budget: str | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    sv_fro: float | None = None,
    dtype: str = "float32",
    leave_out: Sequence[str] = (),
    allow_lossy: bool = False,
    seed: int = 0,
    plot: Reference | None = None,
    replace: bool = False,
    allow_replace_gap: bool = False,
    threads: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> LowRankReport:
    """Extracts a LoRA adapter from a tuned model: what takes the base to it, at chosen ranks.

    Each changed matrix gives D = W_tuned − W_base and, by a randomised SVD whose error is measured, the
    leading singular triplets of D. See docs/algebra.md.

    Memory: differences of at most 192 MiB together, else blocks of 4 MiB, and a sketch for each thread.

    Args:
        base: the base's folder or ``.safetensors`` file.
        tuned: the tuned model's.
        out: the folder to write; None only with ``dry_run``.
        rank: one rank for all matrices, ``"PATTERN=RANK"`` for those whose path ends in a pattern, or
            several.
        energy: the share of the squared singular values that each matrix keeps.
        max_error: the relative error that each matrix may have, in the Frobenius norm.
        budget: the size of the whole adapter, ``"2M"`` parameters or ``"8MiB"``; or ``"5%"`` of the changed
            matrices.
        sv_ratio: singular values above the largest over this are kept.
        sv_cumulative: the share of the sum of singular values that each matrix keeps.
        sv_fro: the share of the Frobenius norm that each matrix keeps.
        dtype: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"`` for the factors.
        leave_out: tensors, by the end of their names in memory, that are left out and listed.
        allow_lossy: whether changes that no adapter can express may be left out.
        seed: of the random sketches.
        plot: a picture of the spectra, ``.png`` or ``.svg``.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.
        threads: the number of workers; None chooses.
        dry_run: whether to compute and report without writing.
        progress: told how far it is.

    Raises:
        FormatError: a file is broken, or holds NaN or infinities.
        MismatchError: no policy, or models that do not fit each other or do not differ.
        UnsupportedError: one of them is quantised.
        LossyError: changes that no adapter can express, unless allowed.
        StoreError: could not read or write; the destination is untouched.
        ValueError: an unknown dtype, or no ``out`` without ``dry_run``.

    Example:
        >>> at.extract("base", "my-tuned-model", "my-adapter", rank=32).summary
    """
    from adapterhub_tools.hub import resolve
    from adapterhub_tools.ops import extract as op
    from adapterhub_tools.ops.extract_options import ExtractOptions
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
    options = ExtractOptions(
        policy=RankPolicy.of(**choices),
        policy_options=choices,
        dtype=dtype,
        leave_out=tuple(leave_out),
        allow_lossy=allow_lossy,
        seed=seed,
        plot=optional_path(plot),
        replace=replace,
        allow_replace_gap=allow_replace_gap,
        threads=threads,
        dry_run=dry_run,
    )
    with resolve.base_folder(base) as before, resolve.base_folder(tuned) as after:
        return op.extract(before, after, optional_path(out), options, progress)


def policy_choices(**policies: Any) -> dict[str, Any]:
    """Returns the policies in a form that a history can keep."""
    rank = policies["rank"]
    return {**policies, "rank": rank if isinstance(rank, int | str) or rank is None else list(rank)}
