"""The weights that a model has when its 16- or 32-bit base is quantised to 4 bits while it is loaded."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.model.quant_scheme import QuantScheme
from adapterhub_tools.quant._code_book import CodeBook
from adapterhub_tools.quant._four_bit_blocks import block_scales, block_values, piece_of, refuse_non_finite
from adapterhub_tools.quant._nested import dequantize_scales, dynamic_code_book, quantize_scales

if TYPE_CHECKING:
    from torch import Tensor


class FourBitLoader:
    """Quantises rows and dequantises them at once.

    Where ``needs_pass``, the scales depend on the whole weight, or blocks on rows that may lie in another
    chunk: give all rows to ``observe`` first, in order, then call ``close``.

    A weight that is stored as (in, out) is quantised as (out, in), as the loader of transformers does; its
    rows must come in multiples of ``row_unit``.

    Memory: 4 bytes for each block (8 where double), and about 4 MiB.

    Attributes:
        needs_pass: whether ``observe`` and ``close`` come first.
        row_unit: what the first row and the number of rows of a chunk must be multiples of.
    """

    def __init__(
        self,
        book: CodeBook,
        scheme: QuantScheme,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        transposed: bool,
    ) -> None:
        """Takes what ``FourBit.loader`` describes."""
        self._book, self._scheme, self._dtype = book, scheme, dtype
        self._transposed = transposed
        self._size = scheme.block_size or 1
        self._rows, self._columns = (shape[0], prod(shape[1:])) if shape else (1, 1)
        along = self._rows if transposed else self._columns
        self._even = along % self._size == 0
        self.needs_pass: bool = scheme.double or not (self._even or transposed)
        self.row_unit: int = 1 if not transposed else (self._size if self._even else max(1, self._rows))
        blocks = -(-self._rows * self._columns // self._size)
        self._own = torch.zeros(blocks if self.needs_pass else 0)
        self._used = self._own
        self._rest = torch.empty(0, dtype=dtype)
        self._seen = 0

    def observe(self, rows: Tensor) -> None:
        """Takes the next rows, (n, columns), for their scales.

        Raises:
            FormatError: a value that is not finite.
        """
        count = rows.shape[0]
        if self._transposed:
            turned = rows.t().contiguous()
            whole = turned.numel() // self._size * self._size
            scales = block_scales(turned.view(-1)[:whole].view(-1, self._size))
            if self._even:
                place = self._own.view(self._columns, -1)
                first = self._seen // self._size
                place[:, first : first + count // self._size] = scales.view(self._columns, -1)
            else:
                self._own[: scales.numel()] = scales
                self._short(turned.view(-1)[whole:])
        else:
            flat = torch.cat([self._rest, rows.reshape(-1)]) if self._rest.numel() else rows.reshape(-1)
            first = (self._seen * self._columns - self._rest.numel()) // self._size
            whole = flat.numel() // self._size * self._size
            piece = piece_of(rows.dtype)
            for begin in range(0, whole, piece):
                scales = block_scales(flat[begin : min(whole, begin + piece)].view(-1, self._size))
                at = first + begin // self._size
                self._own[at : at + scales.numel()] = scales
            self._rest = flat[whole:].clone()
        self._seen += count

    def close(self) -> None:
        """Ends the pass over all rows.

        Raises:
            FormatError: a value that is not finite.
        """
        if not self._transposed:
            self._short(self._rest)
            self._rest = self._rest[:0]
        refuse_non_finite(self._own, 0)
        self._used = self._own
        if self._scheme.double:
            nested = quantize_scales(self._own, self._scheme.nested_block_size)
            self._used = dequantize_scales(nested, dynamic_code_book())

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
            FormatError: a value that is not finite.
        """
        if out is None:
            out = torch.empty(rows.shape, dtype=dtype)
        if not self._transposed:
            self._flat(rows.reshape(-1), first_row * self._columns, out.view(-1), None)
            return out
        turned = rows.t().contiguous()
        result = torch.empty(turned.shape, dtype=dtype)
        where = None
        if self._even and self.needs_pass:
            blocks = torch.arange(self._own.numel()).view(self._columns, -1)
            first = first_row // self._size
            where = blocks[:, first : first + rows.shape[0] // self._size].reshape(-1)
        self._flat(turned.view(-1), 0, result.view(-1), where)
        out.copy_(result.t())
        return out

    def _flat(self, values: Tensor, start: int, out: Tensor, where: Tensor | None) -> None:
        """Works on values that begin at ``start``; ``where`` are their blocks if these do not follow."""
        size, total = self._size, self._rows * self._columns
        begin, count = 0, values.numel()
        while begin < count:
            at = start + begin
            part = at % size
            if part or count - begin < size:
                end = min(count, begin + size - part)
                short = at // size == total // size
                block = slice(at // size, at // size + 1)
                self._blocks(values[begin:end].view(1, -1), out[begin:end].view(1, -1), block, short=short)
            else:
                end = begin + min(piece_of(values.dtype), (count - begin) // size * size)
                span = slice(at // size, (start + end) // size)
                blocks = span if where is None else where[span]
                self._blocks(values[begin:end].view(-1, size), out[begin:end].view(-1, size), blocks)
            begin = end

    def _blocks(self, values: Tensor, out: Tensor, where: slice | Tensor, *, short: bool = False) -> None:
        if self.needs_pass:
            own, used = self._own[where], self._used[where]
        else:
            own = used = block_scales(values, short=short)
            refuse_non_finite(own, 0)
        result = block_values(self._book, values, own, short=short).view(values.shape)
        out.copy_(result.mul_(used[:, None]))

    def _short(self, values: Tensor) -> None:
        if values.numel():
            self._own[-1:] = block_scales(values.view(1, -1), short=True)
