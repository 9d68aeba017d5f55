"""Shrinks a LoRA or DoRA adapter to lower ranks: the best approximation of each delta, never formed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from adapterhub_tools.errors import MismatchError
from adapterhub_tools.model.manifest import HistoryInput
from adapterhub_tools.model.protocols import Progress
from adapterhub_tools.ops.adapter_writer import Draft, history_entry, known_base, write_and_report
from adapterhub_tools.ops.low_rank import checked_input, is_product, open_low_rank, replace_modules
from adapterhub_tools.ops.option_checks import check_dtype, check_output
from adapterhub_tools.ops.shrink_options import ShrinkOptions
from adapterhub_tools.ops.shrink_report import LowRankReport
from adapterhub_tools.ops.shrink_work import Run, Shrunk


def svd_shrink(
    adapter: Path, out: Path | None, options: ShrinkOptions, progress: Progress | None = None
) -> LowRankReport:
    """Writes an adapter with lower ranks.

    Each module's delta s·B·A becomes its best approximation of the new rank in the Frobenius norm (Eckart &
    Young 1936), from QR of B and of Aᵀ and the SVD of a rank × rank core, in float64. The new factors are
    balanced, B' = U·√S and A' = √S·Vᵀ, and rounded once. The scale s stays what it was: in alpha if a number
    can express it, else in the factors.

    Memory: the factors of one module for each thread, in float64.

    Args:
        adapter: the adapter's folder or weight file.
        out: the folder to make; None only with ``dry_run``.
        options: see ShrinkOptions.
        progress: told the bytes read.

    Raises:
        FormatError: the adapter is broken, or holds NaN or infinities.
        UnsupportedError: it is neither LoRA nor DoRA.
        MismatchError: nothing to shrink, a rank that none of its modules has, or every delta is zero.
        StoreError: the output cannot be written; what was there is untouched.
    """
    check_dtype(options.dtype)
    inputs = [adapter] if options.refit is None else [adapter, options.refit]
    check_output(out, inputs, replace=options.replace, dry_run=options.dry_run)
    if options.plot is not None:
        from adapterhub_tools.ops.spectra_plot import check_plot

        check_plot(options.plot)
    opened = open_low_rank(adapter)
    products = [module for module in opened.adapter.modules if is_product(module)]
    if not products:
        raise MismatchError.of(
            "no-products",
            "none of its modules is a product of two factors that could be shrunk.",
            file=str(adapter),
            remedy="Stacked experts and convolutions in groups keep their factors.",
        )
    if options.refit is not None and opened.adapter.method != "dora":
        raise MismatchError.of(
            "refit",
            "only DoRA has magnitudes to compute anew; this is plain LoRA.",
            file=str(adapter),
            loc="--refit",
            remedy="Leave --refit out.",
        )
    source_input = checked_input(opened)
    with ExitStack() as stack:
        run = Run(stack, opened, adapter, products, out or adapter.parent, options, progress)
        shrunk = run.shrink()
        report, draft = _finish(run, shrunk, adapter, source_input)
        if options.dry_run or out is None:
            result = report
        else:
            result = write_and_report(draft, report, out, inputs=inputs, options=options)
    if options.plot is not None:
        from adapterhub_tools.ops.spectra_plot import plot_spectra

        plot_spectra(result, options.plot)
    return result


def _finish(
    run: Run, shrunk: Sequence[Shrunk], path: Path, source: HistoryInput
) -> tuple[LowRankReport, Draft]:
    """Returns the report, and the draft with everything that stays as it is."""
    adapter, options = run.opened.adapter, run.options
    done = {item.module.path for item in shrunk}
    kept = [module for module in adapter.modules if not is_product(module)]
    modules = [item.module for item in shrunk] + [run.keep(module) for module in kept]
    for full in adapter.full:
        run.tensors.keep(run.loader, full.tensor)
    reasons = [(module.path, _reason(module.kind)) for module in kept]
    reasons += [(full.target, f"carried in full ({full.role})") for full in adapter.full]
    notes = [*adapter.notes, *map(str, run.opened.problems)]
    if run.rule != run.old_rule:
        notes.append(
            "rsLoRA's scale is no longer a number alpha / √rank, so it is in the factors, with alpha = rank"
        )
    zero = [item.report.path for item in shrunk if item.report.norm == 0]
    if zero:
        notes.append(
            f"{len(zero)} deltas are exactly zero and have rank 1 now or less: {', '.join(zero[:5])}"
        )
    described = replace_modules(adapter, modules, base=known_base(run.opened))
    report = LowRankReport(
        operation="svd-shrink",
        out=None,
        dry_run=options.dry_run,
        modules=tuple(item.report for item in shrunk),
        kept=tuple(reasons),
        parameters_before=adapter.parameters,
        parameters=described.parameters,
        nbytes=0,
        digest=None,
        config={},
        notes=tuple(notes),
    )
    totals = report.totals
    base = [] if run.refit is None else [run.refit.base_input]
    figures = {"energy": totals.energy, "error": totals.error, "modules": len(done)}
    if report.refit is not None:
        figures |= {"merged_error": report.refit.error, "merged_error_kept": report.refit.error_kept}
    history = history_entry(
        "svd-shrink",
        inputs=[source, *base],
        options={**options.policy_options, "dtype": options.dtype, "refit": options.refit is not None},
        figures=figures,
    )
    draft = Draft(
        adapter=described,
        contents=run.tensors.contents,
        history=history,
        before=run.opened.manifest,
        side=run.opened.files.root if path.is_dir() else None,
    )
    return report, draft


def _reason(kind: str) -> str:
    if kind == "expert":
        return "stacked experts keep their factors: their ranks are not lowered"
    return "a convolution in groups keeps its factors"
