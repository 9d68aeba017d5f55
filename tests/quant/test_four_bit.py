"""NF4 and FP4 against bitsandbytes on the CPU: the same bytes both ways, whatever the shape, dtype or cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapterhub_tools import registry
from adapterhub_tools.errors import FormatError
from adapterhub_tools.model.quant_scheme import BLOCK_SIZES, QuantScheme
from tests.quant import reference
from tests.quant.reference import DTYPES, FOUR_BIT, same_bits, scheme

SHAPES = [(1, 1), (3, 5), (7, 33), (2, 64), (5, 40), (8, 48), (3, 80), (4, 192), (300, 72), (257, 256)]


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.03).to(dtype)


def edges(dtype: torch.dtype, *, huge: bool = True) -> Tensor:
    """Blocks of zeros, of both signs of zero, of huge, tiny and subnormal values, and of ties."""
    low, high = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max if huge else 60000.0
    book = registry.load("quant", "nf4").IMPLEMENTATION.book.table
    ties = torch.cat([(book[1:] + book[:-1]) / 2, -((book[1:] + book[:-1]) / 2)])
    rows = [
        torch.zeros(64),
        torch.tensor([0.0, -0.0]).repeat(32),
        torch.linspace(-1, 1, 64) * high,
        torch.linspace(-1, 1, 64) * low,
        torch.linspace(-1, 1, 64) * low / 64,
        torch.cat([torch.ones(1), ties, torch.zeros(33)]),
        torch.cat([-torch.ones(1), ties, torch.full((33,), -0.0)]),
        torch.cat([torch.full((63,), low / 8), torch.tensor([high])]),
        torch.linspace(-1, 1, 64) * 1e-30,
    ]
    return torch.stack(rows).to(dtype)


def encode(rows: list[Tensor], how: QuantScheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
    encoder = registry.load("quant", how.format).IMPLEMENTATION.encoder(how, shape, rows[0].dtype)
    packed = [encoder.add(part) for part in rows]
    last, parts = encoder.finish()
    data = torch.cat([*packed, last])
    specs = encoder.part_specs("m.weight")
    assert {role: spec.elements for role, spec in specs.items()} == {
        "data": data.numel(),
        **{role: part.numel() for role, part in parts.items()},
    }
    return {"data": data, **parts}


def check_parts(ours: dict[str, Tensor], packed: Tensor, state: Any) -> None:
    theirs = reference.parts_of(packed, state)
    assert ours.keys() == theirs.keys()
    for role in theirs.keys() - {"quant_state"}:
        assert same_bits(ours[role].view(-1), theirs[role].view(-1)), role
    read = [json.loads(bytes(parts["quant_state"].numpy())) for parts in (ours, theirs)]
    assert read[0] == read[1]


@pytest.mark.parametrize("format_", FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantising_gives_the_bytes_of_the_library(
    format_: str, dtype: str, double: bool, shape: tuple[int, ...]
) -> None:
    how, weight = scheme(format_, double=double), weights(shape, DTYPES[dtype])
    check_parts(encode([weight], how, shape), *reference.quantize(weight, how))


@pytest.mark.parametrize("format_", FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
def test_edges_are_quantised_as_the_library_does(format_: str, dtype: str, double: bool) -> None:
    how, weight = scheme(format_, double=double), edges(DTYPES[dtype], huge=not double)
    check_parts(encode([weight], how, tuple(weight.shape)), *reference.quantize(weight, how))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double", [False, True])
def test_every_block_size(block_size: int, double: bool) -> None:
    how, weight = scheme("nf4", double=double, block_size=block_size), weights((33, 512), torch.bfloat16)
    packed, state = reference.quantize(weight, how)
    ours = encode([weight], how, (33, 512))
    check_parts(ours, packed, state)
    assert same_bits(
        decode(ours, how, (33, 512), torch.float32), reference.dequantize(packed, state, torch.float32)
    )


def decode(
    parts: dict[str, Tensor],
    how: QuantScheme,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    cuts: tuple[int, ...] = (),
) -> Tensor:
    fmt = registry.load("quant", how.format).IMPLEMENTATION
    offset = json.loads(bytes(parts["quant_state"].numpy())).get("nested_offset")
    tensor = reference.described(shape, how, parts, nested_offset=offset)
    assert fmt.check(tensor) == ()
    scales = fmt.scales(tensor, parts)
    data = parts["data"].reshape(-1).view(torch.uint8)
    bounds = (0, *cuts, shape[0])
    rows = []
    for first, end in pairwise(bounds):
        begin, size = fmt.data_range(tensor, first, end - first)
        rows.append(fmt.dequantize(tensor, data[begin : begin + size], scales, first, end - first, dtype))
    return torch.cat(rows)


@pytest.mark.parametrize("format_", FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantising_gives_the_bits_of_the_library(
    format_: str, dtype: str, double: bool, shape: tuple[int, ...]
) -> None:
    how = scheme(format_, double=double)
    packed, state = reference.quantize(weights(shape, torch.bfloat16, seed=1), how)
    parts = reference.parts_of(packed, state)
    expected = reference.dequantize(packed, state, DTYPES[dtype])
    assert same_bits(decode(parts, how, shape, DTYPES[dtype]), expected)
    cuts = tuple(sorted({1, shape[0] // 3, shape[0] // 2 + 1, shape[0] - 1} & set(range(1, shape[0]))))
    assert same_bits(decode(parts, how, shape, DTYPES[dtype], cuts), expected)


@pytest.mark.parametrize("format_", FOUR_BIT)
def test_float64_holds_the_binary32_product(format_: str) -> None:
    how, weight = scheme(format_), weights((6, 128), torch.float32)
    packed, state = reference.quantize(weight, how)
    double = decode(reference.parts_of(packed, state), how, (6, 128), torch.float64)
    assert torch.equal(double, reference.dequantize(packed, state, torch.float32).double())


@pytest.mark.parametrize("format_", FOUR_BIT)
def test_edges_are_dequantised_as_the_library_does(format_: str) -> None:
    """In float32: to bfloat16 the library's kernel for AVX512-BF16 processors flushes subnormal results."""
    how, weight = scheme(format_), edges(torch.float32)
    packed, state = reference.quantize(weight, how)
    shape = tuple(weight.shape)
    ours = decode(reference.parts_of(packed, state), how, shape, torch.float32)
    assert same_bits(ours, reference.dequantize(packed, state, torch.float32))
    narrow = decode(reference.parts_of(packed, state), how, shape, torch.bfloat16)
    assert torch.equal(narrow, ours.to(torch.bfloat16))
    expected = reference.dequantize(packed, state, torch.bfloat16)
    normal = ours.abs() >= torch.finfo(torch.float32).smallest_normal
    assert torch.equal(narrow[normal], expected[normal])


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    cuts=st.sets(st.integers(1, 39), max_size=4),
    how=st.sampled_from(
        [scheme(f, double=d, block_size=b) for f in FOUR_BIT for d in (False, True) for b in (32, 64)]
    ),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 1000),
)
def test_any_cut_gives_the_same_bytes(
    rows: int, columns: int, cuts: set[int], how: QuantScheme, dtype: str, seed: int
) -> None:
    weight = weights((rows, columns), DTYPES[dtype], seed)
    bounds = tuple(sorted(cut for cut in cuts if cut < rows))
    ours = encode(list(torch.tensor_split(weight, bounds)), how, (rows, columns))
    packed, state = reference.quantize(weight, how)
    check_parts(ours, packed, state)
    expected = reference.dequantize(packed, state, DTYPES[dtype])
    assert same_bits(decode(ours, how, (rows, columns), DTYPES[dtype], bounds), expected)
    loader = registry.load("quant", how.format).IMPLEMENTATION.loader(how, (rows, columns), DTYPES[dtype])
    pieces = list(torch.tensor_split(weight, bounds))
    if loader.needs_pass:
        for piece in pieces:
            loader.observe(piece)
        loader.close()
    starts = (0, *bounds)
    loaded = [loader.dequantized(p, s, DTYPES[dtype]) for p, s in zip(pieces, starts, strict=True)]
    assert same_bits(torch.cat(loaded), expected)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(128, 5), (192, 33), (48, 7)], ids=str)
