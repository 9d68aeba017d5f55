"""The weighted sum of deltas, cut to the largest rank of the inputs unless another policy is given.

The best approximation of Σ w_i·ΔW_i of that rank in the Frobenius norm (Eckart & Young 1936,
doi:10.1007/BF02288367), from the factors alone (linalg/factored_svd.py). PEFT's ``svd`` has the same default
rank and takes the dense matrix apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adapterhub_tools.combine._weighted_sum import WeightedSum


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncatedSum(WeightedSum):
    """The truncated sum; it has no hyperparameters."""

    default_rank: ClassVar[str] = "largest"


IMPLEMENTATION = TruncatedSum
