"""The factored SVD against numpy's dense one, and the randomised SVD against the optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapterhub_tools.linalg.factored_svd import (
    SVD,
    FactoredSVD,
    normalise_signs,
    product_distance,
    product_norm,
    rank_for_energy,
    rank_for_error,
    singular_values,
    tail_norm,
)
from adapterhub_tools.linalg.randomized_svd import DenseRows, randomized_svd, residual_norm

SHAPES = [(50, 40, 8), (6, 40, 8), (40, 5, 8), (3, 3, 8), (30, 30, 1), (1, 9, 3), (9, 1, 3)]


def factors(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return left, torch.randn(rank, columns, generator=generator, dtype=torch.float64)


def dense(svd: SVD) -> torch.Tensor:
    return svd.u * svd.s @ svd.vt


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_values_and_vectors_are_numpys(rows: int, columns: int, rank: int) -> None:
    left, right = factors(rows, columns, rank)
    product = (left @ right).numpy()
    expected = np.linalg.svd(product, compute_uv=False)
    found = FactoredSVD(left, right)
    count = len(found.values)
    assert count == min(rows, columns, rank)
    scale = expected[0]
    np.testing.assert_allclose(found.values.numpy(), expected[:count], rtol=0, atol=1e-13 * scale)
    assert expected[count:].max(initial=0.0) < 1e-13 * scale
    whole = found.leading(rank)
    np.testing.assert_allclose(dense(whole).numpy(), product, rtol=0, atol=1e-13 * scale)
    for vectors in (whole.u, whole.vt.t()):
        np.testing.assert_allclose((vectors.t() @ vectors).numpy(), np.eye(count), atol=1e-13)
    np.testing.assert_allclose(singular_values(left, right).numpy(), found.values.numpy(), atol=1e-13 * scale)
    assert product_norm(left, right) == pytest.approx(np.linalg.norm(product), rel=1e-13)


def test_small_singular_values_survive_where_gram_matrices_lose_them() -> None:
    """σ from 1 to 10⁻¹³: a Gram matrix would lose all below 10⁻⁸."""
    u = torch.linalg.qr(factors(60, 6, 6)[0])[0]
    v = torch.linalg.qr(factors(50, 6, 6, seed=1)[0])[0]
    wanted = torch.tensor([1.0, 1e-3, 1e-6, 1e-9, 1e-11, 1e-13], dtype=torch.float64)
    found = FactoredSVD(u * wanted, v.t()).values
    assert torch.allclose(found, wanted, rtol=1e-2, atol=1e-16)


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_leading_triplets_are_the_best_approximation(rank: int) -> None:
    left, right = factors(40, 30, 8)
    product = left @ right
    error = float((product - dense(FactoredSVD(left, right).leading(rank))).norm())
    best = torch.linalg.svdvals(product)[rank:].norm()
    assert error == pytest.approx(float(best), abs=1e-12)


def test_signs_are_normalised_and_repeatable() -> None:
    left, right = factors(40, 30, 8)
    first, second = FactoredSVD(left, right).leading(8), FactoredSVD(left.clone(), right.clone()).leading(8)
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.vt, second.vt)
    flipped = normalise_signs(SVD(u=-first.u, s=first.s, vt=-first.vt))
    assert torch.equal(flipped.u, first.u)
    peaks = first.u.gather(0, first.u.abs().argmax(dim=0)[None])
    assert bool((peaks > 0).all())


def test_balanced_factors_have_equal_norms_and_the_same_product() -> None:
    left, right = factors(40, 30, 4)
    svd = FactoredSVD(left * 1e6, right * 1e-3).leading(4)
    b, a = svd.balanced()
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-12)
    assert torch.allclose(b @ a, left @ right * 1e3, rtol=1e-10, atol=1e-8)


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        FactoredSVD(*factors(3, 3, 2)).leading(-1)


def test_distance_of_products() -> None:
    left, right = factors(40, 30, 4)
    other_left, other_right = factors(40, 30, 6, seed=1)
    expected = float((left @ right - other_left @ other_right).norm())
    assert product_distance(left, right, other_left, other_right) == pytest.approx(expected, rel=1e-13)
    assert product_distance(left, right, left, right) < 1e-12


def test_zero_products() -> None:
    found = FactoredSVD(torch.zeros(5, 2), torch.ones(2, 4))
    assert found.values.tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(dense(found.leading(2))).all())


def test_ranks_for_energy_and_error() -> None:
    values = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)  # squares 4, 1, 1, 0
    assert [rank_for_energy(values, share) for share in (0.1, 4 / 6, 0.67, 5 / 6, 1.0)] == [1, 1, 2, 2, 3]
    assert rank_for_energy(values, 0.9, total=12.0) == 4  # more lies beyond the known values
    assert [rank_for_error(values, error) for error in (1.0, 0.6, 0.5, 0.1, 0.0)] == [1, 1, 2, 3, 3]
    assert rank_for_error(values, 0.8, total=12.0) == 2
    assert tail_norm(values, 1) == pytest.approx(2**0.5)
    assert tail_norm(values, 4, total=10.0) == pytest.approx(2.0)
    zeros = torch.zeros(3, dtype=torch.float64)
    assert rank_for_energy(zeros, 0.9) == rank_for_error(zeros, 0.1) == 1


def graded(rows: int, columns: int, power: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return matrix * torch.arange(1, columns + 1, dtype=torch.float64) ** -power


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(300, 220), (200, 260)])
def test_randomised_error_is_within_one_percent_of_the_optimum(shape: tuple[int, int], power: float) -> None:
    matrix = graded(*shape, power)
    source = DenseRows(matrix=matrix, rows_per_block=37)
    found = randomized_svd(source, 16)
    best = float(torch.linalg.svdvals(matrix)[16:].norm())
    actual = float((matrix - dense(found.svd)).norm())
    assert found.sketch == 26  # randomised, not dense
    assert best <= actual <= 1.01 * best
    assert found.error == pytest.approx(actual, rel=1e-9)
    assert residual_norm(source, *found.svd.balanced()) == pytest.approx(actual, rel=1e-12)
    assert found.total == pytest.approx(float(matrix.norm()) ** 2, rel=1e-12)


def test_a_matrix_of_low_rank_is_recovered_to_rounding() -> None:
    left, right = factors(500, 400, 12)
    matrix = left @ right
    found = randomized_svd(DenseRows(matrix=matrix), 12)
    assert float((matrix - dense(found.svd)).norm() / matrix.norm()) < 1e-13


def test_the_seed_decides_and_the_block_size_hardly_matters() -> None:
    matrix = graded(200, 150, 1.0)
    one = randomized_svd(DenseRows(matrix=matrix, rows_per_block=50), 8, seed=3)
    again = randomized_svd(DenseRows(matrix=matrix, rows_per_block=50), 8, seed=3)
    assert torch.equal(one.svd.u, again.svd.u)
    other = randomized_svd(DenseRows(matrix=matrix, rows_per_block=200), 8, seed=4)
    assert torch.allclose(one.svd.s, other.svd.s, rtol=1e-2)


def test_zero_small_and_wrong() -> None:
    zero = randomized_svd(DenseRows(matrix=torch.zeros(200, 150)), 4)
    assert zero.total == zero.error == 0.0
    small = randomized_svd(DenseRows(matrix=torch.eye(5, dtype=torch.float64)), 9)
    assert small.svd.rank == 5
    with pytest.raises(ValueError, match="at least 1"):
        randomized_svd(DenseRows(matrix=torch.eye(5)), 0)