def test_a_conv1d_weight_is_quantised_transposed(shape: tuple[int, int], double: bool) -> None:
    how, weight = scheme("nf4", double=double), weights(shape, torch.bfloat16)
    packed, state = reference.quantize(weight.t().contiguous(), how)
    expected = reference.dequantize(packed, state, torch.bfloat16).t()
    fmt = registry.load("quant", "nf4").IMPLEMENTATION
    loader = fmt.loader(how, shape, torch.bfloat16, transposed=True)
    assert loader.row_unit == (64 if shape[0] % 64 == 0 else shape[0])
    pieces = weight.split(loader.row_unit)
    if loader.needs_pass:
        for piece in pieces:
            loader.observe(piece)
        loader.close()
    loaded = [loader.dequantized(p, i * loader.row_unit, torch.bfloat16) for i, p in enumerate(pieces)]
    assert torch.equal(torch.cat(loaded), expected)


def test_a_large_weight_with_quantised_scales() -> None:
    """More scales than one thread of torch sums alone, and a mean of several levels."""
    how, weight = scheme("nf4", double=True), weights((2049, 1024), torch.bfloat16, seed=5)
    packed, state = reference.quantize(weight, how)
    ours = encode(list(weight.split(500)), how, (2049, 1024))
    check_parts(ours, packed, state)
    expected = reference.dequantize(packed, state, torch.bfloat16)
    assert same_bits(decode(ours, how, (2049, 1024), torch.bfloat16, (1000,)), expected)


