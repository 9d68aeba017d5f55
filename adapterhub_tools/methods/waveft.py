"""WaveFT: W' = W + s·T(S), S sparse and T the inverse Haar transform of one level, or nothing.

Source: Bilican et al. 2025, arXiv:2505.12532; peft/tuners/waveft/layer.py, ``update_layer`` (the places, from
a seed) and ``get_delta_weight``. Each value reaches a 2×2 patch of the weight, times ±1/2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model import hyperparameters as read
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.stored_term import SparseTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveFT:
    """The hyperparameters of a WaveFT module; the number of values is that of the tensor.

    The tolerance is that of the random places: given them, the result is correctly rounded.

    Attributes:
        scale: s.
        seed: of the places.
        transformed: True for the Haar transform, False for the values as they are.
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "tolerance"
    additive: ClassVar[bool] = True
    scale: float
    seed: Any
    transformed: bool
    multiplier: float = 1.0

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

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Checks that the weight has room for the values.

        Args:
            factors: ``"spectrum"`` (n,).
            kind: ``"linear"`` or ``"conv1d"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        spectrum = factors["spectrum"]
        if len(spectrum.shape) != 1 or spectrum.elements > prod(base.shape):
            return (wrong_factor(module, spectrum, f"one axis of at most {prod(base.shape)} values"),)
        return misfit_matrix(module, base, kind, None, None)

    def random_names(self, factors: Mapping[str, Any], shape: tuple[int, int]) -> tuple[str, ...]:
        """Returns the name of the random places, which says what they are made from."""
        return (f"places/{self.seed}/{shape[0]}/{shape[1]}/{factors['spectrum'].shape[0]}",)

    def random_tensors(self, factors: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Makes the places from the seed, as PEFT does: row · in + column of each.

        Args:
            factors: ``"spectrum"``, a tensor or its description.
            shape: (out, in).

        Raises:
            UnsupportedError: the seed is no integer.
        """
        from adapterhub_tools.linalg.random_stream import check_seed, permutation_head

        seed = check_seed(self.seed, "random_loc_seed")
        flat = permutation_head(shape[0] * shape[1], int(factors["spectrum"].shape[0]), seed)
        return {self.random_names(factors, shape)[0]: flat}

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
