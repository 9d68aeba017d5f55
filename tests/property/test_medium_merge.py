"""A whole tensor through the engine, from file to file: each of 262,144 weights is the exact one, rounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.property.exact_oracle import FORMATS, merged_matrix
from tests.property.merge_cases import Case, Product, through_engine

SIZE, RANK = 512, 16


def stored(values: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Patterns and values of an array in a format; no −0."""
    tensor = (torch.from_numpy(values).to(FORMATS[name].torch).double() + 0.0).to(FORMATS[name].torch)
    return FORMATS[name].patterns(tensor).copy(), tensor.double().numpy()


@pytest.mark.parametrize(
    ("factor", "start", "to", "alpha", "rooted", "transposed"),
    [
        ("F32", "BF16", "BF16", 16.0, False, False),
        ("BF16", "BF16", "BF16", 32.0, True, True),
        ("F32", "F16", "F16", 5.7, False, True),
        ("F32", "F32", "F32", 20.0, False, False),
        ("BF16", "F32", "BF16", 16.0, False, False),
        ("F16", "BF16", "F64", 5.7, False, False),
    ],
)
def test_every_weight(factor, start, to, alpha, rooted, transposed, tmp_path):
    rng = np.random.default_rng(SIZE)
    w, start_values = stored(rng.standard_normal((SIZE, SIZE)) * 0.02, start)
    b, left = stored(rng.standard_normal((SIZE, RANK)) * 0.01, factor)
    a, right = stored(rng.standard_normal((RANK, SIZE)) * 0.02, factor)
    item = Product(
        format=FORMATS[factor],
        left=b,
        right=a,
        alpha=alpha,
        rank=RANK - 1 if rooted else RANK,
        rooted=rooted,
        multiplier=1.0,
        row=0,
        column=0,
        transposed=transposed,
    )
    case = Case(start_format=FORMATS[start], to=FORMATS[to], start=w, products=[item])
    expected = merged_matrix(start_values, left, right, item.scale, FORMATS[to])
    found = through_engine(case, tmp_path)
    changed = int((found != FORMATS[to].patterns(FORMATS[start].tensor(w).to(FORMATS[to].torch))).sum())
    print(f"{start} -> {to}, {factor} factors: {found.size} weights, {changed} changed")
    assert changed > found.size // 20
    assert np.argwhere(found != expected).tolist() == []
