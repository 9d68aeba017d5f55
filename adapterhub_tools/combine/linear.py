"""The weighted sum of deltas: ΔW = Σ w_i·ΔW_i, exact, in factored form.

Also called task arithmetic: Ilharco et al. 2022, arXiv:2212.04089, §2; a negative weight subtracts. The sum
is one of deltas, not of factors: Σ w_i·B_i·A_i is not (Σ √w_i·B_i)·(Σ √w_i·A_i).

Factors that inputs share bit for bit, such as a frozen A (LoRA-FA, arXiv:2308.03303), are stored once and
their partners added, so that the rank does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """The weighted sum; it has no hyperparameters."""

    kind: ClassVar[str] = "factored"
    default_rank: ClassVar[str] = "exact"
    shares_factors: ClassVar[bool] = True

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Linear:
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


IMPLEMENTATION = Linear
