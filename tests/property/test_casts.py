"""A cast rounds once, whatever formats it goes between, and says where a value is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS as PACKAGE_FORMATS
from adapterhub_tools.linalg.rounding import BlockRounder
from tests.property.exact_oracle import FORMATS, nearest_by_quotient

_NAMES = sorted(FORMATS)
COLUMNS = 50


def cast(values: torch.Tensor, to: str, *, keep: bool = False):
    start = next(name for name in _NAMES if FORMATS[name].torch == values.dtype)
    rounder = BlockRounder(
        DeltaSum((), values.shape[0]),
        columns=values.shape[1],
        start=PACKAGE_FORMATS[start],
        to=PACKAGE_FORMATS[to],
        keep_non_finite=keep,
    )
    out = torch.empty(values.shape, dtype=FORMATS[to].torch)
    return out, rounder.round_rows(values, out, 0)


def interesting(start: str, to: str) -> np.ndarray:
    """Patterns of the start format: at random, and on, just below and just above midpoints of the other."""
    of, target = FORMATS[start], FORMATS[to]
    rng = np.random.default_rng([of.width, target.width, target.fraction_bits])
    patterns = [int(p) for p in rng.integers(0, of.infinity, 1000)] + [0, 1, of.infinity - 1]
    for size in [*rng.integers(0, target.infinity, 1500), *range(40), target.infinity - 1]:
        middle = (target.magnitude(int(size)) + target.magnitude(int(size) + 1)) / 2
        near = nearest_by_quotient(middle.numerator, middle.denominator, of)
        patterns += [p for p in (near - 1, near, near + 1) if 0 <= p < of.infinity]
    found = np.array(patterns, dtype=np.uint64)
    found = found[: len(found) // COLUMNS * COLUMNS]
    return found | np.where(rng.random(len(found)) < 0.5, np.uint64(of.sign), np.uint64(0))


@pytest.mark.parametrize("to", _NAMES)
@pytest.mark.parametrize("start", _NAMES)
def test_casts_round_once(start, to):
    of, target = FORMATS[start], FORMATS[to]
    patterns = interesting(start, to)
    expected = []
    for p in patterns.tolist():
        x = of.value(p)
        expected.append(nearest_by_quotient(x.numerator, x.denominator, target) if x else 0)
    expected = np.array(expected, dtype=np.uint64)
    zero = (patterns & np.uint64(of.sign - 1)) == 0
    expected[zero & (patterns >= of.sign)] = target.sign
    beyond = (expected & np.uint64(target.sign - 1)) >= target.infinity
    if beyond.any():
        values = of.tensor(patterns.reshape(-1, COLUMNS))
        wrong = cast(values, to)[1]
        assert wrong is not None
        assert beyond.reshape(-1, COLUMNS)[wrong.row, wrong.column]
    kept, right = patterns[~beyond], expected[~beyond]
    found, wrong = cast(of.tensor(kept).reshape(-1, 1), to)
    assert wrong is None
    assert (target.patterns(found).reshape(-1) == right).all()
    print(f"{start} -> {to}: {len(kept)} values, {int(beyond.sum())} overflow")


@pytest.mark.parametrize("to", _NAMES)
@pytest.mark.parametrize("start", _NAMES)
def test_non_finite_values_are_kept_or_located(start, to):
    values = torch.ones(70, 3, dtype=FORMATS[start].torch)
    for row, value in ((41, torch.inf), (50, -torch.inf), (60, torch.nan)):
        changed = values.clone()
        changed[row, 1] = value
        wrong = cast(changed, to)[1]
        assert wrong is not None
        assert (wrong.row, wrong.column) == (row, 1)
        assert not np.isfinite(wrong.start)
        out, wrong = cast(changed, to, keep=True)
        assert wrong is None
        assert torch.equal(out.double(), changed.double()) or out[row, 1].isnan()
        assert (out == 1).sum() == 70 * 3 - 1
