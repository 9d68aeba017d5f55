"""Writes an adapter so that a server applies it as PEFT does: exactly where that is possible."""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import LossyError, MismatchError, Problem, UnsupportedError, raise_for
from adapterhub_tools.model.adapter import Adapter, FullTensor, TargetModule
from adapterhub_tools.model.protocols import Progress
from adapterhub_tools.ops.adapter_reader import OpenedAdapter, examine_adapter
from adapterhub_tools.ops.adapter_writer import Draft, history_entry, known_base, write_and_report
from adapterhub_tools.ops.low_rank import RULES, Loader, Tensors, alpha_for, checked_input, open_low_rank
from adapterhub_tools.ops.option_checks import check_dtype
from adapterhub_tools.ops.server_examine import Examination, is_pattern, refusals
from adapterhub_tools.ops.server_full import own_tensors
from adapterhub_tools.ops.server_layout import Layout, Piece, layout_on, misfits, plain_layout
from adapterhub_tools.ops.server_report import RewrittenModule, ServerReport
from adapterhub_tools.ops.server_scales import Product, ScalePlan, plan_scales
from adapterhub_tools.ops.server_table import Server, server
from adapterhub_tools.ops.spool import Spool
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.destination import check_destination

if TYPE_CHECKING:
    from adapterhub_tools.ops.server_write import Target

_SHOWN = 10
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """The options of fitting an adapter to a server; each is a flag of the same name.

    Attributes:
        server: the server, one of ``server_names()``; the flag is ``--for``.
        base: the base, whose module names the output gets, and whose own tensors it need not carry.
        check: whether only to examine.
        to_lora: whether another method may be approximated by LoRA first; needs ``base``.
        max_rank: the largest rank that the server was started with; None for what it can be started with.
        max_error: the relative error, in the Frobenius norm, that each module may have.
        allow_lossy: whether a larger error is allowed.
        dtype: the dtype of factors that are computed; None keeps the adapter's.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.
        threads: the number of workers of a conversion; None chooses.
        dry_run: whether to compute and report without writing.
    """

    server: str
    base: Path | None = None
    check: bool = False
    to_lora: bool = False
    max_rank: int | None = None
    max_error: float = 0.01
    allow_lossy: bool = False
    dtype: str | None = None
    replace: bool = False
    allow_replace_gap: bool = False
    threads: int | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Examined:
    """What was found, and how the output is to be."""

    opened: OpenedAdapter
    report: ServerReport
    layout: Layout
    plan: ScalePlan | None
    dropped: frozenset[str]


def fit_server(
    adapter: Path, out: Path | None, options: FitOptions, progress: Progress | None = None
) -> ServerReport:
    """Examines an adapter against a server's table, and writes the form that the server takes.

    Args:
        adapter: the adapter's folder or weight file.
        out: the folder to make; None only with ``check`` or ``dry_run``.
        options: see FitOptions.
        progress: told the bytes of the base that a conversion reads.

    Raises:
        FormatError: a file is broken, or holds NaN or infinities.
        MismatchError: an option is out of range, or the base is not the adapter's.
        UnsupportedError: the server does not take what the adapter has, and no other form of it is the same.
        LossyError: a module's error is above ``max_error``.
        StoreError: the output cannot be written; what was there is untouched.
        ValueError: no ``out``, or a server that the table does not know.
    """
    found = server(options.server)
    inputs = [path for path in (adapter, options.base) if path is not None]
    _check_options(options)
    if out is not None and not options.check:
        check_destination(out, inputs=inputs, replace=options.replace)
    elif not (options.check or options.dry_run):
        raise ValueError("out may be None only with check or in a dry run")
    with ExitStack() as stack:
        given = adapter
        if options.to_lora and examine_adapter(adapter).adapter.method != "lora":
            given = _as_lora(adapter, options, stack, progress)
        base = None if options.base is None else open_checkpoint(options.base)
        examined = _examine(given, found, base, options)
        if given is not adapter:
            report = replace(examined.report, path=str(adapter))
            examined = replace(examined, report=report)
        if options.check:
            return examined.report
        refused = [item.as_problem(str(adapter)) for item in refusals(examined.report.findings)]
        if refused:
            raise UnsupportedError(*refused)
        if examined.opened.adapter.method not in ("lora", "dora"):
            raise UnsupportedError.of(
                "method",
                f"it is of type {examined.opened.adapter.method}, which {found.title} reads as it is.",
                file=str(adapter),
                remedy="Use the adapter itself; only LoRA and DoRA are written anew.",
            )
        return _write(given, out, examined, options, inputs, stack)


