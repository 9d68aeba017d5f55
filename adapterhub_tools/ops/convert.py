"""Converts adapters to plain LoRA or to DoRA: exactly where possible, with a measured error elsewhere."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.errors import LossyError, MismatchError, Problem
from adapterhub_tools.model.adapter import Adapter
from adapterhub_tools.model.manifest import HistoryInput
from adapterhub_tools.model.protocols import Progress, SilentProgress
from adapterhub_tools.ops.adapter_reader import OpenedAdapter, examine_adapter
from adapterhub_tools.ops.adapter_writer import Draft, history_entry, known_base, write_and_report
from adapterhub_tools.ops.convert_options import ConvertOptions
from adapterhub_tools.ops.low_rank import Loader, Tensors, checked_input, open_low_rank, refuse_zero
from adapterhub_tools.ops.option_checks import check_output
from adapterhub_tools.ops.shrink_report import LowRankReport
from adapterhub_tools.ops.spool import Spool

if TYPE_CHECKING:
    from adapterhub_tools.ops.to_lora import LowRankParts

_SHOWN = 10


def convert(
    adapter: Path, out: Path | None, options: ConvertOptions, progress: Progress | None = None
) -> LowRankReport:
    """Writes an adapter as another method.

    LoRA to DoRA is exact up to one rounding of the magnitudes. DoRA, and any other method that can be merged,
    to LoRA is the best approximation of the true effect f(W) − W at a rank. An adapter whose initialisation
    altered its base becomes a plain LoRA for the original base. ``fold_scale`` alone keeps the method.

    Args:
        adapter: the adapter's folder or weight file.
        out: the folder to make; None only with ``dry_run``.
        options: see ConvertOptions.
        progress: told the bytes of the base that are read.

    Raises:
        FormatError: a file is broken, or holds NaN or infinities.
        UnsupportedError: a method that cannot be merged, or what the target cannot express.
        MismatchError: there is nothing to convert, the base is missing, or it does not fit.
        LossyError: the error of a module is above ``max_error``.
        StoreError: the output cannot be written; what was there is untouched.
    """
    options.check_values()
    inputs = [path for path in (adapter, options.base, options.initial) if path is not None]
    check_output(out, inputs, replace=options.replace, dry_run=options.dry_run)
    from adapterhub_tools.engine.run import default_threads

    opened = examine_adapter(adapter)
    opened.files.open_weights().close()
    with ExitStack() as stack:
        tensors = Tensors(stack.enter_context(Spool(out or adapter.parent)))
        loader = Loader(opened, stack.enter_context(opened.files.open_weights()))
        threads = options.threads or default_threads()
        parts, others = _parts(
            adapter, opened, options, tensors, loader, threads, stack, progress or SilentProgress()
        )
        if not parts.reports and parts.full:
            raise MismatchError.of(
                "no-matrix",
                "it changes no matrix, only tensors that a LoRA adapter carries in full.",
                file=str(adapter),
                remedy="Keep it as it is, or merge it.",
            )
        refuse_zero([report.norm for report in parts.reports], adapter)
        _refuse_lossy(parts, options)
        report, draft = _draft(adapter, opened, options, tensors, parts, others)
        if options.dry_run or out is None:
            return report
        return write_and_report(draft, report, out, inputs=inputs, options=options)


def _parts(
    path: Path,
    opened: OpenedAdapter,
    options: ConvertOptions,
    tensors: Tensors,
    loader: Loader,
    threads: int,
    stack: ExitStack,
    progress: Progress,
) -> tuple[LowRankParts, list[HistoryInput]]:
    """Chooses the way from the adapter's method to the target."""
    from adapterhub_tools.ops import altered_base, to_dora, to_lora

    method = opened.adapter.method
    if altered_base.is_altered(opened):
        open_low_rank(path, altered_base=True)
        if method != options.to:
            raise MismatchError.of(
                "two-steps",
                f"its initialisation altered the base and it is {method}.",
                file=str(path),
                loc="--to",
                remedy=f"Convert it --to {method} first, then --to {options.to}.",
            )
        return altered_base.to_plain(opened, options, tensors, loader, threads, stack)
    if method == options.to:
        if not options.fold_scale or options.rank is not None:
            raise MismatchError.of(
                "same-method",
                f"it is {method} already.",
                file=str(path),
                loc="--to",
                remedy="Use svd-shrink to change its rank, or --fold-scale alone to put its scales into the "
                "factors.",
            )
        open_low_rank(path)
        return _folded(opened, options, tensors, loader, threads), []
    if options.base is None:
        raise MismatchError.of(
            "base",
            f"what {method} does depends on the base, which was not given.",
            file=str(path),
            loc="--base",
            remedy="Give --base with the base that the adapter was trained on.",
        )
    if options.to == "lora":
        parts, effects = to_lora.to_lora(
            opened, options.base, options, tensors, loader, threads, stack, progress
        )
        return parts, [effects.base.targets_input(effects.fit)]
    if method != "lora":
        raise MismatchError.of(
            "two-steps",
            f"it is {method}; only LoRA has a DoRA of the same effect.",
            file=str(path),
            loc="--to",
            remedy="Convert it --to lora first, then --to dora.",
        )
    open_low_rank(path)
    dora, base = to_dora.to_dora(opened, options.base, options, tensors, loader, threads, stack, progress)
    return dora, [base]


