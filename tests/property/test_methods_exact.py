"""Every exact method gives the correctly rounded value of its formula, bit for bit as the oracle does."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_tools import registry
from adapterhub_tools.errors import LossyError, UnsupportedError
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS, round_double, round_fraction
from adapterhub_tools.linalg.root_ratio import Quadratic, round_root_ratio
from adapterhub_tools.linalg.rounding import BlockRounder
from adapterhub_tools.linalg.weight import Weight
from tests.property.exact_oracle import FORMATS as ORACLE_FORMATS
from tests.property.method_cases import check_bounds, nearest, of_root, run
from tests.property.method_formulas import CASES

SEEDS = 120


def method(name: str, **hparams):
    return registry.load("methods", name).IMPLEMENTATION.from_hparams(hparams)


@pytest.mark.parametrize("name", CASES)
def test_small_cases_of_every_flavour(name: str) -> None:
    kinds: Counter = Counter()
    for seed in range(SEEDS):
        run(CASES[name](random.Random(seed)), kinds)
    assert kinds["elements"] > 4 * SEEDS
    for kind in ("overflow", "minus zero", "exact zero", "subnormal", "non-zero to zero"):
        assert kinds[kind], kind
    # AdaLoRA's scale has 1e-5 in its denominator, so only other numbers' midpoints can be hit: hardly ever.
    assert kinds["tie"] or name == "adalora"
    if name == "dora":
        assert kinds["refused"]


@pytest.mark.parametrize("name", CASES)
def test_float64_stays_within_the_bounds(name: str) -> None:
    """What the bounds exclude is never looked at again, so they must hold wherever they are finite."""
    finite = total = 0
    for seed in range(SEEDS):
        case = CASES[name](random.Random(seed))
        if not case.refused:
            some, every = check_bounds(case)
            finite, total = finite + some, total + every
    assert finite > 0.9 * total


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_device_gives_the_same_bits(name: str) -> None:
    for seed in range(SEEDS):
        run(CASES[name](random.Random(seed)), Counter(), device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(min_value=0, max_value=2**63))
@settings(max_examples=1500, deadline=None)
def test_small_cases_of_any_seed(name: str, seed: int) -> None:
    run(CASES[name](random.Random(seed)), Counter())


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_small_cases_that_shrink(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CASES)))
    run(CASES[name](data.draw(st.randoms(use_true_random=False))), Counter())


def reader(start: torch.Tensor):
    """Reads rows into memory of their own, as the engine does."""
    return lambda first, count: start[first : first + count].to(torch.float64, copy=True)


def merged(expression, start: torch.Tensor, to: torch.dtype) -> tuple[torch.Tensor, int]:
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
    out = torch.empty(start.shape, dtype=to)
    rounder = BlockRounder(
        expression, columns=start.shape[1], start=FORMATS[names[start.dtype]], to=FORMATS[names[to]]
    )
    assert rounder.round_rows(start, out, 0) is None
    return out, rounder.resolved


def test_gains_of_bf16_tie_often_and_all_are_right() -> None:
    """A product of two 8-bit numbers is exact in float64, so its rounding is known at once."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, 1000, generator=generator).bfloat16()
    gains = torch.randn(300, 1, generator=generator).bfloat16()
    weight = Weight(kind="linear", shape=tuple(start.shape))
    expression = method("ia3", feedforward=False).expression({"l": gains}, weight)
    found, resolved = merged(expression, start, torch.bfloat16)
    exact = (start.double() * gains.double()).numpy()
    right = round_double(exact, FORMATS["BF16"])
    assert np.array_equal(found.view(torch.int16).numpy().view(np.uint16), right)
    assert resolved > 500