def _check_options(options: FitOptions) -> None:
    check_dtype(options.dtype)
    if not 0 <= options.max_error <= 1:
        raise MismatchError.of(
            "max-error", f"{options.max_error} is out of range.", loc="--max-error", remedy="Give 0 to 1."
        )
    if options.max_rank is not None and options.max_rank < 1:
        raise MismatchError.of(
            "rank", f"{options.max_rank} is no rank.", loc="--max-rank", remedy="Give a positive number."
        )
    if options.to_lora and options.base is None:
        raise MismatchError.of(
            "base",
            "what another method than LoRA does depends on the base, which was not given.",
            loc="--base",
            remedy="Give --base with the base that the adapter was trained on.",
        )


def _as_lora(adapter: Path, options: FitOptions, stack: ExitStack, progress: Progress | None) -> Path:
    """Approximates another method by LoRA, in a temporary folder."""
    from adapterhub_tools.ops.convert import convert
    from adapterhub_tools.ops.convert_options import ConvertOptions

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adaptertool-"))) / adapter.name
    chosen = ConvertOptions(
        to="lora",
        base=options.base,
        rank="auto" if options.max_rank is None else options.max_rank,
        max_error=options.max_error,
        allow_lossy=options.allow_lossy,
        dtype=options.dtype,
        threads=options.threads,
    )
    convert(adapter, folder, chosen, progress)
    return folder


def _examine(adapter: Path, found: Server, base: Checkpoint | None, options: FitOptions) -> _Examined:
    opened = examine_adapter(adapter)
    examination = Examination(opened.adapter, found, base)
    layout, plan, dropped = Layout(pieces=()), None, frozenset[str]()
    if examination.method():
        opened = open_low_rank(adapter)
        layout, plan, dropped = _features(examination, opened, found, base, options)
    notes = [] if base is not None else ["the base was not given: names were not compared with it"]
    known = known_base(opened)
    if found.scale == "alpha" and (known is None or known.id is None):
        notes.append("the config names no base: give convert_lora_to_gguf.py --base")
    report = ServerReport(
        path=str(adapter),
        server=found.name,
        checked=found.checked,
        findings=tuple(examination.findings),
        config={},
        notes=(*opened.adapter.notes, *notes),
    )
    return _Examined(opened=opened, report=report, layout=layout, plan=plan, dropped=dropped)


def _features(
    examination: Examination,
    opened: OpenedAdapter,
    found: Server,
    base: Checkpoint | None,
    options: FitOptions,
) -> tuple[Layout, ScalePlan | None, frozenset[str]]:
    """Examines all but the method; returns the layout, the scales, and the tensors that can be left out."""
    adapter = opened.adapter
    dropped = frozenset[str]() if base is None else frozenset(own_tensors(opened, base, found))
    examination.full_tensors(dropped)
    if not adapter.modules:
        return Layout(pieces=()), None, dropped
    layout = plain_layout(adapter) if base is None else layout_on(adapter, base)
    if base is not None:
        label = opened.files.root.name
        raise_for([replace(p, file=label) for p in misfits(layout, adapter, base)], MismatchError)
    examination.modules()
    examination.layout(layout)
    stacked = any(piece.kind == "expert" for piece in layout.pieces)
    plan = None if found.scale == "patterns" or stacked else _plan(layout, found)
    limits = [limit for limit in (found.max_rank, options.max_rank) if limit is not None]
    examination.scales(plan, layout, min(limits, default=None))
    if stacked and found.scale != "patterns":
        examination.stacked_scales()
    return layout, plan, dropped


def _plan(layout: Layout, found: Server) -> ScalePlan:
    from adapterhub_tools.ops.server_write import piece_rank, piece_scale

    products = {
        piece.path: Product(scale=piece_scale(piece), rank=piece_rank(piece)) for piece in layout.pieces
    }
    # A converter stacks the factors of one projection of all experts, which have to have one shape then.
    experts = {item.rank for path, item in products.items() if _EXPERT.search(path)}
    return plan_scales(
        products,
        one_rank=found.scale == "alpha-and-rank" or len(experts) > 1,
        alpha_bits=found.alpha_bits,
        rslora=found.features["rslora"].accepts is True,
        rule=str(layout.pieces[0].origins[0].module.hparams.get("scaling", RULES[0])),
    )


