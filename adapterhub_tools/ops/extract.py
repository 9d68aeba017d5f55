"""Extracts an adapter from a tuned model: the best low-rank approximation of what changed in each weight."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools import registry
from adapterhub_tools.errors import LossyError, MismatchError, Problem
from adapterhub_tools.model.adapter import Adapter, FullTensor, TargetModule
from adapterhub_tools.model.base import BaseRef, StoredTensor
from adapterhub_tools.model.manifest import HistoryInput
from adapterhub_tools.model.protocols import Progress, SilentProgress
from adapterhub_tools.model.tensor import DTYPE_BITS, DTYPE_NAMES, TensorSpec
from adapterhub_tools.ops.adapter_writer import Draft, history_entry, write_and_report
from adapterhub_tools.ops.base_check import identify_base
from adapterhub_tools.ops.base_rows import OpenBase
from adapterhub_tools.ops.dense_rank import approximate
from adapterhub_tools.ops.extract_options import ExtractOptions
from adapterhub_tools.ops.extract_plan import ExtractPlan, Matrix, plan_extract, task_of
from adapterhub_tools.ops.fit import fit
from adapterhub_tools.ops.hash import tensor_digests
from adapterhub_tools.ops.low_rank import Tensors
from adapterhub_tools.ops.option_checks import check_dtype, check_output
from adapterhub_tools.ops.rank_policy import Claim, allot
from adapterhub_tools.ops.shrink_report import LowRankReport, ModuleReport
from adapterhub_tools.ops.spool import Spool, StoredContent
from adapterhub_tools.store.checkpoint import Checkpoint
from adapterhub_tools.store.digest import DEFAULT, root_digest

if TYPE_CHECKING:
    from adapterhub_tools.linalg.randomized_svd import RowBlocks

_SHOWN = 10
_COMPARED_BYTES = 4 << 20
BUDGET_REACH = 4
"""No module gets more than so many times the rank that an even share of a budget would give to all."""


def extract(
    base: Path,
    tuned: Path,
    out: Path | None,
    options: ExtractOptions,
    progress: Progress | None = None,
) -> LowRankReport:
    """Writes an adapter that takes a base to a tuned model.

    Each changed matrix gives D = W_tuned − W_base, in float64 and by blocks of rows, and its leading singular
    triplets by a randomised SVD (linalg/randomized_svd.py); the error is measured on the factors as stored.
    Changed norms, embeddings and heads, a grown vocabulary and new modules are carried in full, changed
    biases as biases. Nothing is left out silently.

    Memory: differences of at most 192 MiB together, else blocks of 4 MiB, and a sketch for each thread.

    Args:
        base: the base's folder or file.
        tuned: the tuned model's folder or file.
        out: the folder to make; None only with ``dry_run``.
        options: see ExtractOptions.
        progress: told the bytes of the tuned model that are done.

    Raises:
        FormatError: a file is broken, or holds NaN or infinities.
        MismatchError: the models do not fit each other, or do not differ.
        UnsupportedError: one of them is quantised.
        LossyError: changes that no adapter can express, unless allowed.
        StoreError: the output cannot be written; what was there is untouched.
    """
    check_dtype(options.dtype)
    check_output(out, [base, tuned], replace=options.replace, dry_run=options.dry_run)
    if options.plot is not None:
        from adapterhub_tools.ops.spectra_plot import check_plot

        check_plot(options.plot)
    with ExitStack() as stack:
        models = OpenBase(base), OpenBase(tuned)
        for model in models:
            stack.callback(model.close)
        plan = plan_extract(
            models[0].checkpoint,
            models[1].checkpoint,
            lambda before, after: _same(models, before, after),
            options.leave_out,
        )
        _refuse(plan, options, tuned)
        tensors = Tensors(stack.enter_context(Spool(out or tuned.parent)))
        work = _Work(models, plan, options, tensors, progress or SilentProgress())
        modules, reports = work.run()
        report, draft = _draft(models, plan, options, tensors, modules, reports)
        if not options.dry_run and out is not None:
            report = write_and_report(draft, report, out, inputs=[base, tuned], options=options)
    if options.plot is not None:
        from adapterhub_tools.ops.spectra_plot import plot_spectra

        plot_spectra(report, options.plot)
    return report


def _same(models: tuple[OpenBase, OpenBase], before: StoredTensor, after: StoredTensor) -> bool:
    """Tells whether two tensors are equal bit for bit; stops at the first block that differs."""
    if (before.spec.dtype, before.spec.shape) != (after.spec.dtype, after.spec.shape):
        return False
    sources = [
        model.open(model.checkpoint.uri(item.file))
        for model, item in zip(models, (before, after), strict=True)
    ]
    for start in range(0, before.nbytes, _COMPARED_BYTES):
        size = min(_COMPARED_BYTES, before.nbytes - start)
        if sources[0].read(before.offset + start, size) != sources[1].read(after.offset + start, size):
            return False
    return True


def _refuse(plan: ExtractPlan, options: ExtractOptions, tuned: Path) -> None:
    if not plan.matrices and not plan.full and not plan.inexpressible and not plan.left:
        raise MismatchError.of(
            "equal",
            "no tensor of the tuned model differs from the base.",
            file=str(tuned),
            remedy="Give the tuned model second, after its base.",
        )
    if plan.inexpressible and not options.allow_lossy:
        raise LossyError(
            *(
                Problem(
                    kind="inexpressible",
                    loc=name,
                    message=f"it changed, but no adapter can carry it: {reason}.",
                    remedy="Give --leave-out for it, or --allow-lossy, if it may be lost." if i == 0 else "",
                )
                for i, (name, reason) in enumerate(plan.inexpressible[:_SHOWN])
            )
        )
    if not plan.matrices and not plan.full:
        raise MismatchError.of(
            "nothing-left",
            "every change was left out, so the adapter would be empty.",
            file=str(tuned),
            loc="--leave-out",
            remedy="Leave less out.",
        )


class _Work:
    """Approximates the matrices of a plan."""

    def __init__(
        self,
        models: tuple[OpenBase, OpenBase],
        plan: ExtractPlan,
        options: ExtractOptions,
        tensors: Tensors,
        progress: Progress,
    ) -> None:
        from adapterhub_tools.engine.run import default_threads

        self.models, self.plan, self.options = models, plan, options
        self.tensors, self.progress = tensors, progress
        self.threads = options.threads or default_threads()
        self.dtype = DTYPE_NAMES[options.dtype]

    def run(self) -> tuple[list[TargetModule], list[ModuleReport]]:
        """Returns the modules and their reports; a matrix with the same values in another dtype has none."""
        from adapterhub_tools.engine.workers import in_order

        ranks = self._ranks()
        matrices = self.plan.matrices
        self.progress.start("extracting", sum(self._nbytes(matrix) for matrix in matrices))
        found = list(in_order(lambda m: self._module(m, ranks.get(m.path)), matrices, self.threads))
        self.progress.finish()
        pairs = [pair for pair in found if pair is not None]
        self.plan.unchanged += len(found) - len(pairs)
        if not pairs and not self.plan.full:
            raise MismatchError.of(
                "equal",
                "the models hold the same values in different dtypes.",
                file=str(self.models[1].checkpoint.root),
                remedy="Give the tuned model second, after its base.",
            )
        return [module for module, _ in pairs], [report for _, report in pairs]

    def _difference(self, matrix: Matrix) -> RowBlocks:
        from adapterhub_tools.engine.row_blocks import Difference, held

        base, tuned = self.models
        rows = tuned.stored_rows(matrix.tuned_tensor), base.stored_rows(matrix.base_tensor)
        return held(Difference(*rows), self.threads)

    def _module(self, matrix: Matrix, rank: int | None) -> tuple[TargetModule, ModuleReport] | None:
        from adapterhub_tools.ops.to_lora import low_rank_module

        source = self._difference(matrix)
        ranked = approximate(source, self.options.policy, rank=rank, seed=self.options.seed)
        self.progress.advance(self._nbytes(matrix))
        if ranked.approximation.total == 0.0:
            return None
        return low_rank_module(
            source,
            ranked,
            path=matrix.path,
            kind=matrix.kind,
            shape=matrix.shape,
            rank_before=None,
            dtype=self.dtype,
            tensors=self.tensors,
        )

    def _ranks(self) -> dict[str, int]:
        policy, matrices = self.options.policy, self.plan.matrices
        if policy.name == "rank":
            return self._fixed_ranks()
        if policy.budget is None or not matrices:
            return {}
        from adapterhub_tools.engine.workers import in_order
        from adapterhub_tools.linalg.randomized_svd import randomized_svd

        budget = policy.budget
        unit = DTYPE_BITS[self.dtype] / 8 if budget.unit == "bytes" else 1
        costs = [unit * (_rows(matrix) + _columns(matrix)) for matrix in matrices]
        if budget.unit == "share":
            amount = budget.amount * sum(_rows(matrix) * _columns(matrix) for matrix in matrices)
        else:
            carried = [tensor.spec for _, _, tensor in self.plan.full]
            amount = budget.amount - sum(s.nbytes if budget.unit == "bytes" else s.elements for s in carried)
        most = max(1, int(BUDGET_REACH * amount / sum(costs)))

        def spectrum(matrix: Matrix) -> list[float]:
            self.progress.advance(self._nbytes(matrix))
            found = randomized_svd(
                self._difference(matrix),
                min(most, _rows(matrix), _columns(matrix)),
                seed=self.options.seed,
            )
            return [float(value) for value in found.svd.s]

        self.progress.start("reading spectra", sum(self._nbytes(matrix) for matrix in matrices))
        spectra = list(in_order(spectrum, matrices, self.threads))
        self.progress.finish()
        claims = [Claim(values=values, cost=cost) for values, cost in zip(spectra, costs, strict=True)]
        return {m.path: rank for m, rank in zip(matrices, allot(claims, amount), strict=True)}

    def _fixed_ranks(self) -> dict[str, int]:
        matrices = self.plan.matrices
        if not matrices:
            return {}
        asked = self.options.policy.fixed_ranks([matrix.path for matrix in matrices])
        ranks = {path: rank for path, rank in asked.items() if rank is not None}
        missing = [path for path, rank in asked.items() if rank is None]
        if missing:
            raise MismatchError.of(
                "rank",
                f"{len(missing)} changed matrices have no rank, the first is {missing[0]}.",
                loc="--rank",
                remedy="Give a rank for all besides the patterns, or leave them out with --leave-out.",
            )
        largest = max(min(_rows(matrix), _columns(matrix)) for matrix in matrices)
        if min(ranks.values()) > largest:
            raise MismatchError.of(
                "rank",
                f"rank {min(ranks.values())} is larger than every matrix; the largest has {largest}.",
                loc="--rank",
                remedy=f"Give a rank of at most {largest}.",
            )
        return {m.path: min(ranks[m.path], _rows(m), _columns(m)) for m in matrices}

    def _nbytes(self, matrix: Matrix) -> int:
        return self.models[1].checkpoint.tensors[matrix.tuned_tensor].nbytes


def _rows(matrix: Matrix) -> int:
    return matrix.shape[0]


def _columns(matrix: Matrix) -> int:
    size = 1
    for axis in matrix.shape[1:]:
        size *= axis
    return size


def _draft(
    models: tuple[OpenBase, OpenBase],
    plan: ExtractPlan,
    options: ExtractOptions,
    tensors: Tensors,
    modules: list[TargetModule],
    reports: list[ModuleReport],
) -> tuple[LowRankReport, Draft]:
    base, tuned = (model.checkpoint for model in models)
    full = []
    for name, role, stored in plan.full:
        source = models[1].open(tuned.uri(stored.file))
        tensors.contents[name] = StoredContent(source=source, offset=stored.offset, nbytes=stored.nbytes)
        spec = TensorSpec(name=name, dtype=stored.spec.dtype, shape=stored.spec.shape)
        full.append(FullTensor(target=name, role=role, tensor=spec))
    adapter = Adapter(
        dialect="peft",
        method="lora",
        hparams={},
        modules=tuple(sorted(modules, key=lambda module: module.path)),
        full=tuple(full),
        unparsed={"config": {"task_type": task_of(tuned)}},
    )
    # As it will be written: the targets of its config are what the fit compares with the base.
    written = registry.load("dialects", "peft").write(adapter, base_modules=plan.modules)
    fitted = fit(written.adapter, base)
    fitted.raise_for_problems()
    known, warnings = identify_base(_named(base), base, fitted, cache=True, progress=None)
    adapter = replace(adapter, base=known)
    kept = [(name, f"carried in full ({role})") for name, role, _ in plan.full]
    kept += plan.left + [(name, f"left out: {reason}") for name, reason in plan.inexpressible]
    notes = [f"{plan.unchanged} tensors are equal in both models", *fitted.notes, *warnings]
    report = LowRankReport(
        operation="extract",
        out=None,
        dry_run=options.dry_run,
        modules=tuple(reports),
        kept=tuple(kept),
        parameters_before=None,
        parameters=adapter.parameters,
        nbytes=0,
        digest=None,
        config={},
        notes=tuple(notes),
    )
    totals = report.totals
    digests, _ = tensor_digests(tuned, algorithm=DEFAULT)
    history = history_entry(
        "extract",
        inputs=[
            HistoryInput(role="base", digest=str(known.digest)),
            HistoryInput(role="tuned", digest=root_digest(DEFAULT, digests)),
        ],
        options={
            **options.policy_options,
            "dtype": options.dtype,
            "leave_out": list(options.leave_out),
            "allow_lossy": options.allow_lossy,
            "seed": options.seed,
        },
        figures={"energy": totals.energy, "error": totals.error, "worst_error": totals.worst[0]},
    )
    draft = Draft(
        adapter=adapter,
        contents=tensors.contents,
        history=history,
        base_modules=plan.modules,
    )
    return report, draft


def _named(base: Checkpoint) -> BaseRef:
    """Returns the base as its config names it."""
    name = (base.config or {}).get("_name_or_path")
    return BaseRef(id=name if isinstance(name, str) and name else None)