@pytest.mark.parametrize(
    ("kind", "name"), [("linear", "BF16"), ("linear", "F32"), ("conv1d", "F16"), ("conv1d", "F32")]
)
def test_dora_lines_longer_than_a_group_are_right(kind: str, name: str) -> None:
    """Some points of real sizes, against exact fractions and squares."""
    to = ORACLE_FORMATS[name]
    generator = torch.Generator().manual_seed(1)
    out, inner, rank = 12, 9_000, 3
    a = torch.randn(rank, inner, generator=generator) * 0.02
    b = torch.randn(out, rank, generator=generator)
    base = (torch.randn(out, inner, generator=generator) * 0.03).to(to.torch)
    start = base if kind == "linear" else base.t().contiguous()
    magnitude = torch.rand(out, generator=generator) * 5
    weight = Weight(kind=kind, shape=tuple(start.shape), read_rows=reader(start))
    factors = {"A": a, "B": b, "magnitude": magnitude}
    expression = method("dora", rank=rank, alpha=6).expression(factors, weight)
    out_patterns = to.patterns(merged(expression, start, to.torch)[0])
    found = out_patterns if kind == "linear" else out_patterns.T
    for row in (0, 11):
        own = [Fraction(x) for x in b[row].tolist()]
        line = [
            Fraction(w) + 2 * sum(x * Fraction(y) for x, y in zip(own, column, strict=True))
            for w, column in zip(base[row].tolist(), a.t().tolist(), strict=True)
        ]
        square = sum(x * x for x in line)
        assert abs(float(expression.norms[row]) / float(square) ** 0.5 - 1) < 1e-12
        for column in range(0, inner, 67):
            compare = of_root(Fraction(0), Fraction(float(magnitude[row])), line[column], square)
            assert found[row, column] == nearest(compare, to, zero=0)[0]


def test_a_row_with_one_weight_is_its_magnitude() -> None:
    start = torch.tensor([[0.0, -3.0, 0.0], [0.0, 0.0, 7.0]], dtype=torch.bfloat16)
    magnitude = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])  # midpoints of bfloat16
    factors = {"A": torch.zeros(2, 3), "B": torch.zeros(2, 2), "magnitude": magnitude}
    weight = Weight(kind="linear", shape=(2, 3), read_rows=reader(start))
    found, _ = merged(method("dora", rank=2, alpha=2).expression(factors, weight), start, torch.bfloat16)
    assert found.tolist() == [[0.0, -1.0, 0.0], [0.0, 0.0, 1 + 2.0**-6]]


@given(
    st.fractions(min_value=-8, max_value=8, max_denominator=64),
    st.fractions(min_value=-8, max_value=8, max_denominator=64),
    st.integers(1, 40),
    st.sampled_from(sorted(FORMATS)),
)
@settings(max_examples=150)
def test_rational_roots_round_like_fractions(top: Fraction, gain: Fraction, root: int, name: str) -> None:
    square = Quadratic(u=Fraction(root * root))
    value, sign = round_root_ratio(Fraction(1, 3), gain, Quadratic(u=top), square, FORMATS[name])
    exact = Fraction(1, 3) + gain * top / root
    assert value == round_fraction(exact, FORMATS[name])
    assert sign == (exact > 0) - (exact < 0)


def test_roots_of_one_field_cancel_exactly() -> None:
    """(1 + √2)/√((1 + √2)²) is 1, a tie where the gain is a midpoint."""
    top = Quadratic(u=Fraction(1), v=Fraction(1), d=2)
    half = Fraction(1) + Fraction(1, 2**8)
    value, sign = round_root_ratio(Fraction(0), half, top, top.squared(), FORMATS["BF16"])
    assert (value, sign) == (1.0, 1)
    value, sign = round_root_ratio(-half, half, top, top.squared(), FORMATS["BF16"])
    assert (value, sign) == (0.0, 0)
    limit = Fraction(2) ** 16 - Fraction(2) ** 4
    value, _ = round_root_ratio(Fraction(0), limit, top, top.squared(), FORMATS["F16"])
    assert value == float("inf")


