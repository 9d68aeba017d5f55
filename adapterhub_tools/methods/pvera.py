"""PVeRA: VeRA whose inner vector is drawn from a normal distribution; merged at its mean.

W' = W + (b ∘ B)·(d ∘ A) with the first halves of d and A, which give the mean; the second halves give the
logarithm of the variance and matter only where noise is drawn. Source: peft/tuners/pvera/layer.py,
``get_delta_weight``, and peft/tuners/pvera/model.py, ``_init_pvera_A_pvera_B``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adapterhub_tools.methods._shared_matrices import SharedMatrices


@dataclass(frozen=True, slots=True, kw_only=True)
class PVeRA(SharedMatrices):
    """The hyperparameters of a PVeRA adapter: d has 2·rank values, A 2·rank rows, mean and variance."""

    parts: ClassVar[int] = 2


IMPLEMENTATION = PVeRA
