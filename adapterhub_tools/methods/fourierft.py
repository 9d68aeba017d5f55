"""FourierFT: W' = W + s·Re(F⁻¹(S)), S a sparse spectrum and F⁻¹ the inverse discrete Fourier transform.

Source: Gao et al. 2024, arXiv:2405.03003; peft/tuners/fourierft/layer.py, ``update_layer`` (the places of the
spectrum, from a seed) and ``get_delta_weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING, Any

from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.methods._random_places import RandomPlaces
from adapterhub_tools.model import hyperparameters as read

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.computed_term import ComputedTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class FourierFT(RandomPlaces):
    """The hyperparameters of a FourierFT module; the number of frequencies is that of the tensor.

    The error of an element is at most 8·(log₂(in) + 2)·2⁻⁵³·s·Σ|S| / (out·in).
    """

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> FourierFT:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        return cls(
            scale=read.number(hparams, "scale"),
            seed=hparams.get("random_loc_seed"),
            multiplier=hparams.get("multiplier", 1.0),
        )

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> ComputedTerm:
        """Returns the delta, computed row by row: a sum over the spectrum, then one transform of the row.

        Shapes: spectrum (n,); the delta is (out, in), or (in, out) for ``conv1d``.
        Dtype:  any float in; complex128 inside, float64 out.
        Memory: 16 bytes per value of the rows that are computed together, and of their n terms.
        """
        import numpy as np
        import torch

        from adapterhub_tools.linalg.computed_term import ComputedTerm

        values = factors["spectrum"].double()
        height, width = weight.rows, weight.columns
        shape = (width, height) if weight.transposed else (height, width)
        (flat,) = self.random_tensors(factors, shape).values()
        rows, columns = flat // shape[1], flat % shape[1]
        if weight.transposed:
            rows, columns = columns, rows
        turns = torch.arange(height, dtype=torch.float64) * (2 * pi / height)
        roots = torch.polar(torch.ones_like(turns), turns)
        strength = self.scale * self.multiplier

        def some_rows(index: Tensor) -> Tensor:
            waves = roots[index[:, None] * rows[None, :] % height] * (values / height)
            spectra = waves.new_zeros(int(index.shape[0]), width)
            spectra.index_add_(1, columns, waves)
            made: Tensor = torch.fft.ifft(spectra, dim=1).real * strength
            return made

        largest = float(values.abs().sum()) * abs(strength) / (height * width)
        return ComputedTerm(rows=some_rows, height=height, width=width, largest=np.full(height, largest))


IMPLEMENTATION = FourierFT
