"""Checks a merged model: that every tensor is what base and adapters make of it, and why it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.engine.sources import Sources
from adapterhub_tools.errors import AdapterError, Problem, StoreError
from adapterhub_tools.model.plan import ByteRange, Step
from adapterhub_tools.model.protocols import OpenSource, Progress, SilentProgress
from adapterhub_tools.model.receipt import RECEIPT_FILE, Receipt
from adapterhub_tools.model.tensor import FLOAT_DTYPES
from adapterhub_tools.ops.adapter_digest import adapter_digest
from adapterhub_tools.ops.adapter_reader import read_adapter
from adapterhub_tools.ops.combine_plan import combined_parts
from adapterhub_tools.ops.device import device_name, device_of
from adapterhub_tools.ops.fit import fit
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.merge_plan import MergePlan, plan_merge
from adapterhub_tools.ops.option_checks import check_choice
from adapterhub_tools.ops.receipt_file import load_receipt
from adapterhub_tools.ops.verify_causes import REMEDY, add_whole, difference_text, wrong
from adapterhub_tools.ops.verify_claims import claim_problems, digest_problems
from adapterhub_tools.ops.verify_files import account_config, account_tokenizer
from adapterhub_tools.ops.verify_receipt import TENSOR_KINDS, onto_problem, verify_receipt
from adapterhub_tools.ops.verify_report import SAMPLES, TensorVerdict, VerifyOptions, VerifyReport
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from adapterhub_tools.engine.check_tensor import Pair

MOST_STEPS = 1.5
"""How far from the correctly rounded value a merge of another tool may be, in units in the last place of the
largest number that entered, beyond the half that rounding takes: sums in the dtype itself reach 1."""
MOST_STEPS_F32 = 8.0
"""The same for methods with norms or several products, where weights and arithmetic are both float32."""
_SHOWN = 40


def verify(
    base: Path,
    adapters: Sequence[Path],
    merged: Path,
    options: VerifyOptions,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compares a merged model with what its base and adapters make.

    Args:
        base: the base's folder or file.
        adapters: the adapters, in the order of their scales.
        merged: the merged model, made by this tool or another.
        options: see VerifyOptions.
        progress: told the bytes compared.

    Raises:
        AdapterError: the base or an adapter is broken, or they do not fit each other.
        StoreError: a file cannot be read.
        DeviceError: the device is not here.
    """
    check_choice("sample", options.sample, SAMPLES)
    device = device_of(options.device)
    shown = device_name(device)
    checkpoint = open_checkpoint(base)
    problems: list[Problem] = []
    try:
        result = open_checkpoint(merged)
        receipt = load_receipt(merged) if (merged / RECEIPT_FILE).is_file() else None
    except AdapterError as error:
        unread = isinstance(error, StoreError)
        return VerifyReport(
            path=str(merged),
            mode=options.sample,
            device=shown,
            tensors=(),
            problems=() if unread else error.problems,
            unchecked=error.problems if unread else (),
        )
    if receipt is not None and receipt.options.get("onto") is not None:
        return VerifyReport(
            path=str(merged),
            mode=options.sample,
            device=shown,
            tensors=(),
            problems=(),
            unchecked=(onto_problem(receipt),),
        )
    parts = _parts(adapters, checkpoint, receipt, options, problems)
    choice = None if receipt is None else receipt.combination
    parts = combined_parts(parts, choice)
    asked = MergeOptions(check_base="off", accept_embeddings=True, combination=choice)
    planned = plan_merge(checkpoint, parts, asked, lambda _: 0)
    config_problems, notes = account_config(checkpoint, result, planned)
    notes += account_tokenizer(checkpoint, result, parts)
    run = _Run(planned, result, receipt, options, device, progress or SilentProgress())
    tensors = run.all(problems)
    problems += config_problems
    if receipt is not None:
        told = replace(asked, dtype=receipt.options["dtype"])
        as_told = plan_merge(checkpoint, parts, told, lambda _: 0)
        problems += claim_problems(receipt, checkpoint, result, parts, as_told)
        if options.sample == "full":
            problems += digest_problems(receipt, checkpoint, planned, threads=options.threads)
            right = {tensor.name for tensor in tensors if tensor.ok}
            known = () if len(right) == len(tensors) else ("file-size",)
            changed = verify_receipt(merged, threads=options.threads, progress=None)
            # Of tensors that are wrong it is said already.
            kept = (p for p in changed.problems if p.kind not in TENSOR_KINDS or p.loc in right)
            problems += [problem for problem in kept if problem.kind not in known]
        else:
            notes.append("the digests in the receipt were not compared (--receipt or --sample full do)")
    if options.sample == "rows" and any(tensor.rows_checked < tensor.rows for tensor in tensors):
        notes.append(
            "sampled: a low bit that changed in a merged row outside the sample is not seen (1 % of the rows "
            "are compared value by value; --sample full compares all)"
        )
    recomputed = sum(tensor.arithmetic == "recomputed" for tensor in tensors)
    if recomputed:
        notes.append(
            f"{recomputed} tensors were compared with what merge's own arithmetic gives in other blocks, so "
            "that an error in it would not be seen there"
        )
    return VerifyReport(
        path=str(merged),
        mode=options.sample,
        device=shown,
        tensors=tensors,
        problems=tuple(problems),
        notes=tuple(notes),
        seed=run.seed,
        scales=tuple(part.scale for part in parts),
    )


