"""The scans for values that binary32 and float64 cannot decide find each of them in large blocks.

Every element of every block is compared with exact integer arithmetic. The blocks are made so that ties,
near ties, cancellation and outlier rows occur all the time; a scan that is weakened on purpose is caught.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from adapterhub_tools.linalg import delta_sum, low_rank, rounding, single, surd
from adapterhub_tools.linalg.formats import FORMATS as PACKAGE_FORMATS
from tests.property.block_cases import KINDS, Block

_FORMATS = ("BF16", "F16", "F32")


def run(to: str, seeds: range, *, first: bool = True) -> None:
    totals: Counter = Counter()
    for seed in seeds:
        block = Block(seed, to)
        found, resolved = block.computed(first=first)
        wrong = np.argwhere(found != block.expected())
        assert not len(wrong), (
            f"seed {seed} ({block.kind}, {block.start_format} -> {to}, {block.factor_format} factors): "
            f"{len(wrong)} wrong, first at {wrong[0].tolist()}"
        )
        totals["blocks"] += 1
        totals["elements"] += found.size
        totals[f"resolved, {block.kind}"] += resolved
    print(f"{to}: {dict(totals)}, 0 wrong")
    assert totals["resolved, grid"] > 0
    assert totals["resolved, cancelling"] > 0


@pytest.mark.parametrize("to", _FORMATS)
def test_every_element_of_large_blocks(to):
    run(to, range(100))


@pytest.mark.parametrize("to", ["BF16", "F16"])
def test_every_element_without_binary32(to):
    run(to, range(100, 150), first=False)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("to", _FORMATS)
def test_every_element_of_many_large_blocks(to, part):
    run(to, range(1000 + 834 * part, 1000 + 834 * (part + 1)))


def mistakes(to: str, kind: str, *, unit: float | None = None, first: bool = False) -> int:
    """How many elements of some blocks of a kind are wrong."""
    wrong = 0
    for seed in range(KINDS.index(kind), 60, len(KINDS)):
        block = Block(seed, to)
        found, _ = block.computed(unit=unit, first=first)
        wrong += int((found != block.expected()).sum())
    print(f"{to}, {kind}: {wrong} wrong")
    return wrong


@pytest.mark.parametrize("to", _FORMATS)
def test_a_scan_that_ignores_the_error_is_caught(to):
    assert mistakes(to, "cancelling", unit=0.0) > 0


@pytest.mark.parametrize("to", ["BF16", "F16"])
def test_a_scan_without_ties_is_caught(to, monkeypatch):
    # No shifted pattern equals 1: the ties go unseen, the threshold stays.
    monkeypatch.setattr(rounding, "_MIN_INT32", np.int32(1))
    assert mistakes(to, "grid") > 0


def test_a_scan_without_subnormal_ties_is_caught(monkeypatch):
    monkeypatch.setattr(rounding, "_flag_subnormal_ties", lambda values, flags: None)
    assert mistakes("F16", "subnormal") > 0


def test_rounding_twice_is_caught(monkeypatch):
    monkeypatch.setattr(delta_sum, "to_odd_double", lambda high, low: high)
    assert mistakes("BF16", "grid") > 0


@pytest.mark.parametrize("to", ["BF16", "F16"])
def test_an_interval_without_the_error_of_the_products_is_caught(to, monkeypatch):
    interval = single.SingleSum.interval

    def narrow(self, row, count, peak, to):
        found = interval(self, row, count, peak, to)
        return None if found is None else found * 1e-6

    monkeypatch.setattr(single.SingleSum, "interval", narrow)
    assert mistakes(to, "cancelling", first=True) > 0


def test_open_points_decided_without_their_error_are_caught(monkeypatch):
    double_at = delta_sum.DeltaSum.double_at

    def sure(self, rows, columns, start):
        computed, errors = double_at(self, rows, columns, start)
        return computed, errors * 0

    monkeypatch.setattr(delta_sum.DeltaSum, "double_at", sure)
    assert mistakes("BF16", "cancelling", first=True) > 0


@pytest.mark.parametrize(("allowed", "served"), [("ieee", True), ("bf16", False), ("tf32", False)])
def test_products_that_may_be_less_than_binary32_are_not_taken_for_it(allowed, served):
    ones = torch.ones((2, 2), dtype=torch.float64)
    one = surd.Surd(coefficient=Fraction(1))
    term = low_rank.LowRankTerm(left=ones, right=ones, scale=one, exact_products=True)
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = allowed
    try:
        assert (delta_sum.DeltaSum([term], 2).single is not None) == served
    finally:
        products.fp32_precision = before


def test_lost_signs_of_zero_are_caught():
    """−0 where nothing is added stays −0; where terms cancel the sum is +0: as exact arithmetic says."""
    start = torch.tensor([[-0.0, 0.0, 1.0, -0.0]], dtype=torch.bfloat16)
    term = low_rank.LowRankTerm(
        left=torch.tensor([[1.0]], dtype=torch.float64),
        right=torch.tensor([[0.0, 0.0, -1.0, 2.0**-160]], dtype=torch.float64),
        scale=surd.Surd.of(Fraction(1), 1),
        exact_products=True,
    )
    bf16 = PACKAGE_FORMATS["BF16"]
    rounder = rounding.BlockRounder(delta_sum.DeltaSum([term], 1), columns=4, start=bf16, to=bf16)
    out = torch.empty_like(start)
    assert rounder._first is not None
    assert rounder.round_rows(start, out, 0) is None
    assert out.view(torch.int16).tolist() == [[-32768, 0, 0, 0]]
