"""Policies: their definitions, their ranges, and the allotment of a budget."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from adapterhub_tools.errors import MismatchError
from adapterhub_tools.ops.rank_policy import Budget, Claim, RankPolicy, allot

VALUES = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("policy", "rank"),
    [
        ({"energy": 0.75}, 1),
        ({"energy": 0.76}, 2),
        ({"energy": 1.0}, 4),
        ({"max_error": 0.5}, 1),
        ({"max_error": 0.25}, 2),
        ({"max_error": 0.0}, 4),
        ({"sv_ratio": 1.0}, 1),
        ({"sv_ratio": 3.0}, 2),
        ({"sv_ratio": 5.0}, 3),
        ({"sv_ratio": 100.0}, 4),
        ({"sv_cumulative": 0.5}, 1),
        ({"sv_cumulative": 0.8}, 2),
        ({"sv_cumulative": 0.9}, 3),
        ({"sv_fro": 0.86}, 1),
        ({"sv_fro": 0.9}, 2),
    ],
)
def test_ranks_of_one_module(policy: dict[str, float], rank: int) -> None:
    assert RankPolicy.of(**policy).rank_of(VALUES) == rank  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"rank": 4, "energy": 0.5},
        {"energy": 0.0},
        {"energy": 1.01},
        {"energy": float("nan")},
        {"max_error": -0.1},
        {"sv_ratio": 0.5},
        {"rank": 0},
        {"rank": "four"},
        {"rank": ["4", "8"]},
        {"rank": ["q=4", "q=8"]},
        {"rank": "=4"},
        {"budget": "lots"},
        {"budget": "0%"},
        {"budget": "-1M"},
    ],
)
def test_impossible_policies_are_refused(policy: dict[str, object]) -> None:
    with pytest.raises(MismatchError):
        RankPolicy.of(**policy)  # type: ignore[arg-type]


def test_rank_patterns_read_as_pefts() -> None:
    policy = RankPolicy.of(rank=["8", "q_proj=4", r"layers\.0\..*=2"])
    found = policy.fixed_ranks(["m.layers.0.k_proj", "m.layers.0.q_proj", "m.layers.1.k_proj"])
    assert found == {"m.layers.0.k_proj": 2, "m.layers.0.q_proj": 4, "m.layers.1.k_proj": 8}
    with pytest.raises(MismatchError, match="nowhere"):
        RankPolicy.of(rank="nowhere=4").fixed_ranks(["a.b"])


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("50%", 0.5, "share"),
        ("2M", 2e6, "values"),
        ("1500", 1500, "values"),
        ("8MiB", 8 * 2**20, "bytes"),
        ("1.5 kB", 1500, "bytes"),
    ],
)
def test_budgets(text: str, amount: float, unit: str) -> None:
    assert Budget.parse(text) == Budget(amount=amount, unit=unit)


def test_an_allotment_is_the_best_of_all_where_costs_are_equal() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        spectra = [sorted(torch.rand(4, generator=generator).tolist(), reverse=True) for _ in range(3)]
        claims = [Claim(values=values, cost=10.0) for values in spectra]
        ranks = allot(claims, 70.0)
        assert sum(ranks) == 7

        def kept(choice: tuple[int, ...], spectra: list[list[float]] = spectra) -> float:
            return sum(sum(v * v for v in s[:r]) for s, r in zip(spectra, choice, strict=True))

        best = max(kept(choice) for choice in product(range(1, 5), repeat=3) if sum(choice) <= 7)
        assert kept(tuple(ranks)) == pytest.approx(best)


def test_an_allotment_keeps_the_budget_and_fills_what_still_fits() -> None:
    claims = [Claim(values=[9.0, 8.0, 7.0], cost=100.0), Claim(values=[1.0, 0.9, 0.8], cost=10.0)]
    assert allot(claims, 135.0) == [1, 3]  # a second rank of the first costs too much
    assert allot(claims, 1e9) == [3, 3]
    with pytest.raises(MismatchError, match="larger budget"):
        allot(claims, 109.0)
    assert allot([Claim(values=[0.0, 0.0], cost=1.0)], 5.0) == [1]
