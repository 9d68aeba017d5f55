"""Ranks for matrices that are read by row blocks: the sketch grows until the policy is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub_tools.ops.rank_policy import RankPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.randomized_svd import Approximation, RowBlocks

FIRST_GUESS = 16
"""The rank that is tried first where the policy does not tell it; doubled until the policy is met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """An approximation, and how many of its triplets the policy asks for.

    Attributes:
        approximation: the triplets, at least ``rank`` of them.
        rank: the rank.
        met: False where ``limit`` came first.
    """

    approximation: Approximation
    rank: int
    met: bool = True


def approximate(
    source: RowBlocks, policy: RankPolicy, *, rank: int | None, limit: int | None = None, seed: int = 0
) -> Ranked:
    """Returns the leading triplets of a matrix, as many as a policy asks for.

    Args:
        source: the matrix.
        policy: the policy; read only where ``rank`` is None.
        rank: the rank, if it is known.
        limit: the largest rank allowed.
        seed: of the sketches.
    """
    from adapterhub_tools.linalg.randomized_svd import dense_svd, randomized_svd

    full = min(source.shape)
    most = full if limit is None else max(1, min(limit, full))
    if rank is not None:
        kept = min(rank, most)
        return Ranked(approximation=randomized_svd(source, kept, seed=seed), rank=kept, met=rank <= most)
    if policy.name == "sv_cumulative":  # a share of the sum of all values needs them all
        whole = dense_svd(source, full)
        wanted = policy.rank_of(whole.svd.s)
        return Ranked(approximation=whole, rank=min(wanted, most), met=wanted <= most)
    guess = min(FIRST_GUESS, most)
    while True:
        found = randomized_svd(source, guess, seed=seed)
        wanted = policy.rank_of(found.svd.s, total=found.total)
        if _is_met(policy, found.svd.s, found.total, wanted) or found.total == 0.0:
            return Ranked(approximation=found, rank=min(wanted, found.svd.rank))
        if guess >= most:
            return Ranked(approximation=found, rank=most, met=most == full)
        guess = min(2 * guess, most)


def _is_met(policy: RankPolicy, values: Tensor, total: float, rank: int) -> bool:
    """Tells whether the values at hand show that the policy is met at a rank."""
    kept = float((values[:rank] ** 2).sum())
    amount = policy.value or 0.0
    if policy.name == "sv_ratio":
        return rank < int(values.shape[0])
    if policy.name == "max_error":
        # Below 10^-8 the difference of two squares is noise; a full sketch has then caught all there is.
        return total - kept <= max(amount * amount, 1e-15) * total
    share = amount * amount if policy.name == "sv_fro" else amount
    return kept >= share * total * (1 - 1e-15)
