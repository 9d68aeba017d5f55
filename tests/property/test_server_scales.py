"""Whatever ranks, alphas and rules modules have: a server's own reading gives back every scale, exactly."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_tools.linalg.surd import Surd, scaling_of
from adapterhub_tools.ops.low_rank import RULES
from adapterhub_tools.ops.server_scales import (
    ONE,
    Product,
    ScalePlan,
    is_power_of_two,
    plan_scales,
    quotient,
)

alphas = st.one_of(
    st.integers(1, 512).map(float), st.sampled_from([0.1, 0.5, 1e-3, 16.0, 3.7]), st.just(-2.0), st.just(0.0)
)
modules = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.integers(1, 96), alphas), min_size=1, max_size=6
)


def product(value: Surd, by: Surd) -> Surd:
    return Surd.of(value.coefficient * by.coefficient, value.radicand * by.radicand)


def read(plan: ScalePlan, path: str, one_rank: bool) -> Surd:
    """The scale that a server finds: one alpha over the rank of the tensor, or of the whole adapter."""
    ranks = {item.rank for item in plan.modules.values()}
    assert not one_rank or len(ranks) == 1
    return scaling_of(plan.alpha, plan.modules[path].rank, plan.rule)


@settings(max_examples=400, deadline=None)
@given(modules, st.sampled_from(RULES), st.booleans(), st.booleans(), st.sampled_from([24, 53]))
def test_scale_times_multiplier_is_the_scale(
    given_modules: dict[str, tuple[int, float]], rule: str, one_rank: bool, rslora: bool, bits: int
) -> None:
    products = {
        path: Product(scale=scaling_of(alpha, rank, rule), rank=rank)
        for path, (rank, alpha) in given_modules.items()
    }
    plan = plan_scales(products, one_rank=one_rank, alpha_bits=bits, rslora=rslora, rule=rule)
    assert plan.rule == RULES[0] or rslora
    assert plan.alpha > 0
    assert Fraction(plan.alpha).numerator.bit_length() <= bits
    for path, item in products.items():
        made = plan.modules[path]
        assert made.rank >= item.rank
        back = product(read(plan, path, one_rank), made.factor)
        assert back.coefficient == item.scale.coefficient
        assert back.radicand == item.scale.radicand or back.coefficient == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 96), alphas.filter(lambda a: a > 0), st.integers(2, 5), st.sampled_from(RULES))
def test_what_a_server_takes_as_it_is_stays_as_it_is(rank: int, alpha: float, count: int, rule: str) -> None:
    products = {str(i): Product(scale=scaling_of(alpha, rank, rule), rank=rank) for i in range(count)}
    plan = plan_scales(products, one_rank=True, alpha_bits=53, rslora=True, rule=rule)
    assert (plan.alpha, plan.rule) == (alpha, rule)
    assert all(item.factor == ONE and item.rank == rank for item in plan.modules.values())


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 20), st.integers(1, 20))
def test_quotients(top: int, bottom: int, left: int, right: int) -> None:
    value, by = Surd.of(Fraction(top, 7), left), Surd.of(Fraction(bottom, 3), right)
    assert product(quotient(value, by), by) == value
    assert quotient(value, value) == ONE


def test_powers_of_two() -> None:
    exact = [Fraction(1), Fraction(1, 8), Fraction(-4), Fraction(0)]
    assert all(is_power_of_two(Surd(coefficient=value)) for value in exact)
    assert not is_power_of_two(Surd(coefficient=Fraction(3, 2)))
    assert not is_power_of_two(Surd(coefficient=Fraction(1), radicand=2))
