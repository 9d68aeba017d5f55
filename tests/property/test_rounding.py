"""Every merged weight is the exact value rounded once, to the last bit and to the sign of a zero."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from adapterhub_tools.errors import LossyError
from tests.property.case_strategies import cases
from tests.property.exact_oracle import FORMATS
from tests.property.merge_cases import Case, through_engine, through_rounder

_CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
_MUST_OCCUR = (
    "tie",
    "near tie",
    "overflow",
    "largest",
    "subnormal",
    "minus zero",
    "non-zero to zero",
    "x - x",
    "cancellation",
)


def compare(case: Case, found: np.ndarray, expected: np.ndarray) -> None:
    wrong = np.argwhere(found != expected)
    if len(wrong):
        i, j = (int(v) for v in wrong[0])
        pytest.fail(
            f"{len(wrong)} of {found.size} wrong, first at ({i}, {j}): "
            f"{int(found[i, j]):#x} instead of {int(expected[i, j]):#x}\n{case.describe()}"
        )


def overflows(case: Case, expected: np.ndarray) -> np.ndarray:
    return (expected & case.to.unsigned.type(case.to.sign - 1)) >= case.to.infinity


def check_rounder(case: Case) -> None:
    expected = case.expected()
    found, beyond = through_rounder(case)
    bad = overflows(case, expected)
    if bad.any():
        assert beyond is not None, f"overflow not reported\n{case.describe()}"
        assert bad[beyond], f"{beyond} does not overflow\n{case.describe()}"
    else:
        assert beyond is None, f"{beyond} does not overflow\n{case.describe()}"
        compare(case, found, expected)


def search(to: str, examples: int, *, repeatable: bool) -> Counter:
    totals: Counter = Counter()

    @settings(max_examples=examples, derandomize=repeatable, **_CHECKS)
    @given(cases(to))
    def run(case: Case) -> None:
        check_rounder(case)
        totals.update(case.kinds)
        totals["cases"] += 1

    run()
    print(f"{to}: {dict(totals)}")
    return totals


@pytest.mark.parametrize("to", sorted(FORMATS))
def test_bits_of_small_merges(to):
    totals = search(to, 700, repeatable=True)
    missing = [kind for kind in _MUST_OCCUR if totals[kind] < 3]
    assert not missing, f"the search hardly produced: {missing}"
    if FORMATS[to].width == 16:
        assert totals["double rounding"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("to", sorted(FORMATS))
def test_bits_of_many_small_merges(to):
    search(to, 10_000, repeatable=False)


@pytest.mark.parametrize("to", sorted(FORMATS))
def test_engine_gives_the_same_bits(to, tmp_path: Path):
    totals: Counter = Counter()

    @settings(max_examples=60, derandomize=True, **_CHECKS)
    @given(cases(to))
    def run(case: Case) -> None:
        expected = case.expected()
        if overflows(case, expected).any():
            with pytest.raises(LossyError):
                through_engine(case, tmp_path)
            totals["refused"] += 1
        else:
            compare(case, through_engine(case, tmp_path), expected)
            totals["written"] += 1

    run()
    print(f"{to}: {dict(totals)}")
    assert totals["written"] > 20