def _parts(
    adapters: Sequence[Path],
    checkpoint: Checkpoint,
    receipt: Receipt | None,
    options: VerifyOptions,
    problems: list[Problem],
) -> list[Part]:
    opened = [read_adapter(path, accept_embeddings=True) for path in adapters]
    digests = [adapter_digest(item.files, item.adapter) for item in opened]
    recorded = [] if receipt is None else [(adapter.digest, adapter.scale) for adapter in receipt.adapters]
    named = [digest for digest, _ in recorded]
    scales = MergeOptions(scales=options.scales).scale_of_each(len(adapters))
    if not options.scales and receipt is not None:
        # An adapter may have been merged twice in one call, with two scales: then the order tells.
        known = dict(recorded)
        in_order = digests == named
        scales = tuple(
            recorded[i][1] if in_order else known.get(digest, 1.0) for i, digest in enumerate(digests)
        )
    if receipt is not None and sorted(digests) != sorted(named):
        problems.append(
            Problem(
                kind="receipt-adapter",
                message=f"the receipt names the adapters {', '.join(sorted(named))}; given are "
                f"{', '.join(sorted(digests))}.",
                file=RECEIPT_FILE,
                remedy="Give the adapters of the merge; or the receipt is that of another merge.",
            )
        )
    parts = []
    for item, path, scale in zip(opened, adapters, scales, strict=True):
        fitted = fit(item.adapter, checkpoint)
        fitted.raise_for_problems()
        parts.append(Part(opened=item, fit=fitted, scale=scale, label=path.name or str(path)))
    return parts


