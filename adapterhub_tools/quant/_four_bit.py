"""4-bit weights of bitsandbytes: their parts, and rows of weights from them.

A weight of shape (out, in) is one row-major sequence of values. Blocks of ``block_size`` follow each other in
it, across the ends of rows; the last may be short. A value is code book value · scale of its block, computed
in binary32 and rounded once to the dtype asked for. The first value of a byte has its high four bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.errors import FormatError, Problem
from adapterhub_tools.model.quant_parts import part_problems, wrong_part
from adapterhub_tools.model.quant_scheme import QuantizedTensor, QuantScheme
from adapterhub_tools.quant._code_book import PIECE, CodeBook
from adapterhub_tools.quant._four_bit_encoder import FourBitEncoder
from adapterhub_tools.quant._four_bit_loader import FourBitLoader
from adapterhub_tools.quant._nested import NestedScales, dequantize_scales
from adapterhub_tools.quant._parts import damaged, flat_bounds

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBit:
    """One 4-bit format.

    Attributes:
        book: its sixteen values.
    """

    book: CodeBook

    def check(self, tensor: QuantizedTensor) -> tuple[Problem, ...]:
        """Returns what is wrong with the dtypes and shapes of a weight's parts."""
        return part_problems(tensor)

    def scales(self, tensor: QuantizedTensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns the scale of every block, float32 (blocks,).

        Args:
            tensor: the weight.
            parts: all but ``"data"``, flat, in their own dtypes.

        Raises:
            FormatError: a scale that is not finite, or a code book of another format.
        """
        stored = parts["quant_map"].view(-1).to(torch.float32)
        if not torch.equal(stored, self.book.table):
            index = int((stored != self.book.table).nonzero()[0])
            message = f"value {index} is {float(stored[index])!r}"
            expected = f"{self.book.values[index]!r}, as {tensor.scheme.name} has it"
            raise FormatError(wrong_part(tensor, "quant_map", message, expected))
        scales = parts["absmax"].view(-1)
        if tensor.scheme.double:
            nested = NestedScales(
                codes=scales,
                scales=parts["nested_absmax"].view(-1),
                offset=float("nan") if tensor.nested_offset is None else tensor.nested_offset,
                size=tensor.scheme.nested_block_size,
            )
            scales = dequantize_scales(nested, parts["nested_quant_map"].view(-1))
        scales = scales.to(torch.float32)
        if not bool(torch.isfinite(scales).all()):
            raise damaged(tensor, int((~torch.isfinite(scales)).nonzero()[0]))
        return scales

    def data_range(self, tensor: QuantizedTensor, first_row: int, rows: int) -> tuple[int, int]:
        """Returns (offset, number of bytes) in ``"data"`` that some rows lie in; they may share a byte."""
        begin, end = flat_bounds(tensor.spec.shape, first_row, rows)
        return begin // 2, (end + 1) // 2 - begin // 2

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
        """Returns rows of the weight: code book value · scale in binary32, rounded once.

        Args:
            tensor: the weight.
            data: uint8, the bytes of ``data_range``.
            scales: of every block.
            first_row: the first of the rows.
            rows: how many.
            dtype: bfloat16, float16, float32 or float64; the last two hold the product as it is.
            out: where to write them, contiguous (rows, columns).

        Returns:
            (rows, columns) of ``dtype``.

        Memory: 1.5 MiB beside the result.
        """
        begin, end = flat_bounds(tensor.spec.shape, first_row, rows)
        if out is None:
            out = torch.empty((rows, (end - begin) // max(1, rows)), dtype=dtype)
        flat = out.view(-1)
        size = tensor.scheme.block_size or 1
        scratch = torch.empty(PIECE + 2, dtype=torch.float32)
        for low, high in _pieces(begin, end, size):
            first_byte, last_byte = low // 2 - begin // 2, (high + 1) // 2 - begin // 2
            values = scratch[: 2 * (last_byte - first_byte)]
            self.book.unpack(data[first_byte:last_byte], values)
            values = values[low % 2 : low % 2 + high - low]
            block = low // size
            if high - low < size:
                values.mul_(scales[block])
            else:
                values.view(-1, size).mul_(scales[block : high // size, None])
            flat[low - begin : high - begin].copy_(values)
        return out

    def encoder(self, scheme: QuantScheme, shape: tuple[int, ...], dtype: torch.dtype) -> FourBitEncoder:
        """Returns what quantises a weight that comes in rows.

        Args:
            scheme: how.
            shape: of the weight, (out, in).
            dtype: of the rows: bfloat16, float16 or float32.
        """
        return FourBitEncoder(self.book, scheme, shape, dtype)

    def loader(
        self, scheme: QuantScheme, shape: tuple[int, ...], dtype: torch.dtype, *, transposed: bool = False
    ) -> FourBitLoader:
        """Returns what quantises a weight and dequantises it at once, as a model that is loaded so has it.

        Args:
            scheme: how.
            shape: of the weight as stored.
            dtype: of the rows: bfloat16, float16 or float32.
            transposed: whether the weight is stored as (in, out).
        """
        return FourBitLoader(self.book, scheme, shape, dtype, transposed=transposed)


def _pieces(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Cuts a range into pieces of whole blocks; those at its ends that are less come alone."""
    while begin < end:
        part = begin % size
        if part or end - begin < size:
            stop = min(end, begin - part + size)
        else:
            stop = begin + min(PIECE, (end - begin) // size * size)
        yield begin, stop
        begin = stop