def _target(piece: Piece, plan: ScalePlan | None) -> Target:
    from adapterhub_tools.ops.server_write import Target, piece_rank, piece_scale

    if plan is not None:
        return Target(rank=plan.modules[piece.path].rank, alpha=plan.alpha, rule=plan.rule)
    hparams = piece.origins[0].module.hparams
    rank, rule = piece_rank(piece), hparams.get("scaling", RULES[0])
    if piece.fused is None:
        return Target(rank=rank, alpha=float(hparams["alpha"]), rule=rule)
    scale = piece_scale(piece)
    alpha = alpha_for(scale, rank, rule)
    if alpha is None:
        # The nearest alpha; what is left of the scale goes into B.
        alpha = float(scale) * (rank if rule == RULES[0] else sqrt(rank))
    return Target(rank=rank, alpha=alpha, rule=rule)


def _write(
    adapter: Path,
    out: Path | None,
    examined: _Examined,
    options: FitOptions,
    inputs: list[Path],
    stack: ExitStack,
) -> ServerReport:
    from adapterhub_tools.ops.server_write import write_piece

    opened = examined.opened
    tensors = Tensors(stack.enter_context(Spool(out or adapter.parent)))
    loader = Loader(opened, stack.enter_context(opened.files.open_weights()))
    modules, reports = [], []
    for piece in examined.layout.pieces:
        target = _target(piece, examined.plan)
        module, rewritten = write_piece(piece, target, options.dtype, tensors, loader)
        modules.append(module)
        if rewritten is not None:
            reports.append(rewritten)
    full: list[FullTensor] = []
    left: list[tuple[str, str]] = []
    for item in opened.adapter.full:
        if item.tensor.name in examined.dropped:
            left.append((item.tensor.name, "it is the base's own"))
        else:
            tensors.keep(loader, item.tensor)
            full.append(item)
    _refuse_lossy(reports, options)
    report = replace(examined.report, dry_run=options.dry_run, modules=tuple(reports), left_out=tuple(left))
    if options.dry_run or out is None:
        return replace(report, dry_run=True)
    draft = _draft(adapter, examined, options, modules, full, reports, tensors)
    return write_and_report(draft, report, out, inputs=inputs, options=options)


def _draft(
    adapter: Path,
    examined: _Examined,
    options: FitOptions,
    modules: list[TargetModule],
    full: list[FullTensor],
    reports: list[RewrittenModule],
    tensors: Tensors,
) -> Draft:
    opened = examined.opened
    before = opened.adapter
    described = Adapter(
        dialect=before.dialect,
        method=before.method,
        hparams={},
        modules=tuple(modules),
        full=tuple(full),
        base=known_base(opened),
        unparsed={"config": _config(before, server(options.server))},
        ties=before.ties,
    )
    history = history_entry(
        "fit",
        inputs=[checked_input(opened)],
        options={
            "server": options.server,
            "table": examined.report.checked,
            "to_lora": options.to_lora,
            "max_rank": options.max_rank,
            "max_error": options.max_error,
            "allow_lossy": options.allow_lossy,
            "dtype": options.dtype,
        },
        figures={
            "rewritten": len(reports),
            "exact": sum(report.exact for report in reports),
            "worst_error": max((report.error for report in reports), default=0.0),
        },
    )
    return Draft(
        adapter=described,
        contents=tensors.contents,
        history=history,
        before=opened.manifest,
        side=opened.files.root if adapter.is_dir() else None,
        base_modules=examined.layout.paths,
    )


def _config(adapter: Adapter, found: Server) -> dict[str, Any]:
    """Returns the config to begin with; without a pattern of targets where a server expects names."""
    config = dict(adapter.unparsed.get("config", {}))
    if found.listed_targets and is_pattern(config):
        config.pop("target_modules")
    return config


def _refuse_lossy(reports: list[RewrittenModule], options: FitOptions) -> None:
    above = sorted((item for item in reports if item.error > options.max_error), key=lambda item: -item.error)
    if not above or options.allow_lossy:
        return
    raise LossyError(
        *(
            Problem(
                kind="approximation",
                loc=item.path,
                message=f"its relative error is {item.error:.3g}; allowed is {options.max_error:.3g}.",
                remedy="Write a wider type with --dtype float32, raise --max-error, or give --allow-lossy.",
            )
            for item in above[:_SHOWN]
        )
    )