def test_the_state_is_read_by_the_library_although_it_is_padded() -> None:
    how, weight = scheme("nf4", double=True), weights((8, 64), torch.bfloat16)
    ours = encode([weight], how, (8, 64))
    stored = {
        "absmax": ours["absmax"],
        "quant_map": ours["quant_map"],
        "nested_absmax": ours["nested_absmax"],
        "nested_quant_map": ours["nested_quant_map"],
        "quant_state.bitsandbytes__nf4": ours["quant_state"],
    }
    state = reference.functional.QuantState.from_dict(stored, device=torch.device("cpu"))
    theirs = reference.functional.dequantize_4bit(ours["data"].view(-1, 1), state)
    assert same_bits(theirs, decode(ours, how, (8, 64), torch.bfloat16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [3, 129])
def test_what_is_not_finite_is_refused(value: float, place: int) -> None:
    weight = weights((2, 65), torch.bfloat16)
    weight.view(-1)[place] = value
    fmt, how = registry.load("quant", "nf4").IMPLEMENTATION, scheme("nf4")
    encoder = fmt.encoder(how, (2, 65), torch.bfloat16)
    with pytest.raises(FormatError, match="not finite"):
        [encoder.add(weight), encoder.finish()]
    loader = fmt.loader(how, (2, 65), torch.bfloat16)
    loader.observe(weight)
    with pytest.raises(FormatError, match="not finite"):
        loader.close()


def test_scales_whose_sum_overflows_are_refused() -> None:
    weight = torch.full((4, 64), 3e38)
    encoder = registry.load("quant", "nf4").IMPLEMENTATION.encoder(
        scheme("nf4", double=True), (4, 64), torch.float32
    )
    encoder.add(weight)
    with pytest.raises(FormatError, match="overflows"):
        encoder.finish()


@pytest.mark.parametrize("damage", ["nan", "code book"])
def test_damaged_scales_are_refused(damage: str) -> None:
    how = scheme("nf4")
    parts = reference.parts_of(*reference.quantize(weights((4, 64), torch.bfloat16), how))
    parts["absmax" if damage == "nan" else "quant_map"][2] = float("nan")
    tensor = reference.described((4, 64), how, parts)
    with pytest.raises(FormatError) as raised:
        registry.load("quant", "nf4").IMPLEMENTATION.scales(tensor, parts)
    (problem,) = raised.value.problems
    assert problem.kind == "quantised-part"
    assert problem.loc == ("m.weight.absmax" if damage == "nan" else "m.weight.quant_map")
    assert problem.remedy
