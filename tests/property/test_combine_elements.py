"""Element-wise combinations: against dense formulas, against PEFT's, and laws."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from adapterhub_tools import registry
from adapterhub_tools.linalg import order_statistics
from adapterhub_tools.linalg.combined_rows import CombinedRows, DeltaInput
from adapterhub_tools.linalg.counter_random import random_bits, stream_key
from adapterhub_tools.linalg.order_statistics import magnitudes_at
from adapterhub_tools.linalg.panels import panel_range, panels_of
from tests.property import combine_formulas as dense

ELEMENTWISE = tuple(
    name
    for name in registry.names("combine")
    if registry.load("combine", name).IMPLEMENTATION.kind == "elementwise"
)
NAME = "model.layers.0.self_attn.q_proj"


@dataclass
class DensePanels:
    """A matrix in memory as Panels; counts how often it is read."""

    matrix: Tensor
    reads: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.matrix.shape[0], self.matrix.shape[1])

    def panel(self, number: int) -> Tensor:
        self.reads.append(number)
        first, last = panel_range(number, self.shape)
        return self.matrix[first:last].clone()

    def points(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.matrix[rows[:, :, None], columns[:, None, :]]

    def blocks(self) -> Any:
        for number in range(panels_of(self.shape)):
            yield panel_range(number, self.shape)[0], self.panel(number)


def method_of(name: str, **options: Any) -> Any:
    return registry.load("combine", name).IMPLEMENTATION.from_options(options)


def combined(name: str, deltas: list[Tensor], keys: list[bytes] | None = None, **options: Any) -> np.ndarray:
    keys = keys or [b"adapter %d" % i for i in range(len(deltas))]
    inputs = [DeltaInput(delta=DensePanels(d), key=key) for d, key in zip(deltas, keys, strict=True)]
    rows = CombinedRows(method_of(name, **options), inputs, NAME)
    return torch.cat([block.clone() for _, block in rows.blocks()]).numpy()


def matrices(count: int, rows: int, columns: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(count)]


def expected(name: str, deltas: list[np.ndarray], options: dict[str, Any]) -> np.ndarray:
    density, majority = options.get("density"), options.get("majority_sign", "total")
    bits = [
        dense.uniform_bits(options.get("seed", 0), b"adapter %d" % i, NAME, d.size)
        if "seed" in options
        else []
        for i, d in enumerate(deltas)
    ]
    if name == "ties":
        return dense.elected_mean([dense.kept_largest(d, density) for d in deltas], majority)
    if name == "magnitude_prune":
        return np.sum([dense.kept_largest(d, density) for d in deltas], axis=0)
    if name == "breadcrumbs":
        return np.sum([dense.kept_middle(d, density, options["gamma"]) for d in deltas], axis=0)
    if name == "della":
        pruned = [
            dense.magnitude_dropped(d, density, options["epsilon"], b)
            for d, b in zip(deltas, bits, strict=True)
        ]
        return dense.elected_mean(pruned, majority)
    pruned = [dense.dropped(d, density, b) for d, b in zip(deltas, bits, strict=True)]
    return dense.elected_mean(pruned, majority) if name == "dare_ties" else np.sum(pruned, axis=0)


CASES = [
    ("ties", {"density": 0.2}),
    ("ties", {"density": 0.5, "majority_sign": "frequency"}),
    ("ties", {"density": 1.0}),
    ("magnitude_prune", {"density": 0.3}),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.0}),
    ("dare_linear", {"density": 0.4, "seed": 7}),
    ("dare_ties", {"density": 0.4, "majority_sign": "frequency", "seed": 2**64 - 1}),
    ("della", {"density": 0.5, "epsilon": 0.3, "seed": 3}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_dense_formula(name: str, options: dict[str, Any], count: int) -> None:
    deltas = matrices(count, 23, 17, seed=count)
    found = combined(name, deltas, **options)
    np.testing.assert_allclose(
        found, expected(name, [d.numpy() for d in deltas], options), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "della"])
def test_the_dense_formula_over_several_panels(name: str, options: dict[str, Any]) -> None:
    if "seed" in options:
        options = {
            **options,
            "density": 1.0,
        }  # the oracle's own numbers would take minutes; blocks: see below
    deltas = matrices(2, 700, 801, seed=5)
    assert panels_of((700, 801)) > 2
    found = combined(name, deltas, **options)
    np.testing.assert_allclose(
        found, expected(name, [d.numpy() for d in deltas], options), rtol=1e-13, atol=0
    )


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(ELEMENTWISE),
    seed=st.integers(0, 2**20),
    count=st.integers(2, 4),
    density=st.sampled_from([0.15, 0.5, 0.8]),
    majority=st.sampled_from(["total", "frequency"]),
    small=st.booleans(),
)
def test_the_order_of_the_inputs_changes_no_bit(
    name: str, seed: int, count: int, density: float, majority: str, small: bool
) -> None:
    deltas = matrices(count, 6, 5, seed)
    if small:  # many equal values, zeros and cancelling sums
        deltas = [(d * 2).round() / 2 for d in deltas]
    options: dict[str, Any] = {"density": density}
    options |= {"majority_sign": majority} if name in ("ties", "dare_ties", "della") else {}
    keys = [b"adapter %d" % i for i in range(count)]
    results = {
        combined(name, [deltas[i] for i in order], [keys[i] for i in order], **options).tobytes()
        for order in permutations(range(count))
    }
    assert len(results) == 1


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(ELEMENTWISE), seed=st.integers(0, 2**20), small=st.booleans())
def test_negated_inputs_give_the_negated_result(name: str, seed: int, small: bool) -> None:
    deltas = matrices(3, 6, 5, seed)
    if small:
        deltas = [(d * 2).round() / 2 for d in deltas]
    found, other = combined(name, deltas), combined(name, [-d for d in deltas])
    np.testing.assert_array_equal(found, -other)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_ties_and_magnitude_prune_are_those_of_peft(density: float, count: int) -> None:
    """With weights alike and no equal magnitudes; PEFT elects before it weighs, here the weights vote too."""
    deltas = matrices(count, 40, 30, seed=9)
    ones = torch.ones(count, dtype=torch.float64)
    for majority in ("total", "frequency"):
        peft = merge_utils.ties(deltas, ones, density, majority)
        own = combined("ties", deltas, density=density, majority_sign=majority)
        sums = torch.stack([merge_utils.prune(d, density, "magnitude") for d in deltas])
        decided = (sums.sign() if majority == "frequency" else sums).sum(dim=0) != 0
        np.testing.assert_allclose(own[decided], peft.numpy()[decided], rtol=1e-13)
        assert not own[~decided].any()  # PEFT takes the positive side of a draw, the paper none
    peft = merge_utils.magnitude_prune(deltas, ones, density)
    np.testing.assert_allclose(combined("magnitude_prune", deltas, density=density), peft.numpy(), rtol=1e-13)


def test_dare_is_that_of_peft_with_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = matrices(2, 12, 10, seed=4)
    masks = iter(
        torch.tensor(dense.uniform_bits(1, b"adapter %d" % i, NAME, 120)).reshape(12, 10) < int(0.6 * 2**32)
        for i in (0, 1, 0, 1)
    )
    monkeypatch.setattr(torch, "bernoulli", lambda like: next(masks).to(like.dtype))
    ones = torch.ones(2, dtype=torch.float64)
    for name, peft in (("dare_linear", merge_utils.dare_linear), ("dare_ties", merge_utils.dare_ties)):
        wanted = peft(deltas, ones, 0.6).numpy()
        np.testing.assert_allclose(combined(name, deltas, density=0.6, seed=1), wanted, rtol=1e-13)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
def test_drops_depend_on_seed_adapter_tensor_and_place_alone(name: str) -> None:
    one = torch.full((600, 901), 0.5, dtype=torch.float64)
    whole = combined(name, [one], density=0.3, seed=5, **({"epsilon": 0.0} if name == "della" else {}))
    key = stream_key(5, b"adapter 0", NAME)
    bits = np.concatenate([random_bits(key, row * 901, 901) for row in range(600)]).reshape(600, 901)
    np.testing.assert_array_equal(whole != 0, bits < int(0.3 * 2**32))
    assert abs((whole != 0).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / one.numel())
    others = {
        stream_key(5, b"adapter 1", NAME),
        stream_key(6, b"adapter 0", NAME),
        stream_key(5, b"adapter 0", "x"),
    }
    assert len(others | {key}) == 4


@given(first=st.integers(0, 100), count=st.integers(1, 40), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_random_numbers_are_those_of_philox(first: int, count: int, seed: int) -> None:
    found = random_bits(stream_key(seed, b"who", "what"), first, count)
    assert found.tolist() == dense.uniform_bits(seed, b"who", "what", first + count)[first:]


def test_philox_has_its_published_answers() -> None:
    """Known answers of the authors' library Random123 1.09 (kat_vectors)."""
    assert dense.philox([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


def test_small_values_of_della_are_dropped_more_often() -> None:
    delta = torch.linspace(0.001, 1, 500, dtype=torch.float64).repeat(400, 1)
    found = combined("della", [delta], density=0.5, epsilon=0.8, seed=1)
    shares = (found != 0).mean(axis=0)
    for low, high in ((0, 50), (225, 275), (450, 500)):
        wanted = np.mean([0.5 + 0.8 * ((r + 0.5) / 500 - 0.5) for r in range(low, high)])
        assert abs(shares[low:high].mean() - wanted) < 0.02
    assert abs(found.mean(axis=0) - delta.numpy()[0]).mean() < 0.05  # what stays makes up for what goes


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    kind=st.sampled_from(["gaussian", "few values", "sparse", "rows", "tiny", "constant"]),
    share=st.floats(0, 0.999),
)
def test_the_kth_magnitude_is_exact(seed: int, kind: str, share: float) -> None:
    values = matrices(1, 300, 1100, seed)[0]
    if kind == "few values":
        values = (values * 3).round()
    elif kind == "sparse":
        values = torch.where(values > 2.5, values, 0.0)
    elif kind == "rows":
        values = values * torch.logspace(-30, 30, 300, dtype=torch.float64)[:, None]
    elif kind == "tiny":
        values = values * 1e-310
    elif kind == "constant":
        values = torch.full_like(values, -1.5)
    ranks = [int(share * values.numel()), values.numel() - 1, 0]
    wanted = np.sort(values.abs().numpy().reshape(-1))[ranks].tolist()
    assert list(magnitudes_at(DensePanels(values), ranks)) == wanted


def test_a_gaussian_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = DensePanels(matrices(1, 2000, 1000, 3)[0])
    magnitudes_at(source, [1_600_000])
    assert source.reads == list(range(panels_of(source.shape)))
    # A sample that misleads, and no room for candidates: passes over the bits, to the last digit if need be.
    monkeypatch.setattr(order_statistics, "KEPT_VALUES", 0)
    source.reads.clear()
    found = magnitudes_at(source, [1_600_000])[0]
    assert found == np.sort(source.matrix.abs().numpy().reshape(-1))[1_600_000]
    assert len(source.reads) == 5 * panels_of(source.shape)


@pytest.mark.parametrize("angle", [0.001, 0.5, 1.5, 3.0, np.pi])
def test_slerp_is_the_formula(angle: float) -> None:
    a, b = matrices(2, 5, 7, seed=1)
    b = b - a * float((a * b).sum() / (a * a).sum())
    b = 2 * (np.cos(angle) * a / a.norm() + np.sin(angle) * b / b.norm())
    gram = torch.stack([a.flatten(), b.flatten()]) @ torch.stack([a.flatten(), b.flatten()]).t()
    method = method_of("slerp")
    for t in (0.0, 0.25, 0.5, 1.0):
        first, second = method.coefficients((1 - t, t), lambda: gram)
        np.testing.assert_allclose(
            (first * a + second * b).numpy(), dense.slerp(a.numpy(), b.numpy(), t), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ties", {"density": 0}),
        ("ties", {"density": 1.5}),
        ("ties", {"density": float("nan")}),
        ("ties", {"density": True}),
        ("ties", {"majority_sign": "loudest"}),
        ("magnitude_prune", {"density": -0.1}),
        ("breadcrumbs", {"density": 0.9, "gamma": 0.2}),
        ("breadcrumbs", {"density": 0.5, "gamma": 1.0}),
        ("dare_linear", {"density": 2}),
        ("dare_linear", {"seed": -1}),
        ("dare_ties", {"seed": 2**64}),
        ("dare_ties", {"seed": 0.5}),
        ("della", {"density": 0.9, "epsilon": 0.3}),
        ("della", {"density": 0.5, "epsilon": -0.1}),
    ],
)
def test_values_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|may not"):
        method_of(name, **options)


def test_slerp_takes_two_adapters_and_weights_from_zero() -> None:
    with pytest.raises(ValueError, match="two adapters"):
        method_of("slerp").check(3)
    for weights in ((-1.0, 1.0), (0.0, 0.0)):
        with pytest.raises(ValueError, match="at least 0"):
            method_of("slerp").check_weights(weights)


def test_equal_magnitudes_of_della_are_ranked_by_column() -> None:
    deltas = [(d * 2).round() / 2 for d in matrices(2, 30, 40, seed=2)]
    options = {"density": 0.5, "epsilon": 0.9, "seed": 4}
    wanted = expected("della", [d.numpy() for d in deltas], options)
    np.testing.assert_allclose(combined("della", deltas, **options), wanted, rtol=1e-13, atol=0)
