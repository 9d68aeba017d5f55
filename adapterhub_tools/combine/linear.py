"""The weighted sum of deltas: ΔW = Σ w_i·ΔW_i, exact, in factored form.

Also called task arithmetic: Ilharco et al. 2022, arXiv:2212.04089, §2; a negative weight subtracts. The sum
is one of deltas, not of factors: Σ w_i·B_i·A_i is not (Σ √w_i·B_i)·(Σ √w_i·A_i).

Factors that inputs share bit for bit, such as a frozen A (LoRA-FA, arXiv:2308.03303), are stored once and
their partners added, so that the rank does not grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adapterhub_tools.combine._weighted_sum import WeightedSum


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(WeightedSum):
    """The weighted sum; it has no hyperparameters."""

    shares_factors: ClassVar[bool] = True


IMPLEMENTATION = Linear