def test_float64_factors_beyond_its_range_are_refused() -> None:
    factors = {
        "A": torch.full((1, 2), 1e200, dtype=torch.float64),
        "B": torch.ones(2, 1, dtype=torch.float64),
        "E": torch.full((1, 1), 1e-200, dtype=torch.float64),
    }
    with pytest.raises(UnsupportedError, match="float64") as caught:
        method("adalora", init_r=1, alpha=1).delta(factors, Weight(kind="linear", shape=(2, 2)))
    assert caught.value.problems[0].remedy


INVERTIBLE = ("ia3", "hira", "dora")


BOTH_LAYOUTS = ("lora", "adalora", "lora_merged_linear", *INVERTIBLE)


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in BOTH_LAYOUTS for k in ("linear", "conv1d")] + [("loha", "linear"), ("lokr", "linear")],
)
def test_inverse_gives_the_base_back(name: str, kind: str, multiplier: float) -> None:
    """A float32 merge is taken back to within a few units of float32."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    out, inner, rank = 12, 8, 2
    factors = {
        "lora": {"A": draw(rank, inner), "B": draw(out, rank)},
        "adalora": {"A": draw(rank, inner), "B": draw(out, rank), "E": draw(rank, 1)},
        "loha": {
            f"w{n}_{s}": draw(*shape) for n in "12" for s, shape in (("a", (out, rank)), ("b", (rank, inner)))
        },
        "lokr": {"w1": draw(3, 2), "w2": draw(4, 4)},
        "lora_merged_linear": {"A": draw(rank * 2, inner), "B": draw(8, rank, 1)},
        "ia3": {"l": draw(out, 1) + 1.5},
        "hira": {"A": draw(rank, inner), "B": draw(out, rank)},
        "dora": {"A": draw(rank, inner), "B": draw(out, rank), "magnitude": draw(out) + 2},
    }[name]
    hparams = {
        "rank": rank,
        "alpha": 3.0,
        "init_r": 4,
        "enable_lora": [True, False, True],
        "feedforward": False,
    }
    start = draw(out, inner) if kind == "linear" else draw(inner, out)
    weight = Weight(
        kind=kind,
        shape=tuple(start.shape),
        read_rows=reader(start),
    )
    forth = method(name, **hparams, multiplier=multiplier)
    back = method(name, **hparams, multiplier=-multiplier)
    if forth.additive:
        there, again = (DeltaSum([m.delta(factors, weight)], start.shape[0]) for m in (forth, back))
        result, _ = merged(there, start, torch.float32)
    else:
        there = forth.expression(factors, weight)
        result, _ = merged(there, start, torch.float32)
        aux = {"norms": torch.from_numpy(there.norms)} if name == "dora" else {}
        again = forth.inverse(factors, weight, aux)
    assert not torch.equal(result, start)
    restored, _ = merged(again, result, torch.float32)
    largest = max(float(result.abs().max()), float(start.abs().max()))
    gain = 20 if name in INVERTIBLE else 2
    assert float((restored - start).abs().max()) <= gain * 2.0**-24 * largest


@pytest.mark.parametrize("name", ["ia3", "hira", "dora"])
def test_what_cannot_be_taken_back_is_an_error(name: str) -> None:
    factors = {
        "ia3": {"l": torch.zeros(2, 1)},
        "hira": {"A": torch.ones(1, 2), "B": -torch.ones(2, 1)},
        "dora": {"A": torch.ones(1, 2), "B": torch.ones(2, 1), "magnitude": torch.zeros(2)},
    }[name]
    weight = Weight(kind="linear", shape=(2, 2))
    aux = {"norms": torch.ones(2, dtype=torch.float64)}

    def take_back() -> None:
        inverse = method(name, rank=1, alpha=1.0, feedforward=False).inverse(factors, weight, aux)
        merged(inverse, torch.ones(2, 2), torch.float32)

    with pytest.raises(LossyError) as caught:
        take_back()
    assert caught.value.problems[0].remedy
    if name == "dora":
        with pytest.raises(LossyError, match="norms"):
            method(name, rank=1, alpha=1.0).inverse(factors, weight, {})
