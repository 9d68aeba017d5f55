"""The formula of a LoRA merge in exact arithmetic, written from the papers and not from the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

PRECISION = {
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
    torch.float32: (24, -126),
    torch.float64: (53, -1022),
}
"""dtype -> significant bits and exponent of the smallest normal number (IEEE 754-2019, table 3.5)."""

_DIGITS = Context(prec=150)


@dataclass(kw_only=True)
class Factors:
    """One LoRA of a linear layer: ``a`` (rank, in), ``b`` (out, rank).

    Attributes:
        alpha: of the config.
        rank: r.
        root: True if the delta is scaled by alpha / √r.
        scale: the caller's factor.
    """

    a: Tensor
    b: Tensor
    alpha: float
    rank: int
    root: bool = False
    scale: float = 1.0

    @property
    def factor(self) -> Fraction:
        """alpha / r, or alpha / √r to 150 digits: far closer than any float's boundary to a random value."""
        top = Fraction(self.alpha) * Fraction(self.scale)
        if not self.root:
            return top / self.rank
        return top / Fraction(_DIGITS.sqrt(Decimal(self.rank)))

    def delta(self, row: int, column: int) -> Fraction:
        """One element of s·B·A."""
        pairs = zip(self.b[row].tolist(), self.a[:, column].tolist(), strict=True)
        return self.factor * sum((Fraction(x) * Fraction(y) for x, y in pairs), Fraction(0))


def factors_of(adapter: Path, module: str, **more: Any) -> Factors:
    """Reads one module's factors and its config as the exact formula wants them."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    prefix = f"base_model.model.{module}."
    a, b = tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"]
    return Factors(
        a=a.flatten(1),
        b=b.flatten(1),
        alpha=config["lora_alpha"],
        rank=config["r"],
        root=config["use_rslora"],
        **more,
    )


def nearest(value: Fraction, dtype: torch.dtype) -> Fraction:
    """Rounds a number to a format: to nearest, ties to even. The caller's values do not overflow."""
    if value == 0:
        return value
    bits, lowest = PRECISION[dtype]
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, lowest) - bits + 1)
    return round(value / step) * step


def sample(shape: Sequence[int], count: int, seed: int) -> list[tuple[int, int]]:
    """Returns random (row, column) pairs of a matrix, or all of them if it has no more."""
    rows, columns = shape
    if rows * columns <= count:
        return [(row, column) for row in range(rows) for column in range(columns)]
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(rows * columns, generator=generator)[:count].tolist()
    return [divmod(index, columns) for index in picked]


def assert_exactly_rounded(
    merged: Tensor, base: Tensor, parts: Sequence[Factors], *, count: int = 400, seed: int = 0
) -> None:
    """Compares elements of a merged matrix with the exact formula, rounded once to the matrix's dtype."""
    assert merged.shape == base.shape
    for row, column in sample(merged.shape, count, seed):
        exact = Fraction(base[row, column].item()) + sum((p.delta(row, column) for p in parts), Fraction(0))
        expected = nearest(exact, merged.dtype)
        found = Fraction(merged[row, column].item())
        assert found == expected, f"[{row}, {column}]: {float(found)!r}, exactly {float(expected)!r}"
