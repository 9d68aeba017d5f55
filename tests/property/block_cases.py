"""Blocks of a merge in which ties, near ties, cancellation and outlier rows occur all the time."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS as PACKAGE_FORMATS
from adapterhub_tools.linalg.rounding import BlockRounder
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.methods.lora import LoRA
from tests.property.exact_oracle import FORMATS, Part, merged_matrix

ROWS, COLUMNS = 64, 256
KINDS = ("plain", "grid", "outliers", "cancelling", "annulled", "subnormal")


def stored(values: np.ndarray, name: str) -> np.ndarray:
    """The values as the format holds them, without infinities and without −0."""
    limit = float(torch.finfo(FORMATS[name].torch).max)
    tensor = torch.from_numpy(np.clip(values, -limit, limit)).to(FORMATS[name].torch)
    return tensor.double().numpy() + 0.0


def signs(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Powers of two with any sign, exponents in [low, high)."""
    return np.ldexp(rng.choice((-1.0, 1.0), shape), rng.integers(low, high, shape))


def factors_of(
    rng: np.random.Generator, kind: str, rank: int, to: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W, B and A before they are stored."""
    w = rng.standard_normal((ROWS, COLUMNS)) * 0.05
    b, a = rng.standard_normal((ROWS, rank)) * 0.1, rng.standard_normal((rank, COLUMNS)) * 0.1
    if kind == "grid":
        # Few bits everywhere, so that sums lie on midpoints, and half of them with a tail far below.
        w = rng.integers(129, 256, w.shape) * signs(rng, w.shape, -10, -8)
        b = rng.integers(-2, 3, b.shape) * 1.0
        a = rng.integers(-2, 3, a.shape) * signs(rng, a.shape, -26 if rng.random() < 0.3 else -13, -10)
        b[:, -1] = 1
        a[-1] = np.where(rng.random(COLUMNS) < 0.5, 0, signs(rng, (COLUMNS,), -70, -40))
    elif kind == "outliers":
        b *= signs(rng, (ROWS, 1), -20, 21)
        a *= signs(rng, (1, COLUMNS), -20, 21)
    elif kind == "cancelling":
        half = max(1, rank // 2)
        large = float(rng.integers(10, 28))
        b = np.concatenate([b[:, :half] * 2**large, b[:, :half] * -(2**large), b[:, :1]], axis=1)
        a = np.concatenate([a[:half] * 2**large, a[:half] * 2**large, a[:1]], axis=0)
    elif kind == "subnormal":
        # Multiples of half the smallest number of the format, up to twice its smallest normal number.
        quantum, bits = FORMATS[to].quantum, min(FORMATS[to].fraction_bits, 12)
        half = quantum // 2
        w = np.ldexp(rng.integers(-(2**bits), 2**bits, w.shape) * 1.0, quantum)
        b = np.ldexp(rng.integers(-2, 3, b.shape) * 1.0, half)
        a = np.ldexp(rng.integers(-2, 3, a.shape) * 1.0, quantum - 1 - half)
        b[:, -1] = 2.0**half
        a[-1] = np.where(
            rng.random(COLUMNS) < 0.5, 0, signs(rng, (COLUMNS,), quantum - half - 60, quantum - half - 20)
        )
    return w, b, a


def scale_of(rng: np.random.Generator) -> LoRA:
    """A scaling: a power of two, not one, or a root."""
    alpha = float(rng.choice((16.0, 16.0, 1.0, 32.0, 0.1, 5.7)))
    rank = int(rng.choice((16, 16, 12, 3, 8, 7)))
    return LoRA(rank=rank, alpha=alpha, scaling=str(rng.choice(("alpha/rank",) * 4 + ("alpha/sqrt(rank)",))))


@dataclass(kw_only=True)
class Rounded:
    """What rounded a block, and the block before and after."""

    rounder: BlockRounder
    expression: DeltaSum
    start: torch.Tensor
    out: torch.Tensor


class Block:
    """One block with its exact result."""

    def __init__(self, seed: int, to: str) -> None:
        rng = np.random.default_rng([seed, FORMATS[to].width, FORMATS[to].fraction_bits])
        self.kind = KINDS[seed % len(KINDS)]
        self.to = to
        self.factor_format = str(rng.choice(("BF16", "F16", "F32")))
        self.start_format = to if rng.random() < 0.8 else "F32"
        self.lora = scale_of(rng)
        if self.kind == "subnormal" and to != "F16":
            self.factor_format = "F32"  # float16 has no factors as small as these
        w, b, a = factors_of(rng, self.kind, int(rng.choice((1, 4, 16, 64))), to)
        b, a = stored(b, self.factor_format), stored(a, self.factor_format)
        root = float(self.lora.rank) ** (0.5 if self.lora.scaling != "alpha/rank" else 1.0)
        peak = np.abs(b @ a).max() * self.lora.alpha / root
        if to == "F16" and peak > 2**14:
            fit = 2.0 ** np.floor(13 - np.log2(peak))
            self.lora = LoRA(rank=self.lora.rank, alpha=self.lora.alpha * fit, scaling=self.lora.scaling)
        if self.kind == "annulled":
            w = -(b @ a) * (self.lora.alpha / root)
        self.start = stored(w, self.start_format)
        self.left, self.right = b, a

    @property
    def scale(self) -> Part:
        rooted = self.lora.scaling != "alpha/rank"
        return Part(
            coefficient=Fraction(self.lora.alpha) / self.lora.rank, root=self.lora.rank if rooted else 1
        )

    def expected(self) -> np.ndarray:
        return merged_matrix(self.start, self.left, self.right, self.scale, FORMATS[self.to])

    def rounded(self, *, unit: float | None = None, first: bool = True, back: bool = False) -> Rounded:
        """The package's result; ``first``: in binary32 at first, ``back``: with the way back."""
        factor = FORMATS[self.factor_format].torch
        term = self.lora.delta(
            {"B": torch.from_numpy(self.left).to(factor), "A": torch.from_numpy(self.right).to(factor)},
            Weight(kind="linear", shape=self.start.shape),
        )
        expression = DeltaSum([term], ROWS)
        if unit is not None:
            expression.unit = unit
        rounder = BlockRounder(
            expression,
            columns=COLUMNS,
            start=PACKAGE_FORMATS[self.start_format],
            to=PACKAGE_FORMATS[self.to],
            back=back,
        )
        if first:
            assert rounder._first is not None or self.to == "F32" or not expression.terms
        else:
            rounder._first = None
        out = torch.empty((ROWS, COLUMNS), dtype=FORMATS[self.to].torch)
        start = torch.from_numpy(self.start).to(FORMATS[self.start_format].torch)
        wrong = rounder.round_rows(start, out, 0)
        assert wrong is None, f"{wrong} in block {self.kind}"
        return Rounded(rounder=rounder, expression=expression, start=start, out=out)

    def computed(self, *, unit: float | None = None, first: bool = True) -> tuple[np.ndarray, int]:
        """The package's bits, and how many of them it decided exactly."""
        found = self.rounded(unit=unit, first=first)
        return FORMATS[self.to].patterns(found.out), found.rounder.resolved
