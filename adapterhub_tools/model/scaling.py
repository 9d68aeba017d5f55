"""The effective scale of an adapter as one binary64, correctly rounded: for reports and digests."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import isqrt
from typing import Any

_BITS = 128


def effective_scale(alpha: float, rank: int, rule: str) -> float:
    """Returns s = alpha / rank, alpha / √rank (rsLoRA) or alpha, rounded once to nearest even.

    Args:
        alpha: the JSON number; an integer counts as its nearest binary64.
        rank: the rank, positive.
        rule: ``"alpha/rank"``, ``"alpha/sqrt(rank)"`` or ``"alpha"``.

    Raises:
        ValueError: the rule has another name.
    """
    top = Fraction(float(alpha))
    if rule == "alpha":
        return float(top)
    if rule == "alpha/rank":
        return float(top / rank)
    if rule != "alpha/sqrt(rank)":
        raise ValueError(f"unknown scaling rule: {rule!r}")
    root = isqrt(rank)
    if root * root == rank:
        return float(top / root)
    # An irrational value is never a tie, so some precision puts both ends of its interval on one double.
    bits = _BITS
    while True:
        low = isqrt(rank << (2 * bits))
        ends = {float(top * (1 << bits) / low), float(top * (1 << bits) / (low + 1))}
        if len(ends) == 1:
            return ends.pop()
        bits *= 2


def scale_of(hparams: Mapping[str, Any]) -> float | None:
    """Returns the effective scale of a module's hyperparameters; None for a method that has none."""
    rank, alpha = hparams.get("rank"), hparams.get("alpha")
    if rank is None or alpha is None or rank < 1:
        return None
    return effective_scale(alpha, rank, hparams.get("scaling", "alpha/rank"))
