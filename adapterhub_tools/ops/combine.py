"""Combines adapters into one: their true deltas, weighted, by any method of the registry ``combine``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_tools.combine._weighted_sum import WeightedSum
from adapterhub_tools.model.adapter import Adapter, FullTensor, TargetModule
from adapterhub_tools.model.manifest import HistoryInput
from adapterhub_tools.model.protocols import Progress, SilentProgress
from adapterhub_tools.ops.adapter_writer import Draft, history_entry, write_and_report
from adapterhub_tools.ops.base_rows import memory_paths
from adapterhub_tools.ops.combine_bias import add_in_full, bias_sums, biases_in_full, with_biases
from adapterhub_tools.ops.combine_config import common_config, common_side
from adapterhub_tools.ops.combine_experts import Stacks, combine_stacks, is_stacked, stacks_of
from adapterhub_tools.ops.combine_full import (
    CombinedFull,
    carried_in_full,
    combine_full,
    refuse_whole_beside_factors,
)
from adapterhub_tools.ops.combine_inputs import CombineInput, common_base, open_inputs
from adapterhub_tools.ops.combine_modules import Joint, join_modules, paths_of
from adapterhub_tools.ops.combine_options import CombineOptions, implementation
from adapterhub_tools.ops.combine_ranks import choose_ranks
from adapterhub_tools.ops.combine_report import CombinedInput, CombineReport
from adapterhub_tools.ops.combine_work import Combined, Work, base_nbytes_of, nbytes_of, refuse_zero_sum
from adapterhub_tools.ops.hash import tensor_digests
from adapterhub_tools.ops.low_rank import Tensors
from adapterhub_tools.ops.option_checks import check_output
from adapterhub_tools.ops.shrink_report import ModuleReport
from adapterhub_tools.ops.spool import Spool
from adapterhub_tools.ops.to_lora import LowRankParts, complete_biases
from adapterhub_tools.store.digest import DEFAULT, root_digest

if TYPE_CHECKING:
    from torch import Tensor

_MUCH = 0.01
"""An error above it is told where nobody asked for the rank."""


def combine(
    adapters: Sequence[Path], out: Path | None, options: CombineOptions, progress: Progress | None = None
) -> CombineReport:
    """Writes one adapter that does what several do together.

    What is combined are the true deltas: scales, rsLoRA, patterns and ranks count as they act, and what a
    method does to its base (DoRA, …) is evaluated on ``base``. Methods that are sums with coefficients stay
    factored and exact where all deltas are products; everything else is evaluated by blocks of rows and
    approximated at the asked rank, with the error measured. Tensors carried in full follow the rules of
    ops/combine_full.py. The order of the adapters does not change the weights that are written.

    Memory: the factors of one module for each thread, or its delta up to the limit of engine/row_blocks.py.

    Args:
        adapters: their folders or weight files.
        out: the folder to make; None only with ``dry_run``.
        options: see CombineOptions.
        progress: told the bytes read.

    Raises:
        FormatError: an adapter is broken, or holds NaN or infinities.
        UnsupportedError: one is of a sort that cannot be combined.
        MismatchError: they do not belong together, nothing is left of them, or an option does not fit.
        IntegrityError: one differs from its manifest, or the base from what a manifest records.
        StoreError: the output cannot be written; what was there is untouched.
        ValueError: a value that an option does not have, or no ``out`` without ``dry_run``.
    """
    options.check_values()
    factors = options.space == "factors"
    method = None
    if not factors:
        method = implementation(options.method, options.hparams, options.seed, count=len(adapters))
    paths = [*adapters, *([] if options.base is None else [options.base])]
    check_output(out, paths, replace=options.replace, dry_run=options.dry_run)
    from adapterhub_tools.engine.run import default_threads

    with ExitStack() as stack:
        inputs = open_inputs(adapters, options.base, stack, progress)
        if factors:
            inputs = tuple(sorted(inputs, key=lambda item: item.place))
        ordered = replace(options, weights=options.weights.reordered([item.place for item in inputs]))
        tensors = Tensors(stack.enter_context(Spool(out or adapters[0].parent)))
        carried = carried_in_full(inputs)
        owners = {name.rpartition(".")[0] for name in carried}
        weights = ordered.weights.of(sorted({*paths_of(inputs), *owners}))
        addable = (
            options.policy is None and isinstance(method, WeightedSum) and method.default_rank == "exact"
        )
        experts = stacks_of(inputs, weights, addable=addable)
        stacked = {s.name: [i for i, m in enumerate(s.members) if m is not None] for s in experts.stacks}
        joints = join_modules(inputs, weights, allow_disjoint=options.allow_disjoint, stacked=stacked)
        if method is None:
            done = _by_factors(inputs, ordered, tensors, joints)
            full = combine_full(inputs, carried, weights, "drop", tensors)
        else:
            if options.full != "drop":
                refuse_whole_beside_factors(inputs, carried, {joint.path for joint in joints})
            full = combine_full(inputs, carried, weights, options.full, tensors)
            threads = options.threads or default_threads()
            work = Work(inputs, method, ordered, tensors, threads, progress or SilentProgress())
            sums = bias_sums(inputs, joints)
            if biases_in_full(inputs, joints, sums):
                add_in_full(inputs, joints, sums, carried, work, full)
                sums = {}
            done = _by_deltas(work, joints, experts, full, sums)
        report, draft = _finish(inputs, tensors, joints, done, full, options, experts.config)
        if options.dry_run or out is None:
            return report
        return write_and_report(draft, report, out, inputs=paths, options=options)


def _by_deltas(
    work: Work, joints: Sequence[Joint], experts: Stacks, full: CombinedFull, biases: Mapping[str, Tensor]
) -> list[Combined]:
    from adapterhub_tools.engine.workers import in_order

    budget = None if work.options.policy is None else work.options.policy.budget
    specs = [item.tensor for item in full.full]
    in_bytes = budget is not None and budget.unit == "bytes"
    carried = sum(spec.nbytes if in_bytes else spec.elements for spec in specs)
    ranks = choose_ranks(work, joints, carried)
    work.progress.start("combining", sum(nbytes_of(joint) + base_nbytes_of(joint) for joint in joints))
    results = in_order(lambda j: work.combine(j, ranks.get(j.path)), joints, work.threads)
    done = [with_biases(work, joint, result, biases) for joint, result in zip(joints, results, strict=True)]
    done += combine_stacks(work, experts)
    work.progress.finish()
    refuse_zero_sum([item.report.norm for item in done if item.report is not None])
    return done


def _by_factors(
    inputs: Sequence[CombineInput], options: CombineOptions, tensors: Tensors, joints: Sequence[Joint]
) -> list[Combined]:
    from adapterhub_tools.linalg.factored_svd import one_thread
    from adapterhub_tools.ops.combine_factors import FactorWork

    work = FactorWork(inputs, options, tensors)
    with one_thread():
        found = {module.path: (module, report) for module, report in work.run(joints)}
    done = [Combined(module=found[j.path][0], report=found[j.path][1]) for j in joints]
    return [replace(done[0], notes=tuple(work.notes)), *done[1:]]


def _finish(
    inputs: Sequence[CombineInput],
    tensors: Tensors,
    joints: Sequence[Joint],
    done: Sequence[Combined],
    full: CombinedFull,
    options: CombineOptions,
    more: Mapping[str, Any],
) -> tuple[CombineReport, Draft]:
    """Returns the report, and the draft of everything."""
    modules = [item.module for item in done if item.module is not None]
    kept = [(j.path, item.reason) for j, item in zip(joints, done, strict=False) if item.module is None]
    parts, base_modules = _completed(inputs, tensors, modules, full)
    given = sorted(inputs, key=lambda item: item.place)
    side, side_notes = common_side(given)
    config, config_notes = common_config(
        given,
        [module.path for module in modules if not is_stacked(module)],
        complete=not kept,
        tokens=full.tokens,
    )
    config.update(more)
    described = Adapter(
        dialect="peft",
        method="lora",
        hparams={},
        modules=tuple(modules),
        full=tuple(sorted(parts, key=lambda item: (item.target, item.role))),
        base=common_base(inputs),
        unparsed={"config": config},
        ties=any(item.opened.adapter.ties for item in inputs),
    )
    notes = [note for item in given for note in _input_notes(item)]
    notes += [note for item in done for note in item.notes]
    reports = [item.report for item in done if item.report is not None]
    report = combine_report(given, options, reports, described.parameters)
    report = replace(
        report,
        kept=tuple(kept + full.kept),
        notes=tuple(dict.fromkeys([*notes, *config_notes, *side_notes, *_rank_notes(report, options)])),
    )
    draft = Draft(
        adapter=described,
        contents=tensors.contents,
        history=history_entry(
            "combine",
            inputs=[*(item.digest for item in given), *_base_input(inputs)],
            options=options.to_json(),
            figures={"energy": report.totals.energy, "error": report.totals.error, "modules": len(reports)},
        ),
        side=side,
        base_modules=base_modules,
    )
    return report, draft


def combine_report(
    given: Sequence[CombineInput],
    options: CombineOptions,
    reports: Sequence[ModuleReport],
    parameters: int,
) -> CombineReport:
    """Returns the report of a combination before anything is written.

    Args:
        given: the adapters, in the order given.
        options: as given.
        reports: the modules.
        parameters: values of the output's tensors.
    """
    return CombineReport(
        operation="combine",
        out=None,
        dry_run=options.dry_run,
        modules=tuple(reports),
        kept=(),
        parameters_before=sum(item.opened.adapter.parameters for item in given),
        parameters=parameters,
        nbytes=0,
        digest=None,
        config={},
        notes=(),
        method=options.method,
        space=options.space,
        weights=options.weights.to_json(),
        options=dict(options.hparams),
        inputs=tuple(
            CombinedInput(
                label=item.label,
                path=str(item.path),
                digest=item.digest.digest,
                method=item.opened.adapter.method,
                weight=weight,
                modules=len(item.opened.adapter.modules),
                ranks=_ranks(item.opened.adapter.modules),
            )
            for item, weight in zip(given, options.weights.default, strict=True)
        ),
    )


def _rank_notes(report: CombineReport, options: CombineOptions) -> list[str]:
    """Tells where the rank that a method takes by itself leaves much out."""
    if options.policy is not None or report.totals.error <= _MUCH:
        return []
    return [
        f"at the ranks of the inputs the error is {report.totals.error:.2g}; --rank, --energy or --max-error "
        "choose others, and --into BASE loses no rank"
    ]


def _ranks(modules: Sequence[TargetModule]) -> dict[str, int]:
    counts: dict[int, int] = {}
    for module in modules:
        rank = module.hparams.get("rank")
        if isinstance(rank, int):
            counts[rank] = counts.get(rank, 0) + 1
    return {str(rank): count for rank, count in sorted(counts.items())}


def _input_notes(item: CombineInput) -> list[str]:
    texts = [*item.opened.adapter.notes, *map(str, item.opened.problems)]
    return [f"{item.label}: {text}" for text in texts]


def _completed(
    inputs: Sequence[CombineInput], tensors: Tensors, modules: Sequence[TargetModule], full: CombinedFull
) -> tuple[list[FullTensor], tuple[str, ...] | None]:
    """Adds the base's biases where others are carried, and returns the base's modules, if it is known."""
    effects = inputs[0].effects
    if effects is None:
        return full.full, None
    known = memory_paths(inputs[0].opened.adapter, effects.base.checkpoint)
    parts = LowRankParts(modules=list(modules), full=full.full, base_modules=known)
    complete_biases(effects, tensors, parts)
    return parts.full, known


def _base_input(inputs: Sequence[CombineInput]) -> list[HistoryInput]:
    """Returns the base as an input: the digest of all tensors that the adapters target."""
    effects = [item.effects for item in inputs if item.effects is not None]
    if not effects:
        return []
    checkpoint = effects[0].base.checkpoint
    names = sorted({n for e in effects for n in e.fit.target_names if n in checkpoint.tensors})
    digests, _ = tensor_digests(checkpoint, algorithm=DEFAULT, names=names)
    return [HistoryInput(role="base-targets", digest=root_digest(DEFAULT, digests))]