def _folded(
    opened: OpenedAdapter, options: ConvertOptions, tensors: Tensors, loader: Loader, threads: int
) -> LowRankParts:
    from adapterhub_tools.engine.workers import in_order
    from adapterhub_tools.ops.to_dora import fold
    from adapterhub_tools.ops.to_lora import LowRankParts

    parts = LowRankParts()
    modules = opened.adapter.modules
    for module, report in in_order(lambda m: fold(m, options, tensors, loader), modules, threads):
        parts.modules.append(module)
        parts.reports.append(report)
    for item in opened.adapter.full:
        tensors.keep(loader, item.tensor)
        parts.full.append(item)
    return parts


def _refuse_lossy(parts: LowRankParts, options: ConvertOptions) -> None:
    above = sorted(
        (report for report in parts.reports if report.error > options.max_error), key=lambda r: -r.error
    )
    if not above or options.allow_lossy:
        return
    # auto has already gone as far as factors stay smaller than the weight.
    higher = "Give" if options.rank == "auto" else "Give a higher --rank, --rank auto,"
    problems = [
        Problem(
            kind="approximation",
            loc=report.path,
            message=f"rank {report.rank} has a relative error of {report.error:.3g}; allowed is "
            f"{options.max_error:.3g}.",
            remedy=f"{higher} a larger --max-error, or --allow-lossy." if index == 0 else "",
        )
        for index, report in enumerate(above[:_SHOWN])
    ]
    if len(above) > _SHOWN:
        problems.append(Problem(kind="approximation", message=f"{len(above) - _SHOWN} more modules."))
    raise LossyError(*problems)


def _draft(
    path: Path,
    opened: OpenedAdapter,
    options: ConvertOptions,
    tensors: Tensors,
    parts: LowRankParts,
    others: list[HistoryInput],
) -> tuple[LowRankReport, Draft]:
    adapter = opened.adapter
    config = dict(adapter.unparsed.get("config", {}))
    config["init_lora_weights"] = True
    described = Adapter(
        dialect=adapter.dialect,
        method=options.to,
        hparams={},
        modules=tuple(sorted(parts.modules, key=lambda module: module.path)),
        full=tuple(sorted(parts.full, key=lambda item: (item.target, item.role))),
        base=known_base(opened),
        unparsed={"config": config},
        ties=adapter.ties,
    )
    report = LowRankReport(
        operation="convert",
        out=None,
        dry_run=options.dry_run,
        modules=tuple(parts.reports),
        kept=tuple(parts.kept),
        parameters_before=adapter.parameters,
        parameters=described.parameters,
        nbytes=0,
        digest=None,
        config={},
        notes=(*adapter.notes, *map(str, opened.problems), *parts.notes),
    )
    totals = report.totals
    history = history_entry(
        "convert",
        inputs=[checked_input(opened), *others],
        options={
            "from": adapter.method,
            "to": options.to,
            "rank": options.rank,
            "max_error": options.max_error,
            "allow_lossy": options.allow_lossy,
            "fold_scale": options.fold_scale,
            "dtype": options.dtype,
            "seed": options.seed,
        },
        figures={"energy": totals.energy, "error": totals.error, "worst_error": totals.worst[0]},
    )
    draft = Draft(
        adapter=described,
        contents=tensors.contents,
        history=history,
        before=opened.manifest,
        side=opened.files.root if path.is_dir() else None,
        base_modules=parts.base_modules,
    )
    return report, draft
