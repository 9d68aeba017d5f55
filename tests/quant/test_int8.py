"""int8 against bitsandbytes on the CPU: the same bytes both ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapterhub_tools import registry
from adapterhub_tools.errors import FormatError
from tests.quant import reference
from tests.quant.reference import DTYPES, same_bits, scheme

FORMAT = registry.load("quant", "int8").IMPLEMENTATION
SHAPES = [(1, 1), (3, 5), (64, 32), (257, 130)]


def weights(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=generator) * 0.05
    weight[0] = 0.0
    weight[-1, 0] = 3.0
    return weight.to(dtype)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    values, scales, _ = reference.functional.int8_vectorwise_quant(weight.to(torch.float16))
    return values, scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways(dtype: str, shape: tuple[int, int]) -> None:
    weight = weights(shape, DTYPES[dtype])
    values, scales = quantize(weight)
    encoder = FORMAT.encoder(scheme("int8"), shape, weight.dtype)
    data = torch.cat([encoder.add(part) for part in weight.split(20)])
    last, parts = encoder.finish()
    assert last.numel() == 0
    assert same_bits(data, values.view(torch.uint8).view(-1))
    assert same_bits(parts["scales"], scales)
    specs = encoder.part_specs("m.weight")
    assert [spec.name for spec in specs.values()] == ["m.weight", "m.SCB", "m.weight_format"]

    stored = {"data": values, "scales": scales, "weight_format": torch.zeros((), dtype=torch.uint8)}
    tensor = reference.described(shape, scheme("int8"), stored)
    assert FORMAT.check(tensor) == ()
    product = reference.functional.int8_vectorwise_dequant(values, scales)
    half = shape[0] // 2
    for target in (*DTYPES.values(), torch.float64):
        rows = []
        for first, count in ((0, half), (half, shape[0] - half)):
            begin, size = FORMAT.data_range(tensor, first, count)
            piece = data[begin : begin + size]
            rows.append(FORMAT.dequantize(tensor, piece, FORMAT.scales(tensor, stored), first, count, target))
        assert same_bits(torch.cat(rows), product.to(target))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_base_that_is_quantised_while_it_is_loaded(transposed: bool) -> None:
    weight = weights((40, 24), torch.bfloat16)
    stored = weight.t().contiguous() if transposed else weight
    expected = reference.functional.int8_vectorwise_dequant(*quantize(weight))
    loader = FORMAT.loader(scheme("int8"), tuple(stored.shape), torch.bfloat16, transposed=transposed)
    pieces = stored.split(7)
    assert loader.needs_pass == transposed
    if transposed:
        for piece in pieces:
            loader.observe(piece)
        loader.close()
    loaded = torch.cat([loader.dequantized(p, 7 * i, torch.float32) for i, p in enumerate(pieces)])
    assert torch.equal(loaded, expected.t() if transposed else expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70000.0])
def test_what_is_not_finite_in_float16_is_refused(value: float) -> None:
    weight = weights((4, 8), torch.bfloat16)
    weight[2, 3] = value
    with pytest.raises(FormatError, match=r"row 2 .*float16"):
        FORMAT.encoder(scheme("int8"), (4, 8), torch.bfloat16).add(weight)


def test_other_layouts_are_refused() -> None:
    values, scales = quantize(weights((4, 8), torch.bfloat16))
    stored = {"data": values, "scales": scales, "weight_format": torch.ones((), dtype=torch.uint8)}
    with pytest.raises(FormatError, match="layout is number 1, expected 0"):
        FORMAT.scales(reference.described((4, 8), scheme("int8"), stored), stored)


def test_zero_rows_stay_zero() -> None:
    values, scales = quantize(torch.zeros(2, 8))
    encoder = FORMAT.encoder(scheme("int8"), (2, 8), torch.float32)
    assert same_bits(encoder.add(torch.zeros(2, 8)), values.view(torch.uint8).view(-1))
    assert same_bits(encoder.finish()[1]["scales"], scales)
