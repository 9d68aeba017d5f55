"""What the weighted sums of deltas share: the weights are their coefficients; nothing else enters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adapterhub_tools.combine._method import Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedSum(Method):
    """ΔW = Σ w_i·ΔW_i in factored form; sums differ in the rank that they keep and in shared factors."""

    kind: ClassVar[str] = "factored"
    default_rank: ClassVar[str] = "exact"
    shares_factors: ClassVar[bool] = False

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
