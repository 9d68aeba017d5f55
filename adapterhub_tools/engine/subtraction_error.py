"""How far from the base weights a subtraction comes: how many are expected to be wrong, and by how much.

Rounding W' = round(W + Δ) lost e with |e| <= u'/2, so that y = W' − Δ = W + e, and what is written is
round(y). With the spacings u of W and u' of W':

- u' > u: the grid of W has u'/u points in reach, each as likely as the others: wrong with 1 − u/u';
- u' = u: right, but where y lies halfway between two points. Then W was either of them: wrong with 1/2. That
  is rare unless Δ is a multiple of u/2, as sums of products of narrow factors are beside wide weights;
- u' < u: always right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.sources import Sources
from adapterhub_tools.engine.step_rows import StepRows
from adapterhub_tools.engine.workers import in_order
from adapterhub_tools.linalg.formats import FORMATS

if TYPE_CHECKING:
    from adapterhub_tools.model.plan import Plan, Step
    from adapterhub_tools.model.protocols import OpenSource, Progress

_NEAR = 2.0**-16
"""How near to halfway, in units of the spacing, counts as halfway: float64 cannot tell them apart."""


def subtraction_error(
    plan: Plan,
    sources: Mapping[str, Callable[[], OpenSource]],
    *,
    threads: int,
    device: str,
    progress: Progress,
) -> tuple[int, float]:
    """Returns how many weights are expected to be wrong, and a bound on the error of each.

    Args:
        plan: of the subtraction; its start values are the merged weights.
        sources: uri -> how to open it.
        threads: the number of workers.
        device: where products are evaluated.
        progress: told the bytes read.

    Returns:
        The number, and the bound in units in the last place of what is written. That is large where a weight
        is small against its delta, because little of it was left in the merged one.

    Raises:
        FormatError: NaN or infinity in an input.
        LossyError: a result overflows the output's dtype.
        StoreError: an input cannot be read or has changed.
    """
    steps = [step for step in plan.steps if step.action == "merge"]
    with Sources(lambda uri: sources[uri]()) as opened:
        progress.start("estimating the error", sum(step.start.spec.nbytes for step in steps))
        found = list(in_order(lambda step: _of_step(step, opened.open, device, progress), steps, threads))
        opened.check_unchanged()
        progress.finish()
    return round(sum(wrong for wrong, _ in found)), max((largest for _, largest in found), default=0.0)


def _of_step(
    step: Step, open_source: Callable[[str], OpenSource], device: str, progress: Progress
) -> tuple[float, float]:
    rows = StepRows(step, open_source, device)
    form = FORMATS[step.output.dtype]
    lowest = form.min_exponent + form.precision  # of the smallest normal number, as frexp counts
    wrong, largest = 0.0, 0.0
    for first in range(0, rows.rows, rows.rows_at_once):
        start = rows.start(first, min(rows.rows_at_once, rows.rows - first))
        progress.advance(start.nbytes)
        if not start.numel():
            continue
        merged, exact = start.double(), rows.exact(start, first)
        written = rows.rounded(start, first).double()
        exponents = [torch.frexp(block)[1].clamp(min=lowest) for block in (merged, written)]
        # The exponent of zero says nothing; and a difference of exactly zero is a weight of zero.
        exponents[1][written == 0] = lowest
        ratio = torch.exp2((exponents[0] - exponents[1]).double())
        unit = torch.exp2((exponents[1] - form.precision).double())
        halfway = ((exact - written).abs() / unit - 0.5).abs() < _NEAR
        share = torch.where(ratio > 1, 1 - 1 / ratio, 0.5 * halfway * (ratio == 1))
        share[(merged == written) & ~halfway] = 0.0
        share[written == 0] = 0.0
        wrong += float(share.sum())
        largest = max(largest, float(ratio.max()) / 2 + 0.5)
    return wrong, largest