class _Run:
    """Checks all tensors, several at a time."""

    def __init__(
        self,
        planned: MergePlan,
        merged: Checkpoint,
        receipt: Receipt | None,
        options: VerifyOptions,
        device: str,
        progress: Progress,
    ) -> None:
        import secrets

        self._planned, self._merged, self._options, self._device = planned, merged, options, device
        # What adaptertool merged is correctly rounded or wrong.
        self._strict = receipt is not None and receipt.guarantee == "exact"
        self._progress = progress
        self.seed = secrets.randbits(32) if options.seed is None else options.seed
        sources = {**planned.sources, **{merged.uri(file): _opener(merged, file) for file in merged.files}}
        self._opened = Sources(lambda uri: sources[uri]())
        self._pairs: dict[str, Pair] = {}

    def all(self, problems: list[Problem]) -> tuple[TensorVerdict, ...]:
        from adapterhub_tools.engine.run import default_threads
        from adapterhub_tools.engine.workers import in_order

        steps = self._planned.plan.steps
        numbered = list(enumerate(steps))
        self._progress.start("verifying", sum(step.output.nbytes for step in steps))
        combining = any(step.combination is not None for step in steps)
        threads = self._options.threads or default_threads(combining=combining)
        threads = 1 if self._device != "cpu" else threads
        try:
            verdicts = list(in_order(self._one, numbered, threads))
            verdicts = [self._explained(verdict) for verdict in verdicts]
            self._opened.check_unchanged()
        finally:
            self._opened.close()
        self._progress.finish()
        names = {step.output.name for step in steps}
        for verdict in verdicts:
            if not verdict.ok:
                problems.append(
                    Problem(kind="tensor", message=f"{verdict.cause}.", loc=verdict.name, remedy=REMEDY)
                )
        for name, stored in self._merged.tensors.items():
            if name not in names:
                problems.append(
                    Problem(
                        kind="extra-tensor",
                        message="neither the base nor the adapters have it.",
                        file=stored.file,
                        loc=name,
                        remedy=REMEDY,
                    )
                )
        add_whole(verdicts, steps, problems)
        return tuple(verdicts)

    def _one(self, numbered: tuple[int, Step]) -> TensorVerdict:
        number, step = numbered
        self._progress.advance(step.output.nbytes)
        stored = self._merged.tensors.get(step.output.name)
        rows = step.output.shape[0] if step.output.shape else 1
        from adapterhub_tools.engine.check_experts import packed_by_name, packed_otherwise

        if stored is None:
            packed = packed_by_name(step.output.name, self._merged.tensors)
            return wrong(step, rows, f"it is missing{packed and f': {packed}'}")
        merged = ByteRange(uri=self._merged.uri(stored.file), offset=stored.offset, spec=stored.spec)
        if stored.spec.shape != step.output.shape:
            packed = "" if step.action != "copy" else packed_otherwise(step.start, merged, self._opened.open)
            found, expected = list(stored.spec.shape), list(step.output.shape)
            return wrong(step, rows, packed or f"its shape is {found}, expected {expected}")
        if step.terms or step.patch is not None:
            return self._changed(number, step, merged, rows)
        from adapterhub_tools.engine.check_bytes import bytes_differ, cast_differs

        if stored.spec.dtype == step.start.spec.dtype:
            verdict = "identical" if step.action == "copy" else "replaced"
            difference = bytes_differ(step.start, merged, self._opened.open)
        elif {stored.spec.dtype, step.start.spec.dtype} <= set(FLOAT_DTYPES):
            verdict, difference = "cast", cast_differs(step.start, merged, self._opened.open)
        else:
            return wrong(step, rows, f"it is {stored.spec.dtype}, expected {step.start.spec.dtype}")
        if difference is not None:
            if packed := packed_otherwise(step.start, merged, self._opened.open):
                return wrong(step, rows, packed)
            source = "the base's" if step.base_name is not None else "the adapter's"
            return wrong(step, rows, f"it is not {source} tensor: {difference_text(difference, step)}")
        return TensorVerdict(
            name=step.output.name, verdict=verdict, arithmetic="bytes", rows=rows, rows_checked=rows
        )

    def _changed(self, number: int, step: Step, merged: ByteRange, rows: int) -> TensorVerdict:
        import torch

        from adapterhub_tools.engine.check_bytes import recomputed_differs
        from adapterhub_tools.engine.check_scaled import is_scaled, scaled_differs
        from adapterhub_tools.engine.check_tensor import Pair, check_sum, is_own

        if merged.spec.dtype not in FLOAT_DTYPES:
            return wrong(step, rows, f"it is {merged.spec.dtype}, which is not a float")
        if not is_own(step) or step.patch is not None:
            own = is_scaled(step)
            most = MOST_STEPS if merged.spec.dtype != "F32" else MOST_STEPS_F32
            difference = (
                scaled_differs(step, merged, self._opened.open, self._device)
                if own
                else recomputed_differs(step, merged, self._opened.open, self._device)
            )
            arithmetic = "own" if own else "recomputed"
            right = "correctly rounded" if own else "recomputed"
            if difference is not None and (self._strict or difference.steps > most):
                self._keep(step, merged)
                cause = difference_text(difference, step)
                return replace(wrong(step, rows, cause), arithmetic=arithmetic, rows_checked=rows)
            return TensorVerdict(
                name=step.output.name,
                verdict=right if difference is None else "within k ulp",
                arithmetic=arithmetic,
                rows=rows,
                rows_checked=rows,
                steps=0.0 if difference is None else difference.steps,
            )
        pair = Pair(step, merged, self._opened.open, self._device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        check = check_sum(
            pair,
            sample=self._options.sample,
            generator=generator,
            strict=self._strict,
            most_steps=MOST_STEPS,
        )
        if check.verdict == "wrong":
            self._pairs[step.output.name] = pair
        return TensorVerdict(
            name=step.output.name,
            verdict=check.verdict,
            arithmetic="own",
            rows=rows,
            rows_checked=check.rows_checked,
            steps=check.steps if check.verdict == "within k ulp" else 0.0,
            cause="it is not the base plus the delta" if check.verdict == "wrong" else "",
        )

    def _keep(self, step: Step, merged: ByteRange) -> None:
        from adapterhub_tools.engine.check_tensor import Pair

        self._pairs[step.output.name] = Pair(step, merged, self._opened.open, self._device)

    def _explained(self, verdict: TensorVerdict) -> TensorVerdict:
        """Says why a wrong tensor is wrong; of very many, of the first ones."""
        pair = self._pairs.get(verdict.name)
        if verdict.ok or pair is None or list(self._pairs).index(verdict.name) >= _SHOWN:
            return verdict
        from adapterhub_tools.engine.diagnose import diagnose

        found = pair.check_all() if pair.products else None
        others = list(self._pairs.values())[:_SHOWN]
        return replace(verdict, cause=diagnose(pair, found, others))


def _opener(merged: Checkpoint, file: str) -> Callable[[], OpenSource]:
    return lambda: merged.open(file)
