"""WaveFT: W' = W + s·T(S), S sparse and T the inverse Haar transform of one level, or nothing.

Source: Bilican et al. 2025, arXiv:2505.12532; peft/tuners/waveft/layer.py, ``update_layer`` (the places, from
a seed) and ``get_delta_weight``. Each value reaches a 2×2 patch of the weight, times ±1/2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.methods._random_places import RandomPlaces
from adapterhub_tools.model import hyperparameters as read

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.stored_term import SparseTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveFT(RandomPlaces):
    """The hyperparameters of a WaveFT module, one more than RandomPlaces.

    The tolerance is that of the random places: given them, the result is correctly rounded.

    Attributes:
        transformed: True for the Haar transform, False for the values as they are.
    """

    transformed: bool

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> WaveFT:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        transformed = read.boolean(hparams, "use_idwt")
        if transformed:
            read.choice(hparams, "wavelet_family", ("db1",))
        return cls(
            scale=read.number(hparams, "scale"),
            seed=hparams.get("random_loc_seed"),
            transformed=transformed,
            multiplier=hparams.get("multiplier", 1.0),
        )

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> SparseTerm:
        """Returns the delta, four places for each value at most.

        Shapes: spectrum (n,); the delta is (out, in), or (in, out) for ``conv1d``.
        Memory: about 160 bytes per value.
        """
        from adapterhub_tools.linalg.stored_term import SparseTerm

        values = factors["spectrum"].double()
        out, inner = (weight.columns, weight.rows) if weight.transposed else (weight.rows, weight.columns)
        (flat,) = self.random_tensors(factors, (out, inner)).values()
        rows, columns = flat // inner, flat % inner
        scale = Fraction(self.scale) * Fraction(self.multiplier)
        if self.transformed:
            rows, columns, values = _haar(rows, columns, values, out, inner)
            scale /= 2
        if weight.transposed:
            rows, columns = columns, rows
        return SparseTerm(
            values,
            rows * weight.columns + columns,
            height=weight.rows,
            width=weight.columns,
            scale=Surd(coefficient=scale),
        )


def _haar(
    rows: Tensor, columns: Tensor, values: Tensor, out: int, inner: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the places and signed values that the coefficients reach; each is to be halved.

    The coefficients lie in quadrants of a matrix of even size: sums top left, differences of rows top right,
    of columns bottom left, of both bottom right.
    """
    import torch

    high, wide = (out + 1) // 2, (inner + 1) // 2
    by_rows, by_columns = columns >= wide, rows >= high
    found = []
    for down in (0, 1):
        for right in (0, 1):
            sign = torch.ones_like(values)
            if down:
                sign[by_rows] *= -1
            if right:
                sign[by_columns] *= -1
            found.append((2 * (rows % high) + down, 2 * (columns % wide) + right, sign * values))
    at, beside, what = (torch.cat(parts) for parts in zip(*found, strict=True))
    inside = (at < out) & (beside < inner)
    return at[inside], beside[inside], what[inside]


IMPLEMENTATION = WaveFT
