"""Checks tensors that no delta changes: copied, cast, replaced; and by recomputing what the rest does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.buffers import load_whole, matrix_shape, memory_of, torch_dtype
from adapterhub_tools.engine.check_points import round_block, spacing
from adapterhub_tools.engine.formula import formula
from adapterhub_tools.linalg.formats import FORMATS
from adapterhub_tools.linalg.rounding import BlockRounder
from adapterhub_tools.model.protocols import OpenSource

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.plan import ByteRange, Step

_PIECE = 4 << 20
_ROWS_BYTES = 3 << 20
"""Bytes of float64 rows at a time: not what a merge takes, so that its blocks are not repeated."""

Opener = Callable[[str], OpenSource]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How a tensor differs from what it should be.

    Attributes:
        count: how many values (or bytes, where the dtype is not computed with).
        index: the flat index of the first.
        largest: the largest number of representable values between the two.
        steps: where it was recomputed, the largest difference in units in the last place of the largest
            number that entered.
    """

    count: int
    index: int
    largest: int
    steps: float = 0.0


def bytes_differ(first: ByteRange, second: ByteRange, open_source: Opener) -> Difference | None:
    """Compares two tensors of one dtype and shape byte by byte; None if they are equal."""
    left, right = open_source(first.uri), open_source(second.uri)
    count, index, largest = 0, -1, 0
    size = max(1, first.spec.nbytes // max(1, first.spec.elements))
    for at in range(0, first.spec.nbytes, _PIECE):
        length = min(_PIECE, first.spec.nbytes - at)
        pieces = []
        for source, item in ((left, first), (right, second)):
            raw = torch.empty(length, dtype=torch.uint8)
            source.read_into(memory_of(raw), item.offset + at)
            pieces.append(raw)
        if torch.equal(pieces[0], pieces[1]):
            continue
        kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        values = [_places(piece.view(kind)) for piece in pieces]
        wrong = torch.nonzero(values[0] != values[1])
        if index < 0:
            index = at // size + int(wrong[0])
        count += len(wrong)
        largest = max(largest, int((values[0] - values[1]).abs().max()))
    return None if index < 0 else Difference(count=count, index=index, largest=largest)


def cast_differs(start: ByteRange, merged: ByteRange, open_source: Opener) -> Difference | None:
    """Compares a tensor with another's values rounded once to its dtype."""
    elements = start.spec.elements
    kinds = [torch_dtype(item.spec.dtype) for item in (start, merged)]
    count, index = 0, -1
    step = _PIECE // 8
    for at in range(0, elements, step):
        number = min(step, elements - at)
        values = []
        for item, kind in zip((start, merged), kinds, strict=True):
            raw = torch.empty(number * kind.itemsize, dtype=torch.uint8)
            open_source(item.uri).read_into(memory_of(raw), item.offset + at * kind.itemsize)
            values.append(raw.view(kind).double())
        expected, found = round_block(values[0], merged.spec.dtype), values[1]
        same = (expected == found) & (torch.signbit(expected) == torch.signbit(found))
        same |= torch.isnan(expected) & torch.isnan(found)
        wrong = torch.nonzero(~same)
        if len(wrong) and index < 0:
            index = at + int(wrong[0])
        count += len(wrong)
    return None if index < 0 else Difference(count=count, index=index, largest=0)


def recomputed_differs(step: Step, merged: ByteRange, open_source: Opener, device: str) -> Difference | None:
    """Compares a tensor with what merge's own arithmetic gives in other blocks, replaced rows included."""
    rows, columns = matrix_shape(step.output.shape)
    start_dtype, out_dtype = torch_dtype(step.start.spec.dtype), torch_dtype(merged.spec.dtype)
    rounder = BlockRounder(
        formula(step, open_source),
        columns=columns,
        start=FORMATS[step.start.spec.dtype],
        to=FORMATS[merged.spec.dtype],
        device=device,
        keep_non_finite=step.action == "cast",
    )
    patch = _patch(step, merged.spec.dtype, open_source)
    per_block = max(1, _ROWS_BYTES // max(1, 8 * columns))
    count, index, largest, steps = 0, -1, 0, 0.0
    for first in range(0, rows, per_block):
        number = min(per_block, rows - first)
        w, found = (
            _rows(open_source(item.uri), item, kind, first, number, columns)
            for item, kind in ((step.start, start_dtype), (merged, out_dtype))
        )
        expected = torch.empty(found.shape, dtype=out_dtype)
        if rounder.round_rows(w, expected, first) is not None:
            return Difference(count=number * columns, index=first * columns, largest=0, steps=inf)
        for row, values in patch.items():
            if first <= row < first + number:
                expected[row - first] = values
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[out_dtype.itemsize]
        places = [_places(block.view(kind).reshape(-1)) for block in (expected, found)]
        wrong = torch.nonzero(places[0] != places[1])
        if len(wrong):
            index = first * columns + int(wrong[0]) if index < 0 else index
            largest = max(largest, int((places[0] - places[1]).abs().max()))
            steps = max(steps, _steps(w.double(), expected.double(), found.double(), merged.spec.dtype))
        count += len(wrong)
    if index < 0:
        return None
    return Difference(count=count, index=index, largest=largest, steps=steps)


def _steps(base: Tensor, expected: Tensor, found: Tensor, dtype: str) -> float:
    entered = torch.maximum(torch.maximum(base.abs(), expected.abs()), found.abs())
    steps = (expected - found).abs() / spacing(entered, dtype)
    return float(steps.nan_to_num(nan=inf).max())


def _rows(
    source: OpenSource, item: ByteRange, dtype: torch.dtype, first: int, number: int, columns: int
) -> Tensor:
    size = columns * dtype.itemsize
    raw = torch.empty(number * size, dtype=torch.uint8)
    if raw.numel():
        source.read_into(memory_of(raw), item.offset + first * size)
    return raw.view(dtype).view(number, columns)


def _patch(step: Step, dtype: str, open_source: Opener) -> dict[int, Tensor]:
    if step.patch is None:
        return {}
    item = step.patch.source
    values = round_block(load_whole(open_source(item.uri), item).double(), dtype).to(torch_dtype(dtype))
    return dict(zip(step.patch.rows, values, strict=True))


def _places(bits: Tensor) -> Tensor:
    """Returns the place of each value in the dtype's ordering, for signed integers that hold its bits."""
    width = 8 * bits.element_size()
    wide = bits.to(torch.int64)
    return torch.where(wide < 0, ~(wide & ((1 << (width - 1)) - 1)), wide)
