"""Blocks of a weight on their way to four bits: their scales, and their values in units of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from adapterhub_tools.quant._code_book import largest
from adapterhub_tools.quant._parts import non_finite

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from adapterhub_tools.quant._code_book import CodeBook

_ONE = torch.ones(())  # a division is correctly rounded everywhere; torch.reciprocal need not be
PIECE_BYTES = 1 << 19
SMALLEST = 1e-38
"""What bitsandbytes divides by where a block's largest magnitude is less."""


def block_scales(blocks: Tensor, *, short: bool = False) -> Tensor:
    """Returns the scale of each block: its largest magnitude, float32 (n,).

    Args:
        blocks: bfloat16, float16 or float32 (n, size).
        short: the weight's last block, which is not full; its scale is never below SMALLEST.
    """
    scales = largest(blocks)
    return scales.clamp_(min=SMALLEST) if short else scales


def scaled_blocks(blocks: Tensor, scales: Tensor, *, short: bool = False) -> Tensor:
    """Returns values divided by their block's scale, as they are before they get a code.

    bitsandbytes multiplies full blocks with the reciprocal and divides the last one where it is short, both
    in binary32; the two can differ in the last bit, and then in the code.

    Args:
        blocks: bfloat16, float16 or float32 (n, size).
        scales: float32 (n,).
        short: the weight's last block, which is not full.

    Returns:
        float32 (n * size,).
    """
    if short:
        return (blocks.to(torch.float32) / scales[:, None]).view(-1)
    return (blocks * torch.div(_ONE, scales.clamp(min=SMALLEST))[:, None]).view(-1)


def block_codes(book: CodeBook, blocks: Tensor, scales: Tensor, *, short: bool = False) -> Tensor:
    """Returns the code of each value, uint8 (n * size,); the arguments are those of ``scaled_blocks``."""
    table = None if book.by_bits is None else book.by_bits.codes
    return _looked_up(book, table, book.codes, blocks, scales, short=short)


def block_values(book: CodeBook, blocks: Tensor, scales: Tensor, *, short: bool = False) -> Tensor:
    """Returns the values of ``block_codes`` in units of their block's scale, float32 (n * size,)."""
    table = None if book.by_bits is None else book.by_bits.values
    return _looked_up(book, table, book.nearest, blocks, scales, short=short)


def _looked_up(
    book: CodeBook,
    table: Tensor | None,
    compute: Callable[[Tensor], Tensor],
    blocks: Tensor,
    scales: Tensor,
    *,
    short: bool,
) -> Tensor:
    """Returns an entry for each value: from the table of bits where that serves, else computed."""
    if short or blocks.dtype != torch.bfloat16 or book.by_bits is None or table is None:
        return compute(scaled_blocks(blocks, scales, short=short))
    places, beyond = book.by_bits.places(blocks, scales)
    found = torch.index_select(table, 0, places)
    if bool(beyond.any()):
        computed = compute(scaled_blocks(blocks[beyond], scales[beyond]))
        found.view(blocks.shape)[beyond] = computed.view(-1, blocks.shape[1])
    return found


def piece_of(dtype: torch.dtype) -> int:
    """Returns how many values are quantised at a time: so many that scratch stays in the cache."""
    return PIECE_BYTES // dtype.itemsize


def refuse_non_finite(scales: Tensor, first: int) -> None:
    """Raises FormatError if a scale is not finite; ``first`` is the number of the first block."""
    finite = np.isfinite(scales.numpy())
    if not finite.all():
        raise non_finite("", first + int(np.flatnonzero(~finite)[0]))
