"""Whether a merge says how much of the change its output holds, and what is refused for it."""

from __future__ import annotations

from adapterhub_tools.errors import LossyError
from adapterhub_tools.model.loss import SURVIVAL_LIMIT, Loss, LossReport
from adapterhub_tools.model.protocols import Progress
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_plan import MergePlan

_DOUBTFUL = 0.1
"""A sample so near the limit, or below it, does not decide: all values are compared then."""


def measured_loss(
    planned: MergePlan,
    options: MergeOptions,
    *,
    remote: bool,
    quantised: bool,
    threads: int,
    device: str,
    progress: Progress,
) -> LossReport | None:
    """Measures the loss where it was asked for, in a dry run, and where the output is quantised.

    Args:
        planned: what would be written.
        options: ``loss`` says how; without it a sample is taken in a dry run and for a quantised output,
            for the latter also if it is ``"off"`` but ``allow_loss`` is not given.
        remote: True if the base comes over a network; a dry run does not read it unless it was asked to.
        quantised: True if the output is quantised.
        threads: the number of workers.
        device: where products are evaluated.
        progress: told the bytes read.

    Returns:
        The report, or None where nothing was measured.

    Raises:
        LossyError: less than half of the change survives in a quantised output, and that was not allowed.
    """
    kind = options.loss
    if kind is None:
        kind = "sampled" if quantised or (options.dry_run and not remote) else "off"
    deciding = quantised and not options.allow_loss
    if kind == "off" and deciding:
        kind = "sampled"
    if kind == "off":
        return None
    from adapterhub_tools.engine.loss import measure_loss

    def measure(*, sampled: bool) -> LossReport:
        return measure_loss(
            planned.plan,
            planned.sources,
            sampled=sampled,
            threads=threads,
            device=device,
            progress=progress,
        )

    report = measure(sampled=kind == "sampled")
    if not deciding:
        return report
    if report.sampled and _below(report.total, SURVIVAL_LIMIT + _DOUBTFUL):
        report = measure(sampled=False)
    if _below(report.total, SURVIVAL_LIMIT):
        raise _too_lossy(report)
    return report


def _below(loss: Loss, limit: float) -> bool:
    return loss.survival is not None and loss.survival < limit


def _too_lossy(report: LossReport) -> LossyError:
    known = {name: loss for name, loss in report.tensors.items() if loss.survival is not None}
    worst = min(known, key=lambda name: known[name].survival or 0.0)
    return LossyError.of(
        "change-lost",
        f"{report.total.survival:.2%} of the change would survive quantisation, expected at least "
        f"{SURVIVAL_LIMIT:.0%}; least of all here, {known[worst].survival:.2%}.",
        loc=worst,
        remedy="Merge --onto dequantized, which keeps the change, or accept the loss with --allow-loss.",
    )
