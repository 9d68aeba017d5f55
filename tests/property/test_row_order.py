"""The order of rows by counting sorts against numpy's stable sort by comparisons."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adapterhub_tools.linalg.row_order import ascending

MAGNITUDES = st.one_of(
    st.floats(0, allow_nan=False, allow_infinity=False),
    st.sampled_from(
        [0.0, 5e-324, 2.0**-1022, 1.0, np.nextafter(1.0, 2.0), 2.0**1023, 1.7976931348623157e308]
    ),
    st.integers(0, 3).map(float),
)


def matches(values: np.ndarray) -> None:
    kept = values.copy()
    order = ascending(torch.from_numpy(values))
    assert order.dtype == torch.int64
    assert np.array_equal(order.numpy(), np.argsort(kept, axis=1, kind="stable"))
    assert np.array_equal(values, kept)


@settings(max_examples=200, deadline=None)
@given(values=arrays(np.float64, st.tuples(st.integers(0, 4), st.integers(0, 40)), elements=MAGNITUDES))
def test_any_magnitudes_are_in_the_order_of_a_stable_sort(values: np.ndarray) -> None:
    matches(values)


@pytest.mark.parametrize("columns", [1, 2, 257, 4096, 70_000])
@pytest.mark.parametrize("kind", ["gaussian", "bfloat16", "heavy", "clustered", "equal", "zero"])
def test_rows_of_every_distribution_and_length(kind: str, columns: int) -> None:
    random = np.random.default_rng(columns)
    values = np.abs(random.standard_normal((3, columns)))
    if kind == "bfloat16":
        values = torch.from_numpy(values).bfloat16().double().numpy()
    elif kind == "heavy":
        values = np.exp(40 * values)  # nearly all share the lowest of the 32 bits
    elif kind == "clustered":
        values = 1.0 + 1e-13 * values  # all share all of them
    elif kind == "equal":
        values = np.ones_like(values)
    elif kind == "zero":
        values = np.where(random.random(values.shape) < 0.5, 0.0, values)
    matches(values)
