"""VeRA: W' = W + (b ∘ B)·(d ∘ A), with A and B random and shared by all modules, b and d trained.

Source: Kopiczko, Blankevoort and Asano 2023, arXiv:2310.11454; how A and B are made from their seed:
peft/tuners/vera/model.py, ``_init_vera_A_vera_B``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adapterhub_tools.methods._shared_matrices import SharedMatrices


@dataclass(frozen=True, slots=True, kw_only=True)
class VeRA(SharedMatrices):
    """The hyperparameters of a VeRA adapter: d has rank values, A rank rows."""

    parts: ClassVar[int] = 1


IMPLEMENTATION = VeRA
