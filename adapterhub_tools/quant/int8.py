"""int8 of bitsandbytes, LLM.int8(): 127ths of a scale for each output, its largest magnitude.

A weight is quantised from float16 and without the threshold: outliers are features of the input, for which a
layer multiplies with the same weights, dequantised. So the weights that an adapter saw are those stored.

Source: Dettmers et al. 2022, arXiv:2208.07339; bitsandbytes 0.50.2, ``functional.int8_vectorwise_quant`` and
``int8_vectorwise_dequant``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.errors import FormatError, Problem
from adapterhub_tools.model.quant_parts import part_problems, wrong_part
from adapterhub_tools.model.quant_scheme import QuantizedTensor, QuantScheme
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.quant._code_book import PIECE
from adapterhub_tools.quant._parts import damaged, flat_bounds, non_finite

if TYPE_CHECKING:
    from torch import Tensor

_STEP = 7.874015718698502e-3
"""What the library multiplies with for a division by 127."""
_BEYOND = " or beyond float16, which int8 weights are quantised from"


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """The format; it has no parameters."""

    def check(self, tensor: QuantizedTensor) -> tuple[Problem, ...]:
        """Returns what is wrong with the dtypes and shapes of a weight's parts."""
        return part_problems(tensor)

    def scales(self, tensor: QuantizedTensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns the scale of every output, float32 (out,).

        Args:
            tensor: the weight.
            parts: all but ``"data"``, flat, in their own dtypes.

        Raises:
            FormatError: a scale that is not finite, or a weight that is not stored row by row.
        """
        layout = parts.get("weight_format")
        if layout is not None and int(layout.view(-1)[0]) != 0:
            found = f"the layout is number {int(layout.view(-1)[0])}"
            raise FormatError(wrong_part(tensor, "weight_format", found, "0, row by row"))
        scales = parts["scales"].view(-1).to(torch.float32)
        if not bool(torch.isfinite(scales).all()):
            raise damaged(tensor, int((~torch.isfinite(scales)).nonzero()[0]))
        return scales

    def data_range(self, tensor: QuantizedTensor, first_row: int, rows: int) -> tuple[int, int]:
        """Returns (offset, number of bytes) in ``"data"`` of some rows."""
        begin, end = flat_bounds(tensor.spec.shape, first_row, rows)
        return begin, end - begin

    def dequantize(
        self,
        tensor: QuantizedTensor,
        data: Tensor,
        scales: Tensor,
        first_row: int,
        rows: int,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Returns rows of the weight: stored value · scale · (1 / 127), two products in binary32.

        Args:
            tensor: the weight.
            data: uint8, the bytes of ``data_range``.
            scales: of every output.
            first_row: the first of the rows.
            rows: how many.
            dtype: bfloat16, float16, float32 or float64; the last two hold the product as it is.
            out: where to write them, contiguous (rows, columns).

        Returns:
            (rows, columns) of ``dtype``.

        Memory: 1 MiB beside the result.
        """
        values = data.view(torch.int8).view(rows, prod(tensor.spec.shape[1:]))
        return _dequantized(values, scales[first_row : first_row + rows, None], dtype, out)

    def encoder(self, scheme: QuantScheme, shape: tuple[int, ...], dtype: torch.dtype) -> Int8Encoder:
        """Returns what quantises a weight that comes in rows of ``dtype``, (out, in) in all."""
        return Int8Encoder(scheme, shape, dtype)

    def loader(
        self, scheme: QuantScheme, shape: tuple[int, ...], dtype: torch.dtype, *, transposed: bool = False
    ) -> Int8Loader:
        """Returns what quantises a weight and dequantises it at once, as a model that is loaded so has it.

        Args:
            scheme: how.
            shape: of the weight as stored.
            dtype: of the rows: bfloat16, float16 or float32.
            transposed: whether the weight is stored as (in, out).
        """
        return Int8Loader(scheme, shape, dtype, transposed=transposed)


class Int8Encoder:
    """Takes all rows of one weight in order, gives their bytes, then the scales."""

    def __init__(self, scheme: QuantScheme, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Takes what ``Int8.encoder`` describes."""
        self._scheme, self._shape, self._dtype = scheme, shape, dtype
        self._scales: list[Tensor] = []
        self._seen = 0

    def add(self, rows: Tensor) -> Tensor:
        """Takes the next rows, (n, columns).

        Returns:
            uint8, the bytes of their int8 values.

        Raises:
            FormatError: a value that is not finite in float16.
        """
        half = rows.to(torch.float16)
        scales = _row_scales(half, self._seen)
        self._scales.append(scales)
        self._seen += rows.shape[0]
        return _quantized(half, scales[:, None]).view(torch.uint8).view(-1)

    def finish(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Ends the weight.

        Returns:
            No bytes, and the other parts by role.
        """
        scales = torch.cat(self._scales) if self._scales else torch.empty(0)
        parts = {"scales": scales, "weight_format": torch.zeros(1, dtype=torch.uint8)}
        return torch.empty(0, dtype=torch.uint8), parts

    def part_specs(self, name: str) -> dict[str, TensorSpec]:
        """Returns name, dtype and shape of every part of the weight called ``name``, by role."""
        module = name.removesuffix("weight")
        return {
            "data": TensorSpec(name=name, dtype="I8", shape=self._shape),
            "scales": TensorSpec(name=f"{module}SCB", dtype="F32", shape=self._shape[:1]),
            "weight_format": TensorSpec(name=f"{module}weight_format", dtype="U8", shape=()),
        }


class Int8Loader:
    """Quantises rows and dequantises them at once.

    A weight that is stored as (in, out) has its scales along its columns: give all rows to ``observe`` first,
    then call ``close``.

    Attributes:
        needs_pass: whether ``observe`` and ``close`` come first.
        row_unit: 1, chunks may be cut anywhere.
    """

    row_unit = 1

    def __init__(
        self, scheme: QuantScheme, shape: tuple[int, ...], dtype: torch.dtype, *, transposed: bool
    ) -> None:
        """Takes what ``Int8.loader`` describes."""
        self._scheme, self._dtype = scheme, dtype
        self.needs_pass = transposed
        self._largest = torch.zeros(prod(shape[1:]) if transposed else 0, dtype=torch.float16)

    def observe(self, rows: Tensor) -> None:
        """Takes the next rows, (n, columns), for the scales of the columns."""
        if rows.shape[0]:
            self._largest = torch.maximum(self._largest, rows.to(torch.float16).abs().amax(dim=0))

    def close(self) -> None:
        """Ends the pass over all rows.

        Raises:
            FormatError: a value that is not finite in float16.
        """
        _refuse_non_finite(self._largest, 0)

    def dequantized(
        self, rows: Tensor, first_row: int, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Returns rows as the loaded model has them; thread-safe once ``close`` was called.

        Args:
            rows: (n, columns), as stored, in the dtype that was announced.
            first_row: the first of the rows.
            dtype: bfloat16, float16, float32 or float64.
            out: where to write them, contiguous (n, columns); may be ``rows`` itself where it has ``dtype``.

        Raises:
            FormatError: a value that is not finite in float16.
        """
        half = rows.to(torch.float16)
        scales = self._largest.to(torch.float32) if self.needs_pass else _row_scales(half, first_row)[:, None]
        return _dequantized(_quantized(half, scales), scales, dtype, out)


def _row_scales(half: Tensor, first_row: int) -> Tensor:
    """Returns the largest magnitude of each row, float32 (n,)."""
    if half.shape[1] == 0:
        return torch.zeros(half.shape[0])
    largest = half.abs().amax(dim=1)
    _refuse_non_finite(largest, first_row)
    return largest.to(torch.float32)


def _refuse_non_finite(largest: Tensor, first: int) -> None:
    finite = torch.isfinite(largest)
    if not bool(finite.all()):
        raise non_finite("", first + int((~finite).nonzero()[0]), _BEYOND)


def _quantized(half: Tensor, scales: Tensor) -> Tensor:
    """Returns round(value · (127 / scale)) in binary32, ties to even, as int8; 0 where the scale is 0.

    Args:
        half: float16 (n, columns).
        scales: float32, (n, 1) or (columns,).
    """
    factors = torch.where(scales == 0, 0.0, 127.0 / scales)
    out = torch.empty(half.shape, dtype=torch.int8)
    for rows in _pieces(half):
        out[rows] = (half[rows] * (factors[rows] if scales.dim() == 2 else factors)).round_().to(torch.int8)
    return out


def _dequantized(values: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    if out is None:
        out = torch.empty(values.shape, dtype=dtype)
    for rows in _pieces(values):
        product = values[rows] * (scales[rows] if scales.dim() == 2 else scales)
        out[rows] = product.mul_(_STEP)
    return out


def _pieces(matrix: Tensor) -> Iterator[slice]:
    """Cuts rows so that a piece fits the processor's cache."""
    step = max(1, PIECE // max(1, matrix.shape[1]))
    for first in range(0, matrix.shape[0], step):
        yield slice(first, first + step)


IMPLEMENTATION = Int8()
