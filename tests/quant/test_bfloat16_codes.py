"""Codes of bfloat16 weights by table: every value beside every scale gets the code of bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapterhub_tools import registry
from tests.quant import reference
from tests.quant.reference import FOUR_BIT, same_bits, scheme

EXPONENTS = [0, 1, 6, 7, 8, 9, 64, 120, 127, 128, 200, 251, 252, 253, 254]
"""Of a block's scale, biased: zero and subnormal ones, where the table begins and ends, and the largest."""
BINADES = 9
"""Values further below their scale are in the last block of each fraction: the smallest, and zeros."""


def blocks_of(exponent: int) -> Tensor:
    """Blocks of 64 with each of the 128 scales of a binade, and every bfloat16 not far below it.

    The scale comes first, so that it is the largest magnitude; what is left over is zeros.
    """
    blocks = []
    for fraction in range(128):
        top = exponent << 7 | fraction
        low = max(0, top - BINADES * 128)
        near = torch.arange(low, top + 1)
        bits = torch.cat([near, near | 0x8000, torch.tensor([0, 1, 2, 0x8000, 0x8001, 0x8002])])
        rows = -(-bits.numel() // 63)
        padded = torch.zeros(rows * 63, dtype=torch.int64)
        padded[: bits.numel()] = bits
        blocks.append(torch.cat([torch.full((rows, 1), top), padded.view(rows, 63)], dim=1))
    return torch.cat(blocks).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("format_", FOUR_BIT)
def test_every_value_beside_every_scale(format_: str, exponent: int) -> None:
    weight, how = blocks_of(exponent), scheme(format_)
    codec = registry.load("quant", format_).IMPLEMENTATION
    packed, state = reference.quantize(weight, how)
    encoder = codec.encoder(how, tuple(weight.shape), weight.dtype)
    data = encoder.add(weight)
    rest, parts = encoder.finish()
    assert rest.numel() == 0
    assert same_bits(data, packed.view(-1))
    assert same_bits(parts["absmax"], state.absmax)
    loader = codec.loader(how, tuple(weight.shape), weight.dtype)
    expected = reference.dequantize(packed, state, torch.float32)
    assert same_bits(loader.dequantized(weight, 0, torch.float32), expected)


def test_blocks_beyond_the_table_are_found_among_others() -> None:
    """Zero, subnormal and huge blocks between usual ones, at every block size."""
    usual = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    weight = torch.stack([usual, usual * 2.0**-126, usual * 0, usual * 2.0**125], dim=1).reshape(-1, 64)
    for size in (32, 64, 128):
        how = scheme("nf4", block_size=size)
        packed, state = reference.quantize(weight, how)
        encoder = registry.load("quant", "nf4").IMPLEMENTATION.encoder(how, tuple(weight.shape), weight.dtype)
        assert same_bits(encoder.add(weight), packed.view(-1))
        assert same_bits(encoder.finish()[1]["absmax"], state.absmax)
