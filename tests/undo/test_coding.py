"""Records of differences: there and back, in every width, and nothing but errors for what is broken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adapterhub_tools.engine.undo_coding import (
    EQUAL,
    HEAD,
    RAW,
    SPARSE,
    XOR,
    RecordHead,
    decode,
    encode,
    from_order,
    order,
)
from adapterhub_tools.errors import FormatError

WIDTHS = st.sampled_from([np.uint16, np.uint32, np.uint64])


def back(record: bytes, predicted: np.ndarray) -> np.ndarray:
    head = RecordHead.parse(record[: HEAD.size])
    assert head.payload == len(record) - HEAD.size
    return decode(head, record[HEAD.size :], predicted.copy())


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_values(data: st.DataObject) -> None:
    dtype = data.draw(WIDTHS)
    size = data.draw(st.integers(1, 300))
    values = st.integers(0, np.iinfo(dtype).max)
    true = data.draw(arrays(dtype, size, elements=values))
    predicted = true.copy()
    for _ in range(data.draw(st.integers(0, 20))):
        predicted[data.draw(st.integers(0, size - 1))] = data.draw(values)
    assert (back(encode(true, predicted, 1), predicted) == true).all()
    assert (back(encode(true, None, 1), predicted) == true).all()


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_neighbours(data: st.DataObject) -> None:
    """Long gaps, and differences of one or a few places of the ordering."""
    dtype = data.draw(WIDTHS)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    true = random.integers(0, np.iinfo(dtype).max, 5000, dtype=dtype, endpoint=True)
    share = data.draw(st.sampled_from([0.0, 0.0005, 0.02, 0.3, 0.8]))
    moved = np.where(random.random(5000) < share, random.integers(-3, 4, 5000), 0)
    predicted = from_order(order(true) - moved, np.dtype(dtype))
    record = encode(true, predicted, 7)
    assert RecordHead.parse(record[: HEAD.size]).rows == 7
    assert (back(record, predicted) == true).all()


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint16, 16), (np.uint32, 32), (np.uint64, 64)])
def test_the_order_is_that_of_the_values(dtype: type, bits: int) -> None:
    top = 1 << (bits - 1)
    ascending = np.array([top + 9, top + 1, top, 0, 1, 9], dtype=dtype)  # …, −1, −0, +0, +1, …
    places = order(ascending)
    assert places.tolist() == [-10, -2, -1, 0, 1, 9]
    assert (from_order(places, np.dtype(dtype)) == ascending).all()


def test_every_float16_is_in_its_place() -> None:
    bits = np.arange(1 << 16).astype(np.uint16)
    finite = bits[np.isfinite(bits.view(np.float16))]
    by_value = finite[np.argsort(order(finite), kind="stable")].view(np.float16)
    assert (np.diff(by_value.astype(np.float64)) >= 0).all()
    assert (from_order(order(bits), np.dtype(np.uint16)) == bits).all()


def test_each_coding_is_used_where_it_is_the_smallest() -> None:
    random = np.random.default_rng(0)
    true = random.integers(0, 1 << 16, 20_000).astype(np.uint16)
    few, low_bits, other = true.copy(), true.copy(), random.integers(0, 1 << 16, 20_000).astype(np.uint16)
    few[::100] += 1
    low_bits ^= random.integers(0, 16, 20_000).astype(np.uint16)
    constant = np.full(20_000, 7, dtype=np.uint16)
    for value, predicted, coding in (
        (true, true, EQUAL),
        (true, few, SPARSE),
        (true, low_bits, XOR),
        (constant, other, RAW),
    ):
        assert encode(value, predicted, 1)[0] == coding


def test_broken_records_are_errors() -> None:
    """Every single bit of a record flipped: refused, or other values, but never another exception."""
    random = np.random.default_rng(1)
    true = random.integers(0, 1 << 16, 400).astype(np.uint16)
    predicted = true.copy()
    predicted[::7] += 1
    predicted[5] ^= 0x1234
    record = encode(true, predicted, 4)
    refused = 0
    for bit in range(8 * len(record)):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << (bit % 8)
        try:
            head = RecordHead.parse(bytes(damaged[: HEAD.size]))
            found = decode(head, bytes(damaged[HEAD.size :])[: head.payload], predicted.copy())
            assert len(found) == len(true)
        except FormatError:
            refused += 1
    print(f"{refused} of {8 * len(record)} refused")
    assert refused > len(record)
