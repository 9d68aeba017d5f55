"""The way back that a merge finds beside its result is the exact one: every element of adversarial blocks."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest

from adapterhub_tools.linalg import single, single_back
from adapterhub_tools.linalg.flagged import flagged
from adapterhub_tools.linalg.formats import FORMATS as PACKAGE_FORMATS
from adapterhub_tools.linalg.point_rounder import PointRounder
from tests.property.block_cases import COLUMNS, KINDS, Block
from tests.property.exact_oracle import FORMATS, Part, merged_matrix

if TYPE_CHECKING:
    import torch


def blocks(to: str, seeds: range) -> list[Block]:
    """Blocks that start in the format that they end in."""
    return [block for block in (Block(seed, to) for seed in seeds) if block.start_format == to]


def exact_way_back(block: Block, out: torch.Tensor) -> np.ndarray:
    """The result less the delta, correctly rounded, by integer arithmetic."""
    scale = Part(coefficient=-block.scale.coefficient, root=block.scale.root)
    return merged_matrix(out.double().numpy(), block.left, block.right, scale, FORMATS[block.to])


def mistakes(block: Block, totals: Counter) -> int:
    """How many elements of the way back are wrong."""
    done = block.rounded(back=True)
    way = done.rounder.way_back
    if way is None:
        totals["without"] += 1
        return 0
    predicted = FORMATS[block.to].patterns(done.start).copy().reshape(-1)
    assert (way.start == predicted[way.places]).all()
    assert (np.diff(way.places) > 0).all()
    rows, columns = np.divmod(way.places[way.undecided], COLUMNS)
    points = PointRounder(done.expression.negated(), PACKAGE_FORMATS[block.to])
    predicted[way.places] = way.bits
    predicted[way.places[way.undecided]] = points.round(
        rows, columns, done.out[rows, columns].double().numpy()
    )
    totals["elements"] += predicted.size
    totals["places"] += len(way.places)
    totals["undecided"] += len(way.undecided)
    return int((predicted != exact_way_back(block, done.out).reshape(-1)).sum())


@pytest.mark.parametrize("to", ["BF16", "F16"])
def test_every_element(to, monkeypatch):
    monkeypatch.setattr(single_back, "_OPEN_SHARE", 1.0)
    totals: Counter = Counter()
    for block in blocks(to, range(120)):
        assert mistakes(block, totals) == 0, f"{block.kind}, {block.factor_format} factors"
    print(to, dict(totals))
    assert totals["undecided"] > 0
    assert totals["places"] < totals["elements"]


@pytest.mark.parametrize("to", ["BF16", "F16"])
def test_a_sum_without_its_error_is_caught(to, monkeypatch):
    monkeypatch.setattr(single_back, "_OPEN_SHARE", 1.0)
    monkeypatch.setattr(single.SingleSum, "product_error", lambda self, row, count: 0.0)
    monkeypatch.setattr(single_back, "_ROUNDINGS", 0.0)
    assert sum(mistakes(block, Counter()) for block in blocks(to, range(120))) > 0


@pytest.mark.parametrize("to", ["BF16", "F16"])
def test_ties_that_are_forgotten_are_caught(to, monkeypatch):
    monkeypatch.setattr(single_back, "_OPEN_SHARE", 1.0)
    finish = single_back.BackPass.finish
    monkeypatch.setattr(
        single_back.BackPass,
        "finish",
        lambda self, start, result, error, ties: finish(self, start, result, error * 0, ties[:0]),
    )
    monkeypatch.setattr(single_back, "_ROUNDINGS", 0.0)
    grid = blocks(to, range(KINDS.index("grid"), 240, len(KINDS)))
    assert sum(mistakes(block, Counter()) for block in grid) > 0


def test_too_many_open_places_leave_no_way_back():
    totals: Counter = Counter()
    for block in blocks("BF16", range(KINDS.index("cancelling"), 60, len(KINDS))):
        mistakes(block, totals)
    assert totals["without"] > 0


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.099, 0.101, 0.5, 1.0])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4096, 100_003])
def test_flagged_places_are_those_that_are_set(share, size):
    flags = np.random.default_rng(size).random(size) < share
    assert flagged(flags).tolist() == [place for place, flag in enumerate(flags.tolist()) if flag]
