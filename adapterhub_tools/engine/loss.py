"""Measures before a merge how much of its change the output will hold, see model/loss.py.

The weights are read, merged and rounded as the merge does it, and compared with the unrounded ones in
float64; nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from adapterhub_tools import registry
from adapterhub_tools.engine.buffers import matrix_shape, torch_dtype
from adapterhub_tools.engine.sources import Sources
from adapterhub_tools.engine.step_rows import StepRows
from adapterhub_tools.engine.workers import in_order
from adapterhub_tools.linalg.rounding import BLOCK_ELEMENTS
from adapterhub_tools.model.loss import Loss, LossReport

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.plan import Plan, Step
    from adapterhub_tools.model.protocols import OpenSource, Progress

SAMPLE_VALUES = 1 << 16
"""Values of each tensor that a sample holds, about."""
_PIECES = 4
_ALIGNED_ROWS = 64
"""A sample begins at a multiple of so many rows, which is the start of a block of any quantised format."""


def measure_loss(
    plan: Plan,
    sources: Mapping[str, Callable[[], OpenSource]],
    *,
    sampled: bool,
    threads: int,
    device: str,
    progress: Progress,
) -> LossReport:
    """Compares what a plan would write with the unrounded values, for every tensor that is computed.

    Args:
        plan: what would be done.
        sources: uri -> how to open it.
        sampled: True for about SAMPLE_VALUES of each tensor, in evenly spaced rows; False for all.
        threads: the number of workers.
        device: where products are evaluated.
        progress: told the bytes read.

    Raises:
        FormatError: NaN or infinity in an input.
        LossyError: a result overflows the output's dtype.
        StoreError: an input cannot be read or has changed.
    """
    steps = [step for step in plan.steps if step.action == "merge" and step.terms]
    with Sources(lambda uri: sources[uri]()) as opened:
        progress.start("measuring", sum(_sample_bytes(step, sampled) for step in steps))
        found = in_order(
            lambda step: _of_step(step, opened.open, sampled, device, progress.advance), steps, threads
        )
        tensors = {step.output.name: loss for step, loss in zip(steps, found, strict=True)}
        opened.check_unchanged()
        progress.finish()
    return LossReport(sampled=sampled and any(map(_is_partial, steps)), tensors=tensors)


def _of_step(
    step: Step,
    open_source: Callable[[str], OpenSource],
    sampled: bool,
    device: str,
    advance: Callable[[int], None],
) -> Loss:
    rows = StepRows(step, open_source, device)
    pieces = list(_pieces(step, sampled))
    written = _written(step, rows, pieces)
    total = Loss()
    for first, count in pieces:
        start = rows.start(first, count)
        advance(start.nbytes)
        out = written(rows.rounded(start, first))
        total += _compare(
            *rows.computed(first, (start.double(), rows.exact(start, first), out.double())),
        )
    return total


def _written(step: Step, rows: StepRows, pieces: Sequence[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
    """Returns what turns rounded rows, taken in order, into the values that a model has of the output.

    Quantised rows are those of a quantiser that sees these rows alone: of a sample, scales that are quantised
    as well differ a little.
    """
    if step.packed is None:
        return lambda out: out
    dtype = torch_dtype(step.output.dtype)
    shape = (sum(count for _, count in pieces), rows.columns)
    codec = registry.load("quant", step.packed.scheme.format).IMPLEMENTATION
    loader = codec.loader(step.packed.scheme, shape, dtype)
    if loader.needs_pass:
        for first, count in pieces:
            loader.observe(rows.rounded(rows.start(first, count), first))
    loader.close()
    taken, seen = 0, torch_dtype(step.start.spec.dtype)

    def dequantised(out: Tensor) -> Tensor:
        nonlocal taken
        taken += out.shape[0]
        made: Tensor = loader.dequantized(out, taken - out.shape[0], seen)
        return made

    return dequantised


def _compare(old: Tensor, new: Tensor, written: Tensor) -> Loss:
    """Returns the loss of some rows, all in float64: W, W' and W'_q; the first and last are overwritten."""
    exact = new.reshape(-1)
    error = written.reshape(-1).sub_(exact)
    delta = old.reshape(-1).sub_(exact).neg_()
    size = float(delta @ delta)
    return Loss(
        values=delta.numel(),
        delta=size,
        kept=size + float(delta @ error),
        error=float(error @ error),
        merged=float(exact @ exact),
    )


def _pieces(step: Step, sampled: bool) -> Iterator[tuple[int, int]]:
    """Yields (first row, rows) of what is compared."""
    rows, columns = matrix_shape(step.start.spec.shape)
    size = max(1, BLOCK_ELEMENTS // max(1, columns))
    if not sampled or not _is_partial(step):
        for first in range(0, rows, size):
            yield first, min(size, rows - first)
        return
    count, every = _spacing(rows, columns)
    for begin in range(0, rows, every):
        end = min(begin + count, rows)
        for first in range(begin, end, size):
            yield first, min(size, end - first)


def _spacing(rows: int, columns: int) -> tuple[int, int]:
    """Returns how many rows a sample takes, and the distance from one to the next."""
    wanted = max(1, SAMPLE_VALUES // max(1, columns))
    count = max(1, wanted // _PIECES)
    every = rows * count // wanted
    return count, max(_ALIGNED_ROWS, every - every % _ALIGNED_ROWS)


def _is_partial(step: Step) -> bool:
    """Says whether a sample of a tensor is less than the tensor."""
    rows, columns = matrix_shape(step.start.spec.shape)
    if rows * columns <= 2 * SAMPLE_VALUES:
        return False
    count, every = _spacing(rows, columns)
    return count < every


def _sample_bytes(step: Step, sampled: bool) -> int:
    spec = step.start.spec
    width = spec.nbytes // max(1, spec.elements)
    return sum(count for _, count in _pieces(step, sampled)) * matrix_shape(spec.shape)[1] * width
