"""Ranks, alphas and multipliers under which a server finds the scales that an adapter's modules have.

A server that reads one alpha finds s' = alpha/rank (or alpha/√rank) for every module. Where a module's own
scale s differs, its B is multiplied by s/s', and where ranks have to be the same, zeros fill the factors up.
Padding is exact, and so is a multiplier that is a power of two; others round each value of B once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.ops.low_rank import RULES, alpha_for

ONE = Surd(coefficient=Fraction(1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """The scale and the rank of one module.

    Attributes:
        scale: s.
        rank: the rank.
    """

    scale: Surd
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescaling:
    """How one module is written.

    Attributes:
        rank: its rank; above the one it has, zeros fill it up.
        factor: what its B is multiplied by.
    """

    rank: int
    factor: Surd


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePlan:
    """How all modules are written.

    Attributes:
        alpha: the one alpha.
        rule: how alpha and rank make the scale; one of RULES.
        modules: path -> how it is written.
    """

    alpha: float
    rule: str
    modules: dict[str, Rescaling]


def plan_scales(
    modules: Mapping[str, Product], *, one_rank: bool, alpha_bits: int, rslora: bool, rule: str = RULES[0]
) -> ScalePlan:
    """Returns ranks, alpha and multipliers; as many modules as possible keep their factors.

    Args:
        modules: path -> scale and rank, at least one.
        one_rank: whether the server reads one rank for all modules, and not that of each tensor.
        alpha_bits: the significant bits of alpha that the server keeps.
        rslora: whether it knows alpha/√rank.
        rule: the rule that the modules have, which is kept where both do.
    """
    rules = sorted(RULES if rslora else RULES[:1], key=lambda item: item != rule)
    highest = max(item.rank for item in modules.values())
    best: ScalePlan | None = None
    # A padded plan comes second: among equals the first is kept.
    for padded in (True,) if one_rank else (False, True):
        ranks = {path: highest if padded else item.rank for path, item in modules.items()}
        for chosen in rules:
            for scale, rank in dict.fromkeys((m.scale, ranks[path]) for path, m in modules.items()):
                alpha = alpha_for(scale, rank, chosen)
                if alpha is None or not _has_bits(alpha, alpha_bits):
                    continue
                plan = _plan(modules, ranks, alpha, chosen)
                if best is None or _cost(plan, modules) < _cost(best, modules):
                    best = plan
    folded = _plan(modules, dict.fromkeys(modules, highest), float(highest), RULES[0])
    if best is None or _cost(folded, modules)[0] < _cost(best, modules)[0]:
        return folded
    return best


def is_power_of_two(value: Surd) -> bool:
    """Tells whether multiplying a float by a number only changes its sign and exponent, or makes it zero."""
    top, bottom = abs(value.coefficient.numerator), value.coefficient.denominator
    return value.radicand == 1 and top & (top - 1) == 0 and bottom & (bottom - 1) == 0


def quotient(value: Surd, by: Surd) -> Surd:
    """Returns a/b: (c·√d)/(e·√f) = c/(e·f)·√(d·f)."""
    return Surd.of(value.coefficient / (by.coefficient * by.radicand), value.radicand * by.radicand)


def _plan(modules: Mapping[str, Product], ranks: Mapping[str, int], alpha: float, rule: str) -> ScalePlan:
    made = {}
    for path, item in modules.items():
        rank = ranks[path]
        given = Surd(coefficient=Fraction(alpha) / rank)
        if rule != RULES[0]:
            given = Surd.of(Fraction(alpha) / rank, rank)
        made[path] = Rescaling(rank=rank, factor=quotient(item.scale, given))
    return ScalePlan(alpha=alpha, rule=rule, modules=made)


def _cost(plan: ScalePlan, modules: Mapping[str, Product]) -> tuple[int, int, int]:
    """Returns how many modules are rounded, how many are multiplied, and how many values are added."""
    factors = [item.factor for item in plan.modules.values()]
    rounded = sum(not is_power_of_two(factor) for factor in factors)
    changed = sum(factor != ONE for factor in factors)
    return rounded, changed, sum(item.rank - modules[path].rank for path, item in plan.modules.items())


def _has_bits(value: float, bits: int) -> bool:
    """Tells whether a number has so few significant bits, and an exponent of binary32 where these are 24."""
    top, bottom = value.as_integer_ratio()
    while top and top % 2 == 0:
        top //= 2
    return abs(top).bit_length() <= bits and (bits > 24 or (bottom <= 1 << 126 and abs(value) < 2.0**127))
