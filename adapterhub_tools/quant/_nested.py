"""Scales that are quantised themselves (double quantisation), as bitsandbytes does it on a CPU.

The scales of all blocks of a weight lose their mean; what is left is quantised to 8 bits in blocks of 256
with the dynamic code book of Dettmers 2015 (arXiv:1511.04561).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from adapterhub_tools.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.formats import AnyArray

_LANES = 8  # float32 numbers in an AVX2 register
_CHAINS = 4
_LEVELS = 4
_BINS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedScales:
    """Quantised scales.

    Attributes:
        codes: uint8 (blocks,).
        scales: float32 (⌈blocks / size⌉,).
        offset: the mean that was taken away, a binary32 number.
        size: how many codes share a scale.
    """

    codes: Tensor
    scales: Tensor
    offset: float
    size: int


def quantize_scales(scales: Tensor, size: int) -> NestedScales:
    """Quantises the scales of all blocks of one weight.

    Args:
        scales: float32 (blocks,), finite.
        size: how many of them share a scale.

    Raises:
        FormatError: their sum overflows.
    """
    offset = mean(scales)
    if not bool(torch.isfinite(offset)):
        raise FormatError.of(
            "non-finite",
            "the weights are so large that the sum of their scales overflows binary32.",
            remedy="Quantise without 'double'.",
        )
    rest = scales - offset
    count = rest.numel()
    groups = -(-count // size)
    padded = torch.zeros(groups * size)
    padded[:count] = rest
    blocks = padded.view(groups, size)
    largest = blocks.abs().amax(dim=1)
    # Dividing by 1 where all is zero: such a block has code 0 below.
    inverse = torch.div(torch.ones(()), torch.where(largest == 0, 1.0, largest))
    scaled = (blocks * inverse[:, None]).clamp_(-1, 1)
    # The library looks codes up in a table of 65536 bins of [-1, 1], with a fused multiply-add.
    half = scaled.add_(1.0).mul_(0.5).to(torch.float64)
    bins = half.mul_(_BINS - 1).add_(0.5).to(torch.float32).to(torch.int64).clamp_(max=_BINS - 1)
    codes = _bin_codes().index_select(0, bins.view(-1)).view(groups, size)
    codes[largest == 0] = 0
    return NestedScales(codes=codes.view(-1)[:count], scales=largest, offset=float(offset), size=size)


def dequantize_scales(nested: NestedScales, code_book: Tensor) -> Tensor:
    """Returns the scales: code book value · scale, rounded to binary32, then + offset, rounded again.

    Args:
        nested: the quantised scales.
        code_book: float32 (256,).
    """
    values = code_book.index_select(0, nested.codes.to(torch.int64))
    each = nested.scales.repeat_interleave(nested.size)[: values.numel()]
    return values.mul_(each).add_(torch.tensor(nested.offset, dtype=torch.float32))


@lru_cache(maxsize=1)
def dynamic_code_book() -> Tensor:
    """Returns the 256 values of the signed dynamic 8-bit type, ascending, float32.

    Seven ranges, each ten times as wide as the one before; the i-th has 2^i values of each sign, which are
    the middles of equal parts of [0.1, 1] of it. Zero and one complete them.
    """
    values = [0.0, 1.0]
    for power in range(7):
        edges = _edges(2**power)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        for value in middles.tolist():
            # The scale is a binary64 number, and the product is rounded to binary32 as torch does it.
            scaled = float(np.float32(np.float32(10 ** (power - 6)) * np.float32(value)))
            values += [scaled, -scaled]
    return torch.tensor(sorted(values), dtype=torch.float32)


def _edges(parts: int) -> AnyArray:
    """Returns the ends of equal parts of [0.1, 1] as torch's ``linspace`` has them on an x86-64 processor.

    It steps from the nearer end, with a fused multiply-add in binary32; binary64 holds the product.
    """
    low, high = np.float64(np.float32(0.1)), np.float64(1)
    step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(parts))
    number = np.arange(parts + 1, dtype=np.float64)
    from_low, from_high = low + step * number, high - step * (parts - number)
    return np.where(number < (parts + 1) // 2, from_low, from_high).astype(np.float32)


@lru_cache(maxsize=1)
def _bin_codes() -> Tensor:
    """Returns the code of each bin's value, uint8 (65536,); ties go to the lower code."""
    book = dynamic_code_book().numpy()
    middles = np.float32(0.5) * (book[:-1] + book[1:])
    values = np.float32(-1) + np.float32(2) * np.arange(_BINS, dtype=np.float32) / np.float32(_BINS - 1)
    return torch.from_numpy(np.searchsorted(middles, values, side="left").astype(np.uint8))


def mean(values: Tensor) -> Tensor:
    """Returns the mean of float32 values as torch computes it on one thread of an x86-64 processor.

    torch sums in 8 lanes, 4 rows at a time, into accumulators of 4 levels (cascade summation). How a sum is
    ordered decides its last bits, so the order is part of the format: torch itself would give other bits with
    more threads, on a GPU or on another processor.

    Args:
        values: float32 (n,), n > 0.

    Returns:
        float32, a scalar.
    """
    array = values.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        total = _sum_lanes(array) if array.size >= _LANES else _sum_few(array)
    return torch.tensor(total / np.float32(array.size), dtype=torch.float32)


def _sum_few(array: AnyArray) -> np.float32:
    return np.float32(_sum_rows(array.reshape(-1, 1))[0])


def _sum_lanes(array: AnyArray) -> np.float32:
    whole = array.size // _LANES * _LANES
    lanes = _sum_rows(array[:whole].reshape(-1, _LANES))
    total = np.float32(0)
    for value in (*array[whole:], *lanes):
        total = np.float32(total + value)
    return total


def _sum_rows(rows: AnyArray) -> AnyArray:
    """Sums rows in four interleaved chains; rows left over go to the first."""
    count = rows.shape[0] // _CHAINS
    chains = _sum_cascade(rows[: count * _CHAINS].reshape(count, _CHAINS, rows.shape[1]))
    total: AnyArray = chains[0].copy()
    for row in rows[count * _CHAINS :]:
        total += row
    for chain in chains[1:]:
        total += chain
    return total


def _sum_cascade(items: AnyArray) -> AnyArray:
    """Sums along the first axis: runs of 2^p items, whose sums climb the levels as digits are carried."""
    count = items.shape[0]
    power = max(4, (count - 1).bit_length() // _LEVELS if count > 1 else 0)
    run = 1 << power
    runs = count // run
    sums = np.zeros((runs, *items.shape[1:]), dtype=np.float32)
    grouped = items[: runs * run].reshape(runs, run, *items.shape[1:])
    for place in range(run):
        sums += grouped[:, place]
    levels = np.zeros((_LEVELS, *items.shape[1:]), dtype=np.float32)
    for number, total in enumerate(sums, start=1):
        levels[0] += total
        for level in range(1, _LEVELS):
            levels[level] += levels[level - 1]
            levels[level - 1] = 0
            if (number * run) & ((run - 1) << (level * power)):
                break
    for item in items[runs * run :]:
        levels[0] += item
    for level in range(1, _LEVELS):
        levels[0] += levels[level]
    result: AnyArray = levels[0]
    return result
