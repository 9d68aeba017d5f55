"""The weighted sum of deltas, cut to the largest rank of the inputs unless another policy is given.

The best approximation of Σ w_i·ΔW_i of that rank in the Frobenius norm (Eckart & Young 1936,
doi:10.1007/BF02288367), from the factors alone (linalg/factored_svd.py). PEFT's ``svd`` has the same default
rank and takes the dense matrix apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncatedSum:
    """The truncated sum; it has no hyperparameters."""

    kind: ClassVar[str] = "factored"
    default_rank: ClassVar[str] = "largest"
    shares_factors: ClassVar[bool] = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TruncatedSum:
        """Makes the method of its options; it has none."""
        return cls(**options)

    def to_json(self) -> dict[str, Any]:
        """Returns the hyperparameters, for receipts."""
        return {}

    def check(self, count: int) -> None:
        """Accepts any number of adapters, at least one."""
        if count < 1:
            raise ValueError("there is nothing to combine")

    def coefficients(
        self,
        weights: tuple[float, ...],
        inner: Callable[[], Tensor],  # noqa: ARG002 - a sum needs no angles
    ) -> tuple[float, ...]:
        """Returns c with ΔW = Σ c_i·ΔW_i: the weights."""
        return weights


IMPLEMENTATION = TruncatedSum
