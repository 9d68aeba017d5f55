"""Methods of the tolerance guarantee: their stated bounds, any cut into blocks, and what takes them back."""

from __future__ import annotations

from math import log2, pi

import numpy as np
import pytest
import torch

from adapterhub_tools.errors import FormatError, LossyError
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.random_stream import kaiming_uniform, permutation_head, seeded
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.methods.boft import BOFT
from adapterhub_tools.methods.deft import DEFT
from adapterhub_tools.methods.fourierft import FourierFT
from adapterhub_tools.methods.hra import HRA
from adapterhub_tools.methods.ln_tuning import LNTuning
from adapterhub_tools.methods.miss import MiSS
from adapterhub_tools.methods.oft import OFT
from adapterhub_tools.methods.randlora import RandLoRA
from adapterhub_tools.methods.road import RoAd

OUT, INNER = 12, 8
UNIT = 2.0**-53


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(values, kind="linear"):
    return Weight(
        kind=kind,
        shape=tuple(values.shape),
        read_rows=lambda first, count: values.reshape(values.shape[0], -1)[first : first + count].double(),
    )


def evaluated(expression, values, cuts=()):
    """Evaluates an expression over a matrix cut at the given rows."""
    out = values.reshape(values.shape[0], -1).double().clone()
    for first, last in zip((0, *cuts), (*cuts, out.shape[0]), strict=True):
        part = out[first:last].clone()
        expression.evaluate(part, first)
        out[first:last] = part
    return out.reshape(values.shape)


