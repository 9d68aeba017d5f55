"""A step's rows one piece at a time: as they are read, as the formula has them, and as they are rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.buffers import load_whole, matrix_shape, memory_of, torch_dtype
from adapterhub_tools.engine.formula import formula
from adapterhub_tools.engine.tensor_job import non_finite_error
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS
from adapterhub_tools.linalg.rounding import BlockRounder

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.plan import Step
    from adapterhub_tools.model.protocols import OpenSource

_PIECE_ELEMENTS = 1 << 21


class StepRows:
    """The rows of one step, for what needs more of them than the bytes that a merge writes.

    Args:
        step: what is done.
        open_source: uri -> the open file.
        device: where products are evaluated.

    Attributes:
        rows: the number of rows of the matrix.
        columns: the number of columns.
        rows_at_once: how many rows make a piece of a few MiB.
        resolved: how many values float64 could not decide, so far.
    """

    def __init__(self, step: Step, open_source: Callable[[str], OpenSource], device: str) -> None:
        """Loads the factors."""
        self._step, self._device = step, device
        self._source = open_source(step.start.uri)
        self._expression = formula(step, open_source)
        rows, columns = matrix_shape(step.start.spec.shape)
        self.rows: int = rows
        self.columns: int = columns
        self.rows_at_once: int = max(1, _PIECE_ELEMENTS // max(1, self.columns))
        self._start_dtype = torch_dtype(step.start.spec.dtype)
        self._out_dtype = torch_dtype(step.output.dtype)
        self._rounder = BlockRounder(
            self._expression,
            columns=self.columns,
            start=FORMATS[step.start.spec.dtype],
            to=FORMATS[step.output.dtype],
            device=device,
        )
        self._patch: dict[int, Tensor] = {}
        if step.patch is not None:
            values = load_whole(open_source(step.patch.source.uri), step.patch.source)
            rounded = torch.empty(values.shape, dtype=self._out_dtype)
            BlockRounder(
                DeltaSum((), int(values.shape[0])),
                columns=int(values.shape[1]),
                start=FORMATS[step.patch.source.spec.dtype],
                to=FORMATS[step.output.dtype],
            ).round_rows(values, rounded, 0)
            self._patch = dict(zip(step.patch.rows, rounded, strict=True))

    @property
    def resolved(self) -> int:
        """How many values float64 could not decide, so far."""
        return self._rounder.resolved

    def start(self, first: int, count: int) -> Tensor:
        """Returns rows as they are read, shape (count, columns).

        Raises:
            StoreError: they cannot be read.
        """
        row = self.columns * self._start_dtype.itemsize
        raw = torch.empty(count * row, dtype=torch.uint8)
        if raw.numel():
            self._source.read_into(memory_of(raw), self._step.start.offset + first * row)
        return raw.view(self._start_dtype).view(count, self.columns)

    def exact(self, start: Tensor, first: int) -> Tensor:
        """Returns what the formula makes of rows, in float64 on the CPU; replaced rows are not replaced."""
        block = start.to(self._device, torch.float64, copy=True)
        self._expression.evaluate(block, first)
        return block.cpu()

    def rounded(self, start: Tensor, first: int) -> Tensor:
        """Returns the rows of the result in the output's dtype.

        Raises:
            FormatError: a value that enters is not finite.
            LossyError: a result overflows.
        """
        out = torch.empty(start.shape, dtype=self._out_dtype)
        wrong = self._rounder.round_rows(start, out, first)
        if wrong is not None:
            raise non_finite_error(self._step, self._source.name, wrong)
        for row, values in self._patch.items():
            if first <= row < first + start.shape[0]:
                out[row - first] = values
        return out

    def computed(self, first: int, blocks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns of each block those rows that are computed, without the ones that are replaced."""
        count = int(blocks[0].shape[0])
        replaced = [row - first for row in self._patch if first <= row < first + count]
        if not replaced:
            return blocks
        keep = torch.ones(count, dtype=torch.bool)
        keep[replaced] = False
        return tuple(block[keep] for block in blocks)