OFT_ = {"terms": 5, "constrained": False, "radius": 0.0, "shared": False}
BUTTERFLY = {"R": noise(2, 4, 2, 2, seed=2), "s": 1 + noise(OUT, 1, seed=3) / 4}
METHODS = {
    "HRA": (HRA(orthogonalise=False), {"u": noise(INNER, 3)}),
    "HRA, orthogonalised": (HRA(orthogonalise=True), {"u": noise(INNER, 3)}),
    "OFT, series": (OFT(series=True, **OFT_), {"R": noise(2, 6) / 10}),
    "OFT, Cayley": (OFT(series=False, **OFT_), {"R": noise(2, 6)}),
    "OFT, half": (OFT(series=False, multiplier=0.5, **OFT_), {"R": noise(2, 6) / 3}),
    "BOFT": (BOFT(), {"R": noise(1, 2, 4, 4), "s": BUTTERFLY["s"]}),
    "BOFT, butterflies": (BOFT(), BUTTERFLY),
    "MiSS": (MiSS(variant=True), {"block": noise(3, OUT)}),
    "MiSS, half": (MiSS(variant=True, multiplier=0.5), {"block": noise(3, OUT)}),
    "MiSS, bat": (MiSS(variant="bat"), {"block": noise(3, 4, 4) / 4}),
    "MiSS, bat, half": (MiSS(variant="bat", multiplier=0.5), {"block": noise(3, 4, 4) / 4}),
    "RoAd 1": (RoAd(variant="road_1", group=4), {"theta": noise(6), "alpha": 1 + noise(6, seed=2) / 4}),
    "RoAd 2": (RoAd(variant="road_2", group=6), {"theta": noise(12) / 2, "alpha": 1 + noise(12, seed=2) / 4}),
    "RoAd 4, half": (
        RoAd(variant="road_4", group=4, multiplier=0.5),
        {"theta": noise(24) / 2, "alpha": 1 + noise(24, seed=2) / 4},
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_merge_is_taken_back(name):
    method, factors = METHODS[name]
    start = noise(OUT, INNER, seed=9)
    merged = evaluated(method.expression(factors, weight_of(start)), start)
    assert (merged - start.double()).abs().max() > 1e-2
    back = evaluated(method.inverse(factors, weight_of(merged), {}), merged)
    assert torch.allclose(back, start.double(), rtol=0, atol=1e-13)
    stored = merged.float()
    again = evaluated(method.inverse(factors, weight_of(stored), {}), stored)
    assert (again - start.double()).abs().max() < 30 * 2.0**-24 * start.abs().max()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("cuts", [(5,), (1, 2, 7, 11), (4, 8)])
def test_any_cut_into_blocks_gives_the_same(name, cuts):
    method, factors = METHODS[name]
    start = noise(OUT, INNER, seed=9)
    whole = evaluated(method.expression(factors, weight_of(start)), start)
    cut = evaluated(method.expression(factors, weight_of(start)), start, cuts)
    assert torch.allclose(whole, cut, rtol=0, atol=1e-14)


def test_a_rotated_bias_and_its_way_back():
    method, factors = METHODS["RoAd 2"]
    bias = noise(OUT, seed=4)
    merged = evaluated(method.expression(factors, weight_of(bias, "bias")), bias, (5,))
    back = evaluated(method.inverse(factors, weight_of(merged, "bias"), {}), merged, (5,))
    assert torch.allclose(back, bias.double(), rtol=0, atol=1e-14)


LOSSY = {
    "DEFT": (DEFT(decomposition="qr", alpha=None, removes=False), {"P": noise(OUT, 2), "R": noise(2, INNER)}),
    "LN-tuning": (LNTuning(), {"weight": noise(OUT)}),
    "HRA, scaled": (HRA(orthogonalise=False, multiplier=0.5), {"u": noise(INNER, 3)}),
    "BOFT, scaled": (BOFT(multiplier=0.5), BUTTERFLY),
    "BOFT, an output scaled to nothing": (BOFT(), {**BUTTERFLY, "s": torch.zeros(OUT, 1)}),
    # Half of I and half of a turn by 180 degrees.
    "OFT, a singular block": (
        OFT(series=False, multiplier=0.5, **OFT_),
        {"R": torch.full((4, 1), 1e12)},
    ),
    "MiSS, a block that cancels": (MiSS(variant="bat"), {"block": -torch.eye(4).repeat(3, 1, 1)}),
    "RoAd, a pair that cancels": (
        RoAd(variant="road_2", group=4),
        {"theta": torch.zeros(OUT), "alpha": torch.zeros(OUT)},
    ),
}


@pytest.mark.parametrize("name", LOSSY)
def test_what_is_lost_is_not_made_up(name):
    method, factors = LOSSY[name]
    with pytest.raises(LossyError) as caught:
        method.inverse(factors, weight_of(noise(OUT, INNER)), {})
    assert caught.value.problems[0].remedy


def test_a_vector_without_direction_is_refused():
    method = HRA(orthogonalise=True)
    vectors = noise(INNER, 1).repeat(1, 2) * torch.tensor([1.0, 0.0])
    with pytest.raises(FormatError, match="vector 1"):
        method.expression({"u": vectors}, weight_of(noise(OUT, INNER)))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("shape", [(12, 8), (7, 15), (1, 9)])
def test_the_transform_is_within_its_bound(kind, shape):
    out, inner = shape if kind == "linear" else shape[::-1]
    spectrum = noise(5, seed=4).double()
    method = FourierFT(scale=150.0, seed=7)
    term = method.delta({"spectrum": spectrum}, Weight(kind=kind, shape=shape))
    found = torch.zeros(shape, dtype=torch.float64)
    term.add_to(found, 0)
    flat = torch.randperm(out * inner, generator=torch.Generator().manual_seed(7))[:5].numpy()
    o, i = np.meshgrid(np.arange(out), np.arange(inner), indexing="ij")
    exact = np.zeros((out, inner), dtype=np.longdouble)
    for value, place in zip(spectrum.numpy(), flat, strict=True):
        turns = (place // inner * o * inner + place % inner * i * out) % (out * inner)
        exact += np.longdouble(value) * np.cos(2 * np.longdouble(pi) * turns / (out * inner))
    exact = exact * 150 / (out * inner)
    if kind == "conv1d":
        exact = exact.T
    bound = 8 * (log2(shape[1]) + 2) * UNIT * 150 * float(spectrum.abs().sum()) / (out * inner)
    # π as a double is itself off by 2^-54 of a turn.
    assert np.abs(found.numpy() - exact).max() <= 2 * bound
    assert (term.bounds() >= np.abs(found.numpy()).max(axis=1)).all()


class Rows:
    """A factor that is read row by row."""

    def __init__(self, values):
        self.values = values.flatten(1).double()
        self.shape = tuple(self.values.shape)

    def read(self, first, count):
        return self.values[first : first + count].clone()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_random_bases_are_within_their_bound(shape, kind):
    small, large = sorted(shape)
    count = -(-small // 4)
    factors = {
        "lambda": noise(4, count, seed=1),
        "gamma": noise(count, small, seed=2),
        "shared_A": noise(4, 1, small + 3, seed=3).bfloat16(),
        "shared_B": noise(large + 2, count + 1, 4, seed=4).bfloat16(),
    }
    stored = {**factors, "shared_B": Rows(factors["shared_B"])}
    term = RandLoRA(rank=4, alpha=3.0).delta(stored, Weight(kind=kind, shape=shape))
    found = torch.zeros(shape, dtype=torch.float64)
    term.add_to(found, 0)
    scaled = (
        factors["lambda"][:, :, None].double()
        * factors["shared_A"][:, :, :small].double()
        * factors["gamma"].double()
    )
    wide = factors["shared_B"][:large, :count].double().flatten(1)
    product = wide @ scaled.flatten(0, 1)
    sizes = wide.abs() @ scaled.flatten(0, 1).abs()
    upright = shape[0] > shape[1] or (shape[0] == shape[1] and kind == "linear")
    expected, bound = (product, sizes) if upright else (product.t(), sizes.t())
    limit = (4 * count + 6) * UNIT * 0.75 * bound
    assert bool(((found - expected * 0.75).abs() <= 2 * limit).all())
    assert (term.bounds() >= found.abs().amax(dim=1).numpy()).all()
    rows, columns = np.array([0, shape[0] - 1, 3, 3]), np.array([1, 2, 0, 7])
    at, safe = term.at_points(rows, columns)
    assert safe.all()
    assert np.allclose(at.high, found.numpy()[rows, columns], rtol=1e-14)


def test_a_sum_of_a_computed_delta_is_rounded_once():
    start = noise(6, 10, seed=5).bfloat16()
    term = FourierFT(scale=20.0, seed=1).delta({"spectrum": noise(9)}, Weight(kind="linear", shape=(6, 10)))
    total = DeltaSum((term,), 6)
    wide = start.double().clone()
    total.evaluate(wide, 0)
    delta = torch.zeros(6, 10, dtype=torch.float64)
    term.add_to(delta, 0)
    assert torch.equal(wide, start.double() + delta)


@pytest.mark.parametrize(
    ("total", "count", "seed"), [(1, 1, 0), (2, 2, 1), (1000, 10, 777), (999_983, 700, 5)]
)
def test_the_head_of_a_permutation(total, count, seed):
    whole = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(permutation_head(total, count, seed), whole[:count])


def test_uniform_numbers_are_those_of_torch():
    made = kaiming_uniform((5, 7), seeded(3))
    expected = torch.nn.init.kaiming_uniform_(torch.empty(5, 7), generator=torch.Generator().manual_seed(3))
    assert torch.equal(made, expected)
